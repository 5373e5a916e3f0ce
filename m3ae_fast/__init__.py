"""Pre-training of multimodal masked autoencoders (M3AE, arXiv 2205.14204) and their relatives, fast."""

__version__ = "0.1.0"
