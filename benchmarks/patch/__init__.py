"""How much any patch can do to guarded and naive students, proved and found."""
