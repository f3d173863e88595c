"""What `deepspeed` and `torchrun` are pointed at.

deepspeed launch/pretrain.py --ds_config configs/zero2.json [--config RECIPE] [section.field=value ...]
torchrun --nproc_per_node N launch/pretrain.py [--config RECIPE] engine=fsdp2 [section.field=value ...]
"""

import sys

from loqt_ds.train import main

if __name__ == "__main__":
    sys.exit(main(launched=True))
