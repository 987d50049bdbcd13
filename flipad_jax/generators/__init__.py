"""Models that make images: families, training, and what attribution needs of a trained one."""
