"""The network, which maps a packed batch to losses or features."""

from m3ae_fast.model.m3ae import M3AE, Losses

__all__ = ["M3AE", "Losses"]
