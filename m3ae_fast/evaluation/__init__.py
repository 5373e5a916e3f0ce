"""Evaluates the representation of a trained model. `m3ae-fast transfer --help` lists them."""
