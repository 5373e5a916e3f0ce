"""Training under faults."""
