"""Benchmarks: what the engine and its kernels do beside the baselines. Timing lives here, never in tests/."""
