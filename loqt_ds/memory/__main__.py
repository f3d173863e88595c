"""`python -m loqt_ds.memory`: as tools/plan_memory.py."""

import sys

from loqt_ds.memory.command import main

if __name__ == "__main__":
    sys.exit(main())
