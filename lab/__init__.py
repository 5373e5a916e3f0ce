"""Laboratories: training under random faults, whether tests notice bugs, and the paper's study at a small size."""
