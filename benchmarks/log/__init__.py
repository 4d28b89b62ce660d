"""What the log costs writers that come at once."""
