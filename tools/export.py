"""Export a training checkpoint: merged in 4 bits or bf16, an adapter, GGUF; as `python -m loqt_ds.export` does."""

from __future__ import annotations

import sys

from loqt_ds.export.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
