"""Prints what a run will need: `python tools/plan_memory.py --config NAME [section.field=value ...]`."""

import sys

from loqt_ds.memory import main

if __name__ == "__main__":
    sys.exit(main())
