"""A training run: its loop, checkpoints, resuming and log."""
