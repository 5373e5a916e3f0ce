"""Figures of a model's inputs, predictions and results."""
