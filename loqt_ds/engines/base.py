"""What the loop asks of an engine.

The protocol has the shape of a DeepSpeed engine: call it for the model's output, `backward(loss)`, `step()`, all three
once per micro-batch; the update happens in the last `step()` of an accumulation. Nothing else of how a step is taken,
or where the trained state lives, is visible to the loop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.method.controller import Controller, ReinitReport
from loqt_ds.ranks import Ranks


@dataclass
class StepReport:
    """What one optimizer step did.

    step: 0-based. applied: whether the update was made (not, where the gradient was not finite).
    grad_norm: global 2-norm before clipping.
    """

    step: int
    applied: bool
    grad_norm: float
    lr: float
    lr_full_rank: float
    reinit: ReinitReport | None = None


class ReplicaMismatch(RuntimeError):
    """Ranks that should hold the same weights do not."""


class Engine(Protocol):
    """One way of taking steps."""

    controller: Controller
    device: torch.device
    ranks: Ranks

    @property
    def network(self) -> nn.Module:
        """The converted model itself."""

    @property
    def step_index(self) -> int:
        """Optimizer steps taken or skipped so far; also the index of the step under way."""

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for one micro-batch."""

    def backward(self, loss: Tensor) -> Any:
        """Back-propagates the mean loss of one micro-batch; the engine divides by the accumulation steps."""

    def step(self) -> StepReport | None:
        """Ends a micro-batch. Returns a report when it was the last of the step."""

    def evaluating(self, *, alone: bool) -> AbstractContextManager[None]:
        """Within it the network may be run without gradients: by all ranks equally often, or with `alone` by each for
        itself. Collective at both ends."""

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        """This rank's part of a checkpoint's tensors by group: "model", "optimizer", "random". Collective.

        Raises ReplicaMismatch if the ranks do not hold the same model.
        """

    def saved_state(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON; the same on all ranks. Collective."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes back what `saved_tensors` and `saved_state` of any engine, on any number of ranks, gave. Collective."""

    def masters(self) -> dict[str, Tensor]:
        """On rank 0 the float32 master copies by parameter name, none for parameters that have no copy. Collective."""

    def release(self, *, keep: bool = True) -> None:
        """Frees optimizer states and masters; there is no step to take afterwards. Rank 0 has the model, if it is to
        `keep` it. Collective."""
