"""Re-initialization: when it is due, what the layers hand over, and what happens to W, P and B.

It rides on an ordinary step (ALGORITHM.md, "Re-initialization"; ARCHITECTURE.md). The engine calls, in this order,

    begin_step(step, num_micro_batches)      before the first forward; taps the layers if a re-initialization is due
    begin_micro_batch(index)                 before each forward
    gradient_complete(name)                  when a layer's gradient of the last micro-batch is there: G or its sketch
                                             becomes the new P (packed, 4 bits) and is let go
    apply(name)                              after the layer's update: merge, quantize, compensate
    end_step(applied)                        applies what has not been applied, or drops it if no update was made

so that gradients of two layers are never alive together when there is one micro-batch, and merged weights never.
The gradient is the one at the effective weight before the update; the merged weight is one update newer (harmless).

The exact and Gram methods sum G = Σ dYᵀX in float32. The sketch sums S = A Ω (k, r + p) only, A being G or its
transpose, Ω = orth([M, N]) with M the first moment of B and N Gaussian: G is linear in the data, so it never exists.
The energy P captures is exact where G is there; for a sketch it is estimated from eight Gaussian probe columns
Z that P never saw, ‖PᵀAZ‖² / ‖AZ‖². The first time there is no moment: Ω then starts from r + p Gaussian columns and
iterates on the first micro-batch's gradient. Ω is kept for the step: made anew it would cost a QR in each micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loqt_ds.config import LoQTConfig
from loqt_ds.core.compensation import compensate
from loqt_ds.core.quantization import Packed, dequantize, quantize
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.core.subspace import (
    Completed,
    captured_energy,
    complete_basis,
    decompose,
    layer_seed,
    overlap,
    power_iterate,
    probe_matrix,
    project_moments,
    test_matrix,
)
from loqt_ds.method.linear import LoQTLinear

NUM_PROBES = 8  # Gaussian columns that a sketch's energy is measured on
FIRST_POWER_ITERATIONS = 2
AUTO_GRAM_LIMIT = 512  # loqt.subspace=auto: Gram up to this smaller side, the sketch above


def subspace_method(layer: LoQTLinear, subspace: str) -> str:
    """How the P of a layer is found: `loqt.subspace`, with auto decided by the layer's smaller side."""
    if subspace != "auto":
        return subspace
    return "gram" if layer.basis_shape[0] <= AUTO_GRAM_LIMIT else "sketch"


class FactorStore(Protocol):
    """Where the trained factors and their optimizer states live; tensors are shaped like B, in float32."""

    def read(self, name: str) -> Tensor:
        """B of a layer in the precision of its master copy."""

    def write(self, name: str, value: Tensor) -> None:
        """Sets B and its master copy."""

    def moments(self, name: str) -> tuple[Tensor, Tensor] | None:
        """First and second moment of B, or None where the optimizer has none yet."""

    def set_moments(self, name: str, first: Tensor, second: Tensor) -> None:
        """Overwrites both moments; the step count stays."""

    def reset_moments(self, name: str) -> None:
        """Makes the optimizer's state of B that of a new parameter."""


@dataclass
class LayerReport:
    """What one re-initialization did to one layer."""

    name: str
    kept: str | None = None  # why the layer kept its P, if it did
    method: str = ""
    captured_energy: float = math.nan
    error_before: float = math.nan  # ‖W − quantized W‖/‖W‖
    error_after: float = math.nan  # ‖W − W_eff‖/‖W‖
    num_from_previous: int = 0  # columns of P taken from the old P, for want of rank
    num_random: int = 0


@dataclass
class ReinitReport:
    """One re-initialization of the whole model."""

    step: int
    seconds: float
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
            "captured_energy": mean([layer.captured_energy for layer in changed]),
            "error_before": mean([layer.error_before for layer in changed]),
            "error_after": mean([layer.error_after for layer in changed]),
            "num_from_previous": sum(layer.num_from_previous for layer in changed),
            "num_random": sum(layer.num_random for layer in changed),
            "seconds": self.seconds,
        }

    def record(self) -> dict[str, Any]:
        """The JSON event: the summary and each layer's numbers."""
        return self.summary() | {"layers": [asdict(layer) for layer in self.layers]}


@dataclass
class _Accumulated:
    """One layer's share of the gradient, summed over the micro-batches of a step."""

    total: Tensor  # A (k, l) in float32, or A [Ω, Z] (k, c + q) in the dtype of the gradient
    columns: Tensor | None  # [Ω, Z] (l, c + q) of a sketch
    num_tokens: int = 0  # rows the sum came from: A has at most this rank

    def sketch(self) -> Tensor:
        """What P is found from: A, or A Ω."""
        return self.total if self.columns is None else self.total[:, :-NUM_PROBES]

    def probed(self) -> Tensor:
        """What P's energy is measured on: A, or A Z."""
        return self.total if self.columns is None else self.total[:, -NUM_PROBES:]


@dataclass
class _Pending:
    """A new P, waiting for the layer's update."""

    packed_p: Packed | None
    report: LayerReport


@dataclass
class _Step:
    """The step under way."""

    step: int
    num_micro_batches: int
    due: bool
    micro_batch: int = 0
    accumulated: dict[str, _Accumulated] = field(default_factory=dict)
    pending: dict[str, _Pending] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0


class Controller:
    """Owns the re-initializations of a model's layers.

    Args:
        layers: the LoQT layers by name.
        options: the method's section of the configuration.
        store: reads and writes B and its optimizer state.
        original: (name) -> original weight (out, in) for the first initialization of a layer; None: the quantized
            weight is all there is.
        seed: of the Gaussian columns and of random basis columns. No global random number is ever drawn.
    """

    def __init__(
        self,
        layers: dict[str, LoQTLinear],
        options: LoQTConfig,
        store: FactorStore,
        *,
        original: Callable[[str], Tensor] | None,
        seed: int,
    ) -> None:
        self.layers, self.options, self.store = layers, options, store
        self.schedule = ReinitSchedule(options.schedule, options.interval, options.growth, options.max_gap)
        self._original, self._seed = original, seed
        self._initialized: set[str] = set()
        self._overdue = False
        self._current: _Step | None = None

    # ---------------------------------------------------------------- the step

    @property
    def active(self) -> bool:
        """Whether the step under way ends in a re-initialization."""
        return self._current is not None and self._current.due

    def method(self, layer: LoQTLinear) -> str:
        """exact, gram or sketch, for this layer."""
        return subspace_method(layer, self.options.subspace)

    def begin_step(self, step: int, num_micro_batches: int) -> None:
        """Starts step `step` (0-based). Taps every layer if the schedule, or a skipped step before, asks for it."""
        due = self.schedule.is_due(step) or self._overdue
        self._current = _Step(step, num_micro_batches, due)
        if due:
            for name, layer in self.layers.items():
                layer.tap = self._tap(name, layer)

    def begin_micro_batch(self, index: int) -> None:
        """Announces micro-batch `index` (0-based) of the step."""
        assert self._current is not None
        self._current.micro_batch = index

    @property
    def in_last_micro_batch(self) -> bool:
        """Whether the gradients formed now complete the step's."""
        return self._current is not None and self._current.micro_batch == self._current.num_micro_batches - 1

    def _tap(self, name: str, layer: LoQTLinear) -> Callable[[Tensor, Tensor], None]:
        """The function a tapped layer calls in its backward with dY (T, out) and X (T, in)."""
        sketched = self.method(layer) == "sketch"

        @torch.no_grad()
        def tap(dy: Tensor, x: Tensor) -> None:
            current = self._current
            assert current is not None
            started = time.perf_counter()
            inner, outer = (x, dy) if layer.side == "right" else (dy, x)  # (T, k), (T, l)
            gathered = current.accumulated.get(name)
            if gathered is None:
                columns = self._columns(name, layer, inner, outer) if sketched else None
                width = layer.factor_length if columns is None else columns.shape[1]
                # Sums of sketches lose nothing measurable in bf16; a dense gradient is wanted exactly.
                dtype = torch.float32 if columns is None else inner.dtype
                total = torch.zeros(layer.basis_shape[0], width, device=inner.device, dtype=dtype)
                gathered = current.accumulated[name] = _Accumulated(total, columns)
            gathered.num_tokens += len(inner)
            if gathered.columns is None:
                # float32: products of bf16 gradients would be rounded to bf16 before they are summed.
                gathered.total.addmm_(inner.float().t(), outer.float())
            else:
                gathered.total += inner.t() @ (outer @ gathered.columns)
            current.seconds += time.perf_counter() - started

        return tap

    def _layer_seed(self, name: str) -> int:
        assert self._current is not None
        return layer_seed(self._seed, self._current.step, name)

    def _columns(self, name: str, layer: LoQTLinear, inner: Tensor, outer: Tensor) -> Tensor:
        """[Ω, Z] (l, c + q) in the dtype of the gradient: made in the first micro-batch and kept for the step."""
        moments = self.store.moments(name) if name in self._initialized else None
        num_gaussian = self.options.sketch_oversampling + (layer.rank if moments is None else 0)
        omega = test_matrix(
            length=layer.factor_length,
            moment=None if moments is None else layer.canonical(moments[0]),
            num_gaussian=num_gaussian,
            seed=self._layer_seed(name),
            device=layer.B.device,
        ).to(outer.dtype)
        if moments is None:
            # Nothing to start from: iterate on this micro-batch's gradient, which need not be formed for it.
            omega = power_iterate(omega, inner, outer, iterations=FIRST_POWER_ITERATIONS)
        probes = probe_matrix(
            length=layer.factor_length,
            num_probes=NUM_PROBES,
            seed=self._layer_seed(name + "/probes"),
            device=layer.B.device,
        )
        return torch.cat([omega, probes.to(outer.dtype)], dim=1)

    # ---------------------------------------------------------------- from G to P

    @torch.no_grad()
    def gradient_complete(self, name: str) -> None:
        """Turns what the layer's taps gathered into its next P, and lets it go. Does nothing in ordinary steps."""
        current = self._current
        if current is None or not current.due or name in current.pending:
            return
        started = time.perf_counter()
        layer = self.layers[name]
        layer.tap = None
        gathered = current.accumulated.pop(name, None)
        report = LayerReport(name)
        packed = self._next_basis(name, layer, gathered, report)
        current.pending[name] = _Pending(packed, report)
        current.seconds += time.perf_counter() - started

    def _next_basis(
        self, name: str, layer: LoQTLinear, gathered: _Accumulated | None, report: LayerReport
    ) -> Packed | None:
        """P (k, r), packed; None where the layer keeps the one it has."""
        first = name not in self._initialized
        seed = self._layer_seed(name + "/basis")
        full: Completed | None = None
        if gathered is None:
            report.kept = "no gradient reached the layer"
        elif not torch.isfinite(gathered.total).all():
            report.kept = "the gradient is not finite"
        elif not gathered.total.any():
            report.kept = "the gradient is zero"
        else:
            try:
                basis, report.method = decompose(gathered.sketch(), layer.rank, self.method(layer))
                previous = None if first else layer.basis_hat()
                # A sketch rounded to bf16 hides that its gradient has no more rank than tokens.
                vectors = basis.vectors[:, : gathered.num_tokens]
                full = complete_basis(vectors, layer.rank, previous=previous, seed=seed)
            except torch.linalg.LinAlgError as error:
                report.kept = f"the decomposition failed: {error}"
            else:
                report.captured_energy = captured_energy(gathered.probed(), full.vectors)
        if full is None:
            if not first:
                return None
            # A layer without any P would learn nothing until the next time: it starts from a random basis.
            report.method, report.kept = f"random ({report.kept})", None
            nothing = torch.zeros(layer.basis_shape[0], 0, device=layer.B.device)
            full = complete_basis(nothing, layer.rank, previous=None, seed=seed)
        report.num_from_previous, report.num_random = full.num_from_previous, full.num_random
        return quantize(full.vectors, layer.spec_p)

    # ---------------------------------------------------------------- from P to W, B

    @torch.no_grad()
    def apply(self, name: str) -> None:
        """Merges, quantizes and compensates one layer whose update has been made."""
        current = self._current
        if current is None or name not in current.pending:
            return
        started = time.perf_counter()
        layer = self.layers[name]
        pending = current.pending.pop(name)
        current.reports.append(pending.report)
        if pending.packed_p is not None:
            self._rebuild(name, layer, pending.packed_p, pending.report)
        current.seconds += time.perf_counter() - started

    def _rebuild(self, name: str, layer: LoQTLinear, packed_p: Packed, report: LayerReport) -> None:
        first = name not in self._initialized
        if first and self._original is not None:
            weight = self._original(name).to(device=layer.B.device, dtype=torch.float32)
        else:
            weight = layer.effective_weight(layer.canonical(self.store.read(name)))
        new_hat = dequantize(packed_p, layer.basis_shape, layer.spec_p)
        if not first and self.options.optimizer_state == "project":
            self._project_moments(name, layer, new_hat)
        elif first or self.options.optimizer_state == "reset":
            # The first time, B has only seen a step without P: its state is that of a new parameter.
            self.store.reset_moments(name)
        result = compensate(
            weight,
            new_hat,
            side=layer.side,
            scale=layer.scale,
            iterations=self.options.compensation_steps,
            spec=layer.spec_w,
        )
        layer.set_w(result.packed)
        layer.set_p(packed_p)
        self.store.write(name, layer.canonical(result.factor))
        report.error_before, report.error_after = result.error_before, result.error_after
        self._initialized.add(name)

    def _project_moments(self, name: str, layer: LoQTLinear, new_hat: Tensor) -> None:
        moments = self.store.moments(name)
        if moments is None:
            return
        between = overlap(layer.basis_hat(), new_hat)  # (r, r)
        first, second = project_moments(layer.canonical(moments[0]), layer.canonical(moments[1]), between)
        self.store.set_moments(name, layer.canonical(first), layer.canonical(second))

    def end_step(self, applied: bool) -> ReinitReport | None:
        """Ends the step. If its update was applied, every layer that still waits is re-initialized now; if it was
        skipped, what was gathered is dropped and the re-initialization stays due for the next step.

        Returns a report if a re-initialization took place.
        """
        current = self._current
        assert current is not None
        report = None
        if current.due:
            if applied:
                for name in self.layers:
                    if not any(done.name == name for done in current.reports):
                        self.gradient_complete(name)
                        self.apply(name)
                report = ReinitReport(current.step, current.seconds, current.reports)
            self._overdue = not applied
            for layer in self.layers.values():
                layer.tap = None
        self._current = None
        return report

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """JSON: which layers have a P, and whether a skipped step left a re-initialization due."""
        return {
            "initialized": sorted(self._initialized),
            "overdue": self._overdue,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self._initialized = set(state["initialized"])
        self._overdue = bool(state["overdue"])
