import sys

from m3ae_fast.errors import exit_cleanly
from m3ae_fast.verify.program import main

if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
