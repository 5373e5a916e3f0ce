"""The Triton implementations: kernels and their launchers, imported where an op first runs on them."""
