"""Processes of a run: ranks, signals, stalls, and how a program joins and ends."""
