"""Proofs of bounds: what they cost, and what alterations of them come to."""
