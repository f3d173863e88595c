"""Fine-tuning on examples: prompts and responses, or texts and labels.

python launch/finetune.py --config RECIPE [section.field=value ...]                     on one device
deepspeed launch/finetune.py --ds_config configs/zero2.json --config RECIPE [...]       on several
torchrun --nproc_per_node N launch/finetune.py --config RECIPE engine=fsdp2 [...]       on several, without DeepSpeed
"""

import sys

from loqt_ds.train import main

if __name__ == "__main__":
    sys.exit(main(launched=True, finetune=True))
