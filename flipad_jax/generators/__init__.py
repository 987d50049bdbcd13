"""Models that make images: families, their training, and what attribution needs of a trained one."""
