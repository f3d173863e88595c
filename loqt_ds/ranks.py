"""The processes that train together: who this one is, and what it exchanges with the others.

One object does it for one process and for many: with a world of one every exchange is the identity, and neither a
process group nor torch.distributed is needed. All methods but the properties are collectives: every rank calls them,
in the same order.

Errors are exchanged too. `gather`, `agree` and `on_main` raise on every rank if one failed: the rank itself raises its
own error, the others `PeerFailed`, which carries the message and need not be shown again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Work = dist.Work  # an exchange under way


class PeerFailed(RuntimeError):
    """Another rank failed and says so itself; `rank` is which."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.rank = rank


class Ranks:
    """This process among `world_size`.

    Args:
        group: the process group to talk over; None: this process is alone.
        device: where small messages are made; the process group must be able to send from it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, device: torch.device | str = "cpu") -> None:
        self._group, self.device = group, torch.device(device)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks and writes."""
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """This rank among those of its machine."""
        return int(os.environ.get("LOCAL_RANK", "0")) if self.world_size > 1 else 0

    # ---------------------------------------------------------------- tensors

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrites `tensor` (contiguous, any dtype) with that of rank `source`."""
        if self.world_size > 1:
            # As bytes: not every backend knows every dtype.
            dist.broadcast(tensor.view(-1).view(torch.uint8), group_src=source, group=self._group)
            # Backends write past autograd: without this nobody who kept something made of it would notice.
            torch.autograd.graph.increment_version(tensor)

    def reduce(self, tensor: Tensor, target: int) -> Work | None:
        """Starts to sum `tensor` over the ranks into that of rank `target`; on the others it holds nothing of use
        afterwards. Returns what to `wait()` for, None where there is nothing."""
        if self.world_size == 1:
            return None
        return dist.reduce(tensor, group_dst=target, group=self._group, async_op=True)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks in place; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape, stacked: (world_size, ...)."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self._group)
        return torch.stack(gathered)

    def sum_numbers(self, *numbers: int) -> list[int]:
        """Sums of integers over the ranks."""
        if self.world_size == 1:
            return list(numbers)
        return self.all_reduce(torch.tensor(numbers, dtype=torch.int64, device=self.device)).tolist()

    # ---------------------------------------------------------------- objects and errors

    def gather_objects(self, value: T) -> list[T]:
        """Each rank's value, by rank. (Pickled; the ranks are one program.)"""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Waits for all."""
        self.sum_numbers(0)

    def agree(self, error: Exception | None) -> None:
        """Raises if any rank brings an error: its own on that rank, `PeerFailed` on the others."""

        def bring() -> None:
            if error is not None:
                raise error

        self.gather(bring)

    def gather(self, action: Callable[[], T]) -> list[T]:
        """Each rank does `action`; all get all results, by rank, or raise if it failed on any (see `agree`)."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        gathered = self.gather_objects((result, message))
        if failure is not None:
            raise failure
        for rank, (_, other) in enumerate(gathered):
            if other is not None:
                raise PeerFailed(rank, other)
        return [value for value, _ in gathered]  # type: ignore[misc]

    def attempt(self, action: Callable[[], T]) -> T:
        """As `gather`, of which each rank keeps its own result, which need not be picklable."""
        kept: list[T] = []
        self.gather(lambda: kept.append(action()))
        return kept[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 does `action`; all get its result, or raise if it failed (see `agree`)."""
        if self.world_size == 1:
            return action()
        return self.gather(lambda: action() if self.is_main else None)[0]  # type: ignore[return-value]


ALONE = Ranks()
