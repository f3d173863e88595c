"""What a step that re-initializes has in hand: gradients on their way to P, and P on its way to a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loqt_ds.core.quantization import Packed
from loqt_ds.method.reports import Clock, LayerReport
from loqt_ds.ranks import Work

NUM_PROBES = 8  # Gaussian columns that a sketch's energy is measured on


@dataclass
class Gathered:
    """One layer's share of the gradient, summed over the micro-batches of a step, then over the ranks."""

    total: Tensor  # A (k, l) in float32, or A [Ω, Z] (k, c + q) in the dtype of B
    columns: Tensor | None  # [Ω, Z] (l, c + q) of a sketch, on ranks that have met the layer
    is_sketch: bool
    num_tokens: int = 0  # rows the sum came from: A has at most this rank
    reduction: Work | None = None  # the sum over the ranks, once it is under way

    def sketch(self) -> Tensor:
        """What P is found from: A, or A Ω."""
        return self.total[:, :-NUM_PROBES] if self.is_sketch else self.total

    def probed(self) -> Tensor:
        """What P's energy is measured on: A, or A Z."""
        return self.total[:, -NUM_PROBES:] if self.is_sketch else self.total


@dataclass
class Pending:
    """A new P, waiting for the layer's update."""

    packed_p: Packed | None
    report: LayerReport


@dataclass
class Step:
    """The step under way."""

    step: int
    due: bool
    gathered: dict[str, Gathered] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)  # layers whose gradient of this step is whole
    num_reducing: int = 0  # layers, in the order of reductions, whose sum over the ranks was started
    pending: dict[str, Pending] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
