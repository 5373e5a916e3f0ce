"""Benchmarks: what the engine and its kernels do beside what others do. Timing lives here, never in tests/."""
