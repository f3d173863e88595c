"""What a re-initialization did to the layers, and how long its parts took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class LayerReport:
    """What one re-initialization did to one layer."""

    name: str
    kept: str | None = None  # why the layer kept its P, if it did
    method: str = ""
    started_at_random: bool = False  # for want of a gradient, where there was no P to keep
    captured_energy: float = math.nan
    error_before: float = math.nan  # ‖W − quantized W‖/‖W‖
    error_after: float = math.nan  # ‖W − W_eff‖/‖W‖
    num_from_previous: int = 0  # columns of P taken from the old P, for want of rank
    num_random: int = 0


@dataclass
class ReinitReport:
    """One re-initialization of the whole model."""

    step: int
    seconds: dict[str, float]  # by part, on this rank; what a GPU has still to do is in the part that waits for it
    layers: list[LayerReport]

    def summary(self) -> dict[str, Any]:
        """What a log line shows: means over the layers that changed, and counts."""
        changed = [layer for layer in self.layers if layer.kept is None]

        def mean(values: list[float]) -> float | None:
            known = [value for value in values if not math.isnan(value)]
            return sum(known) / len(known) if known else None

        return {
            "num_layers": len(changed),
            "num_kept": len(self.layers) - len(changed),
            "num_started_at_random": sum(layer.started_at_random for layer in changed),
            "captured_energy": mean([layer.captured_energy for layer in changed]),
            "error_before": mean([layer.error_before for layer in changed]),
            "error_after": mean([layer.error_after for layer in changed]),
            "num_from_previous": sum(layer.num_from_previous for layer in changed),
            "num_random": sum(layer.num_random for layer in changed),
            "seconds": sum(self.seconds.values()),
        }

    def record(self) -> dict[str, Any]:
        """The JSON event: the summary, the time by part and each layer's numbers."""
        layers = [asdict(layer) for layer in self.layers]
        return self.summary() | {"seconds_by_part": self.seconds, "layers": layers}


class Clock:
    """Wall time by part. A part within another one stops the outer one's time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done in the context is this part's."""
        self._add()
        self._open.append(name)
        try:
            yield
        finally:
            self._add()
            self._open.pop()

    def _add(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
