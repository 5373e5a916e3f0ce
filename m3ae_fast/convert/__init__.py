"""Weights of other programs in, and ours out to them."""
