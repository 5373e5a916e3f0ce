"""What the trunk runs on a CPU: attention (a C kernel with AVX-512 or AMX, else torch) and matmuls through oneDNN."""
