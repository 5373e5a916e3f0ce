import os

from benchmarks.alone import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before torch is imported
