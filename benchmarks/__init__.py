"""Benchmarks: each a module that prints a table and records its figures under results/."""
