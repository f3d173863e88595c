"""What the loop asks of an engine.

The protocol has the shape of a DeepSpeed engine: call it for the model's output, `backward(loss)`, `step()`, all three
once per micro-batch; the update happens in the last `step()` of an accumulation. Nothing else of how a step is taken,
or where the trained state lives, is visible to the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.method.controller import Controller, ReinitReport


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


class Engine(Protocol):
    """One way of taking steps."""

    controller: Controller
    device: torch.device
    rank: int
    world_size: int

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

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint by group: "model", "optimizer", "random"."""

    def saved_state(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes back what `saved_tensors` and `saved_state` gave."""

    def masters(self) -> dict[str, Tensor]:
        """The float32 master copies by parameter name; none for parameters that have no copy."""

    def release(self) -> None:
        """Frees optimizer states and masters; afterwards there is only the model left, and no step to take."""
