"""Pre-training of multimodal masked autoencoders (M3AE, arXiv 2205.14204) and their relatives, fast."""

from m3ae_kernels.version import __version__

__all__ = ["__version__"]
