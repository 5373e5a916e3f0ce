"""Training under random faults: python -m lab.soak --minutes 10."""
