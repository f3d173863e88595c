"""How much memory there is: of a CUDA device, or of the machine that a CPU run shares with others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

CARD_SIZES_GB = (8, 12, 16, 24, 48, 80)
USABLE_SHARE = 0.975  # of a card's nominal size; drivers, and error correction where it is on, keep the rest

_UNLIMITED = 1 << 60  # above it a control group's limit is none
_CGROUPS = Path("/sys/fs/cgroup")


def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device; of the CPU, what the machine and its control groups give to this process: that of the
    machine over the ranks that a launcher has started on it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_bytes() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def host_bytes(*, cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """The machine's memory, or the smallest limit of a control group that this process is in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit in _limits(cgroups, own) if limit < _UNLIMITED)])


def _limits(cgroups: Path, own: Path) -> Iterator[int]:
    """Of version 2 (memory.max) and version 1 (memory/memory.limit_in_bytes), of a process's groups and those around
    them. In a container the path of the group may be the host's: then the top is the container's own."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory") or "memory" in controllers.split(","):
            top, file = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == top.parent:
                    break
                try:
                    text = (folder / file).read_text(encoding="utf-8").strip()
                except OSError:  # not there, or not ours to see
                    continue
                if text.isdigit():
                    yield int(text)
