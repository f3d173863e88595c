"""The loss of a batch and the loss over held-out documents, defined once for training, evaluation and export.

Perplexity here is exp(summed negative log-likelihood / number of predicted tokens). (The family of repositories this
method comes from divides by one batch too many, which flatters it; ALGORITHM.md, "Results to stand beside".)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.method import head
from loqt_ds.ranks import ALONE, Ranks


def model_inputs(batch: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """(arguments of the model's forward, targets (b, s)) of a batch of the data room, moved to the device."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    targets = moved.pop("targets")
    return moved | {"use_cache": False}, targets


def num_predicted(batch: dict[str, Tensor]) -> int:
    """How many tokens of a batch are predicted."""
    return int((batch["targets"] != head.IGNORED).sum())


def summed_loss(model: Any, inputs: dict[str, Any], targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over predicted tokens, float32; of a model that `head.install` has
    changed, or of an engine that has one."""
    loss: Tensor = model(**inputs, targets=targets)
    return loss


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per predicted token. num_tokens: predicted tokens."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict[str, Any]:
        return {"loss": self.loss, "perplexity": self.perplexity, "num_tokens": self.num_tokens}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    *,
    ranks: Ranks = ALONE,
    tick: Callable[[], None] | None = None,
) -> Evaluation:
    """Loss per predicted token over all batches, in evaluation mode; the mode before is restored.

    Args:
        model: a causal language model; one that `head.install` has not changed yet is changed.
        batches: the same on all ranks; each takes its share of them. The result is the same on all.
        tick: called after each batch of this rank, for progress.
    """
    if not head.is_installed(model):
        head.install(model)
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for batch in islice(batches, ranks.rank, None, ranks.world_size):
            inputs, targets = model_inputs(batch, device)
            total += summed_loss(model, inputs, targets).double()
            count += num_predicted(batch)
            if tick is not None:
                tick()
    finally:
        model.train(was_training)
    # Added up in the order of ranks by each of them: all get the same bits.
    parts = ranks.gather_objects((float(total), count))
    summed, count = sum(part for part, _ in parts), sum(part for _, part in parts)
    if count == 0:
        raise ValueError("there is no token to evaluate on; give more validation text (data.validation_fraction)")
    return Evaluation(summed / count, count)
