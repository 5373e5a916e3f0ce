"""Benchmarks that compare the engine and its kernels with baselines. All timing is done here, never in tests/."""
