"""LoQT (arXiv 2405.16528): pretrain and adapt language models whose linear weights stay in 4 bits."""

import logging

# On a CPU, bitsandbytes warns at its import of an optional kernel that nothing here uses; every command would print it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
