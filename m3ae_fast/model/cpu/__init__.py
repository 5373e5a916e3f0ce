"""What the trunk runs on a CPU: C kernels with AVX-512 or AMX for attention, GELU and bf16 linear layers, else torch."""
