"""How tight and how fast the certified confidence gap is."""
