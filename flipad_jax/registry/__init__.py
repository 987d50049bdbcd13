"""Whose copy made it? Keys, keyed copies of a generator, and what they guarantee (paper 2)."""
