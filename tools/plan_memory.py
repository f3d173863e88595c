"""Prints what a run will need, and whether it fits.

`python tools/plan_memory.py --shape 7b --rank 1024 --tokens 2048`, or `--config NAME [section.field=value ...]`.
"""

import sys

from loqt_ds.memory.command import main

if __name__ == "__main__":
    sys.exit(main())
