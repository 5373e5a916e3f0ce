import os

# Before torch is imported: OpenMP threads that wait must not keep a core from the others.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
