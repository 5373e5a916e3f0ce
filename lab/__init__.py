"""Experiments and stress tests: training under random faults, mutation testing, and small-scale studies."""
