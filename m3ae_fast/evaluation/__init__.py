"""Evaluation of a trained model's representation; `m3ae-fast evaluate --help` lists the tasks."""
