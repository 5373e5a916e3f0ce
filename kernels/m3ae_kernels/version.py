"""The version of both packages, m3ae_kernels and m3ae_fast."""

__version__ = "1.0.0"
