"""What turns a model into a training run: ranks, optimiser, ZeRO, checkpoints, metrics."""
