"""Training under random faults: python -m benchmarks.soak --minutes 10."""
