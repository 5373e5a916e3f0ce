"""The Triton implementations: kernels and their launchers, imported when an op first runs on Triton."""
