"""Searches for inputs that a network answers worst: pgd (one image), inversion (all at once)."""
