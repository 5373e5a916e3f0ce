"""C kernels (AVX-512, AMX) for linear layers, GELU, LayerNorm and attention on a CPU; torch is used if they cannot
run."""
