"""What the trunk runs on a CPU: attention (a C kernel with AVX-512, else torch) and matmuls through oneDNN."""
