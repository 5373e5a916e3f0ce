"""Processes of a run: ranks, signals, stall detection, and the start and end of distributed programs."""
