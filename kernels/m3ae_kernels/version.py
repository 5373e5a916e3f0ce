"""The version of both packages, m3ae_kernels and m3ae_fast."""

__version__ = "0.2.0"
