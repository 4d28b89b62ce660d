"""What is certified about a smoothed pair of residual networks."""
