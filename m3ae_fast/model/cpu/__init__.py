"""What the trunk runs on a CPU: C kernels (AVX-512, AMX) for attention, linear layers and what is between, or torch."""
