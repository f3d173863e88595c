"""Export a training checkpoint as a merged 4-bit or bf16 model directory, an adapter, or GGUF; the same as `python -m loqt_ds.export`."""

from __future__ import annotations

import sys

from loqt_ds.export.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
