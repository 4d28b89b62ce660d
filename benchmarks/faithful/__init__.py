"""The comparison of "Faithful Knowledge Distillation" (arXiv 2306.04431), and what beats it."""
