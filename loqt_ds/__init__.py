"""LoQT (arXiv 2405.16528): pretrain and adapt language models whose linear weights stay in 4 bits."""

import logging
from typing import Any

# On a CPU, bitsandbytes warns at its import of an optional kernel that nothing here uses; every command would print it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: DeepSpeed takes seconds, and most commands do without.
    if name == "initialize":
        from loqt_ds.engines.plugin import initialize

        return initialize
    raise AttributeError(f"module 'loqt_ds' has no attribute {name!r}")
