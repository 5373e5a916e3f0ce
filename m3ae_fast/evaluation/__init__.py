"""Evaluates the representation of a trained model. `m3ae-fast evaluate --help` lists them."""
