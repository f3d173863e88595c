"""The batches of the next step, made while the device computes the present one.

One thread at a time reads, packs and (for a CUDA device) copies into pinned memory the micro-batches of one step, so
that copies to the device need not be waited for either. Order, errors and position are those of the batches behind it:
an error comes up in the step whose batch it was, and the position is that after the batches handed out, whatever has
been made beyond them.

A thread, not a process: reading tokens, numpy and tokenizers give the interpreter's lock away. Where they do not, a
step waits for its data as long as it would have without.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]

CLOSING_SECONDS = 5.0  # a stream may wait for a network that never answers


class Batches(Protocol):
    """What is read ahead of: `TrainBatches`."""

    def next_batch(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StepBatches:
    """The micro-batches of one step after another.

    Args:
        batches: where they come from; nobody else may use it from the first `take` to `close`.
        num_micro_batches: of a step.
        device: that will compute; for a CUDA device batches lie in pinned memory.
    """

    def __init__(self, batches: Batches, *, num_micro_batches: int, device: torch.device) -> None:
        self._batches, self._num, self._device = batches, num_micro_batches, device
        self._position: dict[str, Any] | None = None  # after what was handed out; None: that of `batches`
        self._ahead: Future[tuple[list[Batch], dict[str, Any]]] | None = None

    def take(self, *, is_last: bool) -> list[Batch]:
        """The micro-batches of the next step; starts with those of the one after it, unless this is the last.

        Raises what reading them raised.
        """
        if self._ahead is None:
            self._begin()
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        taken, self._position = ahead.result()
        if not is_last:
            self._begin()
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out; JSON types, the same on every rank."""
        return self._batches.state_dict() if self._position is None else self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of the batches behind it; what has been made ahead is dropped."""
        if self._ahead is not None:
            wait([self._ahead])
        self._batches.load_state_dict(state)
        self._ahead = self._position = None

    def close(self) -> None:
        """Waits for what is being made, but not for long. It is kept: a later `take` goes on with it."""
        if self._ahead is not None:
            wait([self._ahead], timeout=CLOSING_SECONDS)

    def _begin(self) -> None:
        self._position = self._batches.state_dict()
        self._ahead = Future()
        # A daemon: a run that is told to stop at once does not wait for a file that cannot be read.
        threading.Thread(target=self._make, args=(self._ahead,), name="next-batches", daemon=True).start()

    def _make(self, ahead: Future[tuple[list[Batch], dict[str, Any]]]) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # else pinning would begin a context on the first device
            made = [self._pinned(self._batches.next_batch()) for _ in range(self._num)]
            ahead.set_result((made, self._batches.state_dict()))
        except BaseException as error:
            ahead.set_exception(error)

    def _pinned(self, batch: Batch) -> Batch:
        if self._device.type != "cuda":
            return batch
        return {name: tensor.pin_memory() for name, tensor in batch.items()}
