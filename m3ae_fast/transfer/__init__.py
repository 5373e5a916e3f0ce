"""Evaluates the representation of a trained model. `python -m m3ae_fast.transfer --help` lists them."""
