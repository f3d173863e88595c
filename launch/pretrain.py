"""What `deepspeed` is pointed at.

deepspeed launch/pretrain.py --ds_config configs/zero2.json [--config RECIPE] [section.field=value ...]
"""

import sys

from loqt_ds.train import main

if __name__ == "__main__":
    sys.exit(main(deepspeed=True))
