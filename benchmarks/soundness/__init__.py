"""Certified bounds against what attacks and enumeration find on random small networks."""
