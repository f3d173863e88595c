"""The loss of a batch and the loss over held-out examples, defined once for training, evaluation and export.

Perplexity here is exp(summed negative log-likelihood / number of predicted tokens). (The family of repositories this
method comes from divides by one batch too many, which flatters it; ALGORITHM.md, "Results to stand beside".)

Beside the loss there may be scores: of a model's outputs (`Scorer`: accuracy and its like), or of what it generates
(`Evaluator.answers`: exact match).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loqt_ds.data import ValidationSet
from loqt_ds.method import head
from loqt_ds.ranks import ALONE, Ranks

Tick = Callable[[int, int], None]
"""(done, of how many) of something that takes long."""


def model_inputs(batch: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """(arguments of the model's forward, targets) of a batch of the data room, moved to the device. What begins with an
    underscore is for scorers, not for the model."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if not name.startswith("_")}
    targets = moved.pop("targets")
    return moved | {"use_cache": False}, targets


def num_predicted(batch: dict[str, Tensor]) -> int:
    """How many targets of a batch are predicted: tokens, or rows with a class or a number."""
    targets = batch["targets"]
    if targets.is_floating_point():  # numbers, of which none is left out
        return len(targets)
    return int((targets != head.IGNORED).sum())


def summed_loss(model: Any, inputs: dict[str, Any], targets: Tensor) -> Tensor:
    """The loss summed over targets, float32 (negative log-likelihood in nats, or squared error); of a model that
    `head.install` has changed, or of an engine that has one."""
    loss: Tensor = model(**inputs, targets=targets)
    return loss


class Scorer(Protocol):
    """Gathers what scores of a model's outputs are made of; one object an evaluation and rank."""

    def add(self, outputs: Any, batch: dict[str, Tensor]) -> None:
        """Takes in the model's outputs (with `logits`) of a batch, which is on the CPU."""

    def state(self) -> Any:
        """What this rank has gathered, to be pickled; the scorer is empty afterwards."""

    def result(self, states: Sequence[Any]) -> dict[str, float]:
        """The scores by name, from the states of all ranks."""


@dataclass(frozen=True)
class Evaluation:
    """loss: per target (nats per predicted token or row, or squared error). num_tokens: targets. scores: by name, empty
    where there are none. task: model.task."""

    loss: float
    num_tokens: int
    scores: dict[str, float] = field(default_factory=dict, hash=False)
    task: str = "causal_lm"

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict[str, Any]:
        perplexity = {"perplexity": self.perplexity} if self._is_of_tokens else {}
        return {"loss": self.loss, **perplexity, "num_tokens": self.num_tokens, **self.scores}

    @property
    def _is_of_tokens(self) -> bool:
        return self.task in ("causal_lm", "masked_lm")

    @property
    def unit(self) -> str:
        """What was predicted."""
        return "tokens" if self._is_of_tokens else "rows"

    def metric(self, name: str) -> float:
        """The loss or a score. Raises ValueError, with the names there are, for another name."""
        values = {"loss": self.loss, **self.scores}
        if name not in values:
            raise ValueError(f"eval.metric={name} is no score of this task; there are: {', '.join(values)}")
        return values[name]

    def describe(self) -> str:
        """In one line, for people."""
        perplexity = f", perplexity {self.perplexity:.2f}" if self._is_of_tokens else ""
        scores = "".join(f", {name} {value:.4f}" for name, value in self.scores.items())
        return f"validation loss {self.loss:.4f}{perplexity}{scores}"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    *,
    task: str = "causal_lm",
    scorer: Scorer | None = None,
    ranks: Ranks = ALONE,
    tick: Callable[[], None] | None = None,
) -> Evaluation:
    """Loss per target over all batches, and scores, in evaluation mode; the mode before is restored.

    Args:
        model: one that `head.install` has not changed yet is changed, for `task`.
        batches: the same on all ranks; each takes its share of them. The result is the same on all.
        scorer: sees the outputs of every batch.
        tick: called after each batch of this rank, for progress.
    """
    if not head.is_installed(model):
        head.install(model, task=task)
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for batch, is_own in _share(batches, ranks):
            inputs, targets = model_inputs(batch, device)
            if scorer is None:
                loss = summed_loss(model, inputs, targets)
            else:
                del inputs["use_cache"]  # what is scored is no decoder's
                outputs = model(**inputs)
                loss = head.loss_of_outputs(outputs, targets, task)
                if is_own:
                    scorer.add(outputs, batch)
            if is_own:
                total += loss.double()
                count += num_predicted(batch)
            if tick is not None:
                tick()
    finally:
        model.train(was_training)
    # Added up in the order of ranks by each of them: all get the same bits.
    parts = ranks.gather_objects((float(total), count, None if scorer is None else scorer.state()))
    summed, count = sum(part for part, _, _ in parts), sum(part for _, part, _ in parts)
    if count == 0:
        raise ValueError("there is no token to evaluate on; give more validation text (data.validation_fraction)")
    scores = {} if scorer is None else scorer.result([state for _, _, state in parts])
    return Evaluation(summed / count, count, scores, task)


def _share(batches: Iterable[dict[str, Tensor]], ranks: Ranks) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """(batch, whether it counts) for this rank: as many on each, since sharded models are run by all ranks together.
    Where there are no more batches than for some, the others run one of these for nothing."""
    rest = iter(batches)
    while together := list(islice(rest, ranks.world_size)):
        is_own = ranks.rank < len(together)
        yield together[ranks.rank if is_own else 0], is_own


@dataclass(frozen=True)
class Evaluator:
    """How a run evaluates: the model in training and the one that was exported alike.

    micro_batch_size: rows of a forward pass. max_tokens: as of `ValidationSet.batches`. scorer: makes one for each
    evaluation. answers: scores of what the model generates, (model, ranks, tick) -> by name; collective.
    """

    validation: ValidationSet
    micro_batch_size: int
    device: torch.device
    max_tokens: int | None = None
    task: str = "causal_lm"
    scorer: Callable[[], Scorer] | None = None
    answers: Callable[[nn.Module, Ranks, Tick | None], dict[str, float]] | None = None

    def __call__(self, model: nn.Module, *, ranks: Ranks = ALONE, tick: Tick | None = None) -> Evaluation:
        """Of a model on the device. Collective; the same on all ranks. `tick` is for answers, which take long."""
        batches = self.validation.batches(self.micro_batch_size, self.max_tokens)
        scorer = None if self.scorer is None else self.scorer()
        result = evaluate(model, batches, self.device, task=self.task, scorer=scorer, ranks=ranks)
        if self.answers is None:
            return result
        scores = self.answers(model, ranks, tick)
        return replace(result, scores=result.scores | scores)
