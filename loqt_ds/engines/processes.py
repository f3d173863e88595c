"""What a process decides before it meets the others, whoever starts them."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist


def world_size() -> int:
    """The number of ranks that the launcher has announced."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepare_to_meet(port: int | None = None) -> None:
    """Chooses this rank's CUDA device, and says where to meet if no launcher has.

    `port`: of rank 0, where the launcher names none.
    """
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, at the port that it names
    if world_size() == 1 and not dist.is_initialized() and not has_store:
        # The deepspeed launcher gives every run the same port: a second run on the machine would find it taken.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port or 0))
            free = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free)}
    if world_size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")
    # Before NCCL meets: it binds a rank to the device that is current then.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
