"""LoQT (arXiv 2405.16528): pretrain and adapt language models whose linear weights stay in 4 bits."""

__version__ = "0.1.0"
