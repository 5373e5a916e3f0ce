"""Benchmarks: what the engine and its kernels do beside what others do. Timing lives here, never in tests/."""

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"  # of the machines' folders


def machine_folder(device: str) -> Path:
    """Where the results of a machine go that is named by its GPU, or else its CPU."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
