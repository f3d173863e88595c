"""Re-initialization: when it is due, what the layers hand over, and what happens to W, P and B.

It rides on an ordinary step (ALGORITHM.md, "Re-initialization"; ARCHITECTURE.md). The engine calls, in this order,

    begin_step(step)                         before the first forward; taps the layers if a re-initialization is due
    gradient_complete(name)                  when a layer's gradient of the last micro-batch is there
    apply(name)                              after the layer's update, where layers are updated one by one
    end_step(applied)                        re-initializes what has not been, or drops it if no update was made

One process: `gradient_complete` turns what the layer gathered into its next P (packed, 4 bits) and lets it go, so that
gradients of two layers are never alive together when there is one micro-batch. Several: each layer has an owner, and
`gradient_complete` starts the sum over the ranks to it, which overlaps the rest of the backward. After the update the
owners, one layer each at a time, find P, merge, quantize and compensate in parallel, and broadcast the bytes of W and P
and the new B. Sums and broadcasts are issued in an order that depends on nothing but the model.
The gradient is the one at the effective weight before the update; the merged weight is one update newer (harmless).

The exact, Gram and iterated methods sum G = Σ dYᵀX in float32. The sketch sums S = A Ω (k, r + p) only, A being G or
its transpose: G is linear in the data, so it never exists. Ω comes from Gaussian columns by power iterations on the
gradient of the first micro-batch, of all ranks together, and is kept for the step. (Several ranks must therefore meet
their layers in the same order in that backward, as ZeRO's own reductions ask for.) The energy P captures is exact where
G is there; for a sketch it is estimated from eight Gaussian probe columns Z that P never saw, ‖PᵀAZ‖² / ‖AZ‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from loqt_ds.config import LoQTConfig
from loqt_ds.core.compensation import Compensated, compensate
from loqt_ds.core.quantization import dequantize, quantize
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.core.subspace import (
    POWER_ITERATIONS,
    Basis,
    Completed,
    captured_energy,
    complete_basis,
    decompose,
    layer_seed,
    orthonormal,
    overlap,
    power_iterate,
    probe_matrix,
    project_moments,
    squared_norm,
    test_matrix,
)
from loqt_ds.method.gathered import NUM_PROBES, Gathered, Pending, Step
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.method.reports import LayerReport, ReinitReport
from loqt_ds.method.stores import FactorStore, PackedStore, ReplicatedPacked
from loqt_ds.ranks import ALONE, Ranks

# loqt.subspace=auto: up to this smaller side of the whole gradient, above of a sketch.
AUTO_WHOLE_LIMIT = 512
# Of the whole gradient by Gram, in float64, where that takes milliseconds; by subspace iteration, in float32, above
# this smaller side, if the rank is no more than this part of it.
AUTO_GRAM_LIMIT = 128
AUTO_ITERATED_SHARE = 0.5
# Values of loqt.optimizer_state with which a re-initialization reads the moments of B and writes others.
CARRIED = ("project", "transport")


def sketch_columns(layer: LoQTLinear, oversampling: int) -> int:
    """Columns of Ω, whatever it is made from: A has no more rank than its smaller side."""
    return min(*layer.weight_shape, layer.rank + oversampling)


def subspace_method(layer: LoQTLinear, subspace: str, world_size: int = 1) -> str:
    """How the P of a layer is found, by that many ranks: `loqt.subspace`, with auto decided by the layer's smaller side
    and rank, and for experts by the ranks: these have tokens for different experts, and a sketch is agreed upon where
    it is taken."""
    if subspace != "auto":
        return subspace
    smaller = layer.basis_shape[0]
    if smaller > AUTO_WHOLE_LIMIT:
        return "iterated" if layer.is_conditional and world_size > 1 else "sketch"
    is_small = smaller <= AUTO_GRAM_LIMIT or layer.rank > AUTO_ITERATED_SHARE * smaller
    return "gram" if is_small else "iterated"


def assign_owners(costs: dict[str, float], world_size: int) -> dict[str, int]:
    """Which rank re-initializes which layer: the costliest first, each to the rank with the least to do so far."""
    load = [0.0] * world_size
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable, so that all ranks agree
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return owners


def check_experts(options: LoQTConfig, experts: Iterable[str], world_size: int) -> None:
    """Raises ValueError if that many ranks cannot find the P of `experts`, the names of those that are adapted."""
    name = next(iter(experts), None)
    if name is not None and options.subspace == "sketch" and world_size > 1:
        raise ValueError(
            f"loqt.subspace=sketch with {world_size} ranks needs every rank to have tokens for every layer, which "
            f"experts ({name}) do not promise; use loqt.subspace=iterated, or auto, which takes that for experts"
        )


class Controller:
    """Owns the re-initializations of a model's layers.

    Args:
        layers: the LoQT layers by name.
        options: the method's section of the configuration.
        store: reads and writes B and its optimizer state.
        original: (name) -> original weight (out, in) for the first initialization of a layer, asked for by the layer's
            owner only; None: the quantized weight is all there is.
        seed: of the Gaussian columns and of random basis columns. No global random number is ever drawn.
        ranks: the processes that train the same layers and take the same steps.
        packed: reads and writes W and P; None: every rank has all of them.
        dtype: of gradients; None: that of B.
    """

    def __init__(
        self,
        layers: dict[str, LoQTLinear],
        options: LoQTConfig,
        store: FactorStore,
        *,
        original: Callable[[str], Tensor] | None,
        seed: int,
        ranks: Ranks = ALONE,
        packed: PackedStore | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.layers, self.options, self.store, self.ranks = layers, options, store, ranks
        self.packed = ReplicatedPacked(layers, ranks) if packed is None else packed
        self._dtype = dtype
        check_experts(options, (name for name, layer in layers.items() if layer.is_conditional), ranks.world_size)
        self.schedule = ReinitSchedule(options.schedule, options.interval, options.growth, options.max_gap)
        costs = {name: self._cost(layer) for name, layer in layers.items()}
        self.owners = assign_owners(costs, ranks.world_size)
        self._rounds = self._make_rounds(costs)
        self._order = list(reversed(layers))  # of reductions: about that of the backward
        self._original, self._seed = original, seed
        self._let_go = False  # whether there were original weights and are no more
        self._initialized: set[str] = set()
        self._overdue = False
        self._current: Step | None = None

    def _cost(self, layer: LoQTLinear) -> float:
        """Operations of a re-initialization, about: decomposition, merge, compensation."""
        (k, r), length = layer.basis_shape, layer.factor_length
        columns, method = sketch_columns(layer, self.options.sketch_oversampling), self.method(layer)
        if method == "sketch":
            found = k * columns * columns
        elif method == "iterated":
            found = k * columns * (length + columns) * (2 * POWER_ITERATIONS + 1)
        else:
            found = k * k * (k + length)
        return float(found + k * length * r * (2 + 2 * self.options.compensation_steps))

    def _make_rounds(self, costs: dict[str, float]) -> list[list[str]]:
        """Layers that are re-initialized at the same time, at most one of each owner; costly ones together."""
        queues: list[list[str]] = [[] for _ in range(self.ranks.world_size)]
        for name in sorted(self.layers, key=lambda name: -costs[name]):
            queues[self.owners[name]].append(name)
        longest = max(map(len, queues), default=0)
        return [[queue[i] for queue in queues if i < len(queue)] for i in range(longest)]

    # ---------------------------------------------------------------- the step

    @property
    def active(self) -> bool:
        """Whether the step under way ends in a re-initialization."""
        return self._current is not None and self._current.due

    def method(self, layer: LoQTLinear) -> str:
        """exact, gram, iterated or sketch, for this layer."""
        return subspace_method(layer, self.options.subspace, self.ranks.world_size)

    def begin_step(self, step: int) -> None:
        """Starts step `step` (0-based). Taps every layer if the schedule, or a skipped step before, asks for it."""
        due = self.schedule.is_due(step) or self._overdue
        self._current = Step(step, due)
        if due:
            for name, layer in self.layers.items():
                layer.tap = self._tap(name, layer)

    def _tap(self, name: str, layer: LoQTLinear) -> Callable[[Tensor, Tensor], None]:
        """The function a tapped layer calls in its backward with dY (T, out) and X (T, in)."""

        @torch.no_grad()
        def tap(dy: Tensor, x: Tensor) -> None:
            current = self._current
            assert current is not None
            with current.clock.part("gather"):
                if dy.dtype == torch.float16:  # its range is too small for products of scaled gradients
                    dy, x = dy.float(), x.float()
                inner, outer = (x, dy) if layer.side == "right" else (dy, x)  # (T, k), (T, l)
                gathered = current.gathered.get(name)
                if gathered is None:
                    with current.clock.part("columns"):
                        columns = self._columns(name, layer, inner, outer) if self.method(layer) == "sketch" else None
                    gathered = current.gathered[name] = self._nothing(layer, columns)
                gathered.num_tokens += len(inner)
                if gathered.columns is None:
                    # float32: products of bf16 gradients would be rounded to bf16 before they are summed.
                    gathered.total.addmm_(inner.float().t(), outer.float())
                else:
                    gathered.total += inner.t() @ (outer @ gathered.columns)

        return tap

    def _nothing(self, layer: LoQTLinear, columns: Tensor | None) -> Gathered:
        """An empty sum for a layer; the same shape and dtype on every rank, also where no gradient arrives."""
        sketched = self.method(layer) == "sketch"
        columns_of_omega = sketch_columns(layer, self.options.sketch_oversampling)
        width = columns_of_omega + NUM_PROBES if sketched else layer.factor_length
        # Sums of sketches lose nothing measurable in bf16; a dense gradient is wanted exactly.
        is_bf16 = (layer.B.dtype if self._dtype is None else self._dtype) == torch.bfloat16
        dtype = torch.bfloat16 if sketched and is_bf16 else torch.float32
        total = torch.zeros(layer.basis_shape[0], width, device=layer.B.device, dtype=dtype)
        return Gathered(total, columns, sketched)

    def _layer_seed(self, name: str) -> int:
        assert self._current is not None
        return layer_seed(self._seed, self._current.step, name)

    def _columns(self, name: str, layer: LoQTLinear, inner: Tensor, outer: Tensor) -> Tensor:
        """[Ω, Z] (l, c + q) in the dtype of the gradient: made in the first micro-batch, the same on all ranks."""
        probes = probe_matrix(
            length=layer.factor_length,
            num_probes=NUM_PROBES,
            seed=self._layer_seed(name + "/probes"),
            device=layer.B.device,
        )
        return torch.cat([self._omega(name, layer, inner, outer), probes.to(outer.dtype)], dim=1)

    def _gaussian_omega(self, name: str, layer: LoQTLinear) -> Tensor:
        """The Ω (l, c) that power iterations start from."""
        return test_matrix(
            length=layer.factor_length,
            num_columns=sketch_columns(layer, self.options.sketch_oversampling),
            seed=self._layer_seed(name),
            device=layer.B.device,
        )

    def _omega(self, name: str, layer: LoQTLinear, inner: Tensor, outer: Tensor) -> Tensor:
        """Ω (l, c) in the dtype of the gradient, turned towards the gradient of this micro-batch."""
        owner = self.owners[name]

        def total_orthonormal(columns: Tensor) -> Tensor:
            # By one of them: QR differs between machines, and where there are few tokens it invents directions.
            if (sum_to_owner := self.ranks.reduce(columns, owner)) is not None:
                sum_to_owner.wait()
            columns = orthonormal(columns) if owner == self.ranks.rank else columns
            columns = columns.contiguous()
            self.ranks.broadcast(columns, owner)
            return columns

        return power_iterate(
            self._gaussian_omega(name, layer).to(outer.dtype),
            inner,
            outer,
            iterations=POWER_ITERATIONS,
            total=self.ranks.all_reduce,
            total_orthonormal=total_orthonormal,
        )

    # ---------------------------------------------------------------- from G to P

    @torch.no_grad()
    def gradient_complete(self, name: str) -> None:
        """What the layer's taps gathered is whole: finds its next P, or starts the sum over the ranks. Does nothing in
        ordinary steps."""
        current = self._current
        if current is None or not current.due or name in current.complete:
            return
        current.complete.add(name)
        self.layers[name].tap = None
        if self.ranks.world_size == 1:
            current.pending[name] = self._next_basis(current, name)
        else:
            with current.clock.part("sum"):
                self._start_reductions(current)

    def _start_reductions(self, current: Step) -> None:
        """Starts the sums of layers that are complete, as far as the common order allows, and lets go of those that
        others now have."""
        while current.num_reducing < len(self._order):
            name = self._order[current.num_reducing]
            if name not in current.complete:
                break
            gathered = current.gathered.setdefault(name, self._nothing(self.layers[name], None))
            gathered.reduction = self.ranks.reduce(gathered.total, self.owners[name])
            current.num_reducing += 1
        for name, gathered in list(current.gathered.items()):
            done = gathered.reduction is not None and gathered.reduction.is_completed()
            if done and self.owners[name] != self.ranks.rank:
                gathered.total = gathered.total.new_empty(0)
                gathered.columns = gathered.reduction = None

    @torch.no_grad()
    def backward_complete(self) -> None:
        """The backward of the step's last micro-batch is over: of layers that it did not reach nothing more will come.

        Before anything else is exchanged, every rank has then started the same sums, whichever layers it made use of.
        """
        current = self._current
        if current is not None and current.due and self.ranks.world_size > 1:
            with current.clock.part("sum"):
                self._complete_all(current)

    def _complete_all(self, current: Step) -> None:
        current.complete.update(self.layers)
        self._start_reductions(current)

    def _finish_reductions(self, current: Step) -> None:
        """Every layer's sum is with its owner afterwards; a rank that saw no gradient of a layer adds nothing to it."""
        self._complete_all(current)
        for gathered in current.gathered.values():
            if gathered.reduction is not None:
                gathered.reduction.wait()
        counts = self.ranks.sum_numbers(*(current.gathered[name].num_tokens for name in self.layers))
        for name, count in zip(self.layers, counts, strict=True):
            current.gathered[name].num_tokens = count
            if self.owners[name] != self.ranks.rank or not count:
                del current.gathered[name]

    def _next_basis(self, current: Step, name: str) -> Pending:
        """The next P (k, r) from what was gathered, which goes, packed; none where the layer keeps the one it has."""
        gathered = current.gathered.pop(name, None)
        with current.clock.part("decompose"):
            full, report = self._find_basis(name, gathered)
        if full is None:
            return Pending(None, report)
        with current.clock.part("quantize P"):
            return Pending(quantize(full.vectors, self.layers[name].spec_p), report)

    def _find_basis(self, name: str, gathered: Gathered | None) -> tuple[Completed | None, LayerReport]:
        """The next P (k, r) in float32, and what there is to say about it."""
        layer, report = self.layers[name], LayerReport(name)
        first = name not in self._initialized
        seed = self._layer_seed(name + "/basis")
        full: Completed | None = None
        size = 0.0 if gathered is None else squared_norm(gathered.total)
        if gathered is None:
            report.kept = "no gradient reached the layer"
        elif not math.isfinite(size):
            report.kept = "the gradient is not finite"
        elif size == 0.0:
            report.kept = "the gradient is zero"
        else:
            try:
                basis, report.method = self._decompose(layer, gathered, seed)
                previous = None if first else layer.basis_hat()
                # A sketch rounded to bf16 hides that its gradient has no more rank than tokens.
                vectors = basis.vectors[:, : gathered.num_tokens]
                full = complete_basis(vectors, layer.rank, previous=previous, seed=seed)
            except torch.linalg.LinAlgError as error:
                report.kept = f"the decomposition failed: {error}"
            else:
                if gathered.is_sketch:
                    report.captured_energy = captured_energy(gathered.probed(), full.vectors)
                else:  # directions that the gradient does not have add nothing
                    report.captured_energy = float(basis.values[: gathered.num_tokens].square().sum()) / size
        if full is None and first:
            # A layer without any P would learn nothing until the next time: it starts from a random basis.
            report.method, report.kept, report.started_at_random = f"random ({report.kept})", None, True
            nothing = torch.zeros(layer.basis_shape[0], 0, dtype=torch.float32, device=layer.B.device)
            full = complete_basis(nothing, layer.rank, previous=None, seed=seed)
        if full is not None:
            report.num_from_previous, report.num_random = full.num_from_previous, full.num_random
        return full, report

    def _decompose(self, layer: LoQTLinear, gathered: Gathered, seed: int) -> tuple[Basis, str]:
        """Directions of a layer's gradient, at most its rank, and the method that gave them. Raises LinAlgError."""
        oversampling = self.options.sketch_oversampling
        return decompose(gathered.sketch(), layer.rank, self.method(layer), oversampling=oversampling, seed=seed)

    # ---------------------------------------------------------------- from P to W, B

    @torch.no_grad()
    def apply(self, name: str) -> None:
        """Re-initializes one layer whose update has been made (one process)."""
        current = self._current
        if current is not None and name in current.pending:
            self._reinitialize(current, [name])

    @property
    def _carries_moments(self) -> bool:
        """Whether both moments of B are read and written anew, and not kept as they are or reset."""
        return self.options.optimizer_state in CARRIED

    def _reinitialize(self, current: Step, names: list[str]) -> None:
        """Merges, quantizes and compensates layers of different owners, each on its owner, and installs the results on
        all ranks."""
        with current.clock.part("exchange"):
            self._reinitialize_and_exchange(current, names)

    def _reinitialize_and_exchange(self, current: Step, names: list[str]) -> None:
        part = current.clock.part
        values: dict[str, list[Tensor]] = {}  # B, and both moments if they are to be projected
        factors: dict[str, Tensor | None] = {}
        moments: dict[str, list[Tensor | None]] = {}
        with part("read B"):
            for name in names:
                owner, first = self.owners[name], name not in self._initialized
                factors[name] = None if first and self._original is not None else self.store.read(name, owner)
                if self._carries_moments and not first and self.store.has_moments(name):
                    moments[name] = [self.store.moment(name, index, owner) for index in (0, 1)]
                self.packed.collect(name, owner)
        mine = [name for name in names if self.owners[name] == self.ranks.rank]

        def rebuild() -> list[LayerReport]:
            reports = []
            for name in mine:  # one or none
                pending = current.pending.pop(name, None) or self._next_basis(current, name)
                if pending.packed_p is not None:
                    values[name] = self._rebuild(current, name, pending, factors[name], moments.get(name))
                reports.append(pending.report)
            return reports

        reports = [report for reports in self.ranks.gather(rebuild) for report in reports]
        for report in sorted(reports, key=lambda report: names.index(report.name)):
            current.reports[report.name] = report
            if report.kept is None:
                with part("install"):
                    self._install(report.name, values.get(report.name), projected=report.name in moments)
            self.packed.release(report.name)

    def _rebuild(
        self,
        current: Step,
        name: str,
        pending: Pending,
        factor: Tensor | None,
        moments: list[Tensor | None] | None,
    ) -> list[Tensor]:
        """Sets W and P of a layer on its owner; returns the new B, and moments where they are given, shaped like B."""
        layer, report = self.layers[name], pending.report
        assert pending.packed_p is not None
        with current.clock.part("merge"):
            weight = self._merged(name, factor)
            new_hat = dequantize(pending.packed_p, layer.basis_shape, layer.spec_p)
        carried: list[Tensor] = []
        if moments is not None:
            one, two = (layer.canonical(moment) for moment in moments if moment is not None)
            carried = [layer.canonical(moment) for moment in self._carry_moments(layer, one, two, new_hat)]
            moments.clear()  # the old ones go before compensation needs its memory
            del one, two
        with current.clock.part("compensate"):
            result = self._compensate(name, weight, new_hat)
        layer.set_w(result.packed)
        layer.set_p(pending.packed_p)
        report.error_before, report.error_after = result.error_before, result.error_after
        return [layer.canonical(result.factor), *carried]

    def _merged(self, name: str, factor: Tensor | None) -> Tensor:
        """The weight (out, in) float32 that is quantized next: the effective one, with a `factor` shaped like B; the
        original without."""
        layer = self.layers[name]
        if factor is not None:
            return layer.effective_weight(layer.canonical(factor))
        assert self._original is not None
        return self._original(name).to(device=layer.B.device, dtype=torch.float32)

    def _carry_moments(
        self, layer: LoQTLinear, first: Tensor, second: Tensor, new_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both moments (l, r) for the next P̂, while the layer still has the old one."""
        between = overlap(layer.basis_hat(), new_hat)  # (r, r)
        if self.options.optimizer_state == "project":
            return project_moments(first, second, between)
        return first.float() @ between, second

    def _compensate(self, name: str, weight: Tensor, new_hat: Tensor) -> Compensated:
        """The next W and B of a weight (out, in) and the next P̂, while the layer still has the old ones."""
        layer = self.layers[name]
        return compensate(
            weight,
            new_hat,
            side=layer.side,
            scale=layer.scale,
            iterations=self.options.compensation_steps,
            spec=layer.spec_w,
        )

    def _install(self, name: str, values: list[Tensor] | None, *, projected: bool) -> None:
        """Makes all ranks hold what the owner has made, bit for bit."""
        layer, owner = self.layers[name], self.owners[name]
        self.packed.install(name, owner)
        num_values = 3 if projected else 1
        if values is None:
            # float32: B goes into masters as it was computed.
            blank = torch.empty(layer.B.shape, dtype=torch.float32, device=layer.B.device)
            values = [torch.empty_like(blank) for _ in range(num_values)]
        if self.ranks.world_size > 1:
            values = [value.contiguous() for value in values]
        for value in values:
            self.ranks.broadcast(value, owner)
        if projected:
            self.store.set_moments(name, values[1], values[2])
        elif name not in self._initialized or self.options.optimizer_state == "reset":
            # The first time, B has only seen a step without P: its state is that of a new parameter.
            self.store.reset_moments(name)
        self.store.write(name, values[0])
        self._mark_initialized(name)

    def _mark_initialized(self, *names: str) -> None:
        self._initialized.update(names)
        if len(self._initialized) == len(self.layers) and self._original is not None:
            self._original, self._let_go = None, True  # nothing will be asked for any more

    @torch.no_grad()
    def end_step(self, applied: bool) -> ReinitReport | None:
        """Ends the step. If its update was applied, every layer that still waits is re-initialized now; if it was
        skipped, what was gathered is dropped and the re-initialization stays due for the next step.

        Returns a report if a re-initialization took place; it is the same on all ranks, but for the seconds.
        """
        current = self._current
        assert current is not None
        report = None
        if current.due:
            if self.ranks.world_size > 1:
                with current.clock.part("sum"):
                    self._finish_reductions(current)  # also of a skipped step: ranks may have started different ones
            if applied:
                for names in self._rounds:
                    if waiting := [name for name in names if name not in current.reports]:
                        self._reinitialize(current, waiting)
                layers = [current.reports[name] for name in self.layers]
                report = ReinitReport(current.step, current.clock.seconds, layers)
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

    @torch.no_grad()
    def check_originals(self) -> None:
        """After a checkpoint was loaded: forgets the original weights if they are not those that W was quantized from.
        Collective."""
        if self._original is None:
            return
        num_others = 0
        for name, layer in self.layers.items():
            if name in self._initialized:
                continue
            self.packed.collect(name, self.owners[name])
            if self.owners[name] == self.ranks.rank:
                packed = quantize(self._original(name).to(layer.B.device, torch.float32), layer.spec_w)
                num_others += any(not torch.equal(packed[key], stored) for key, stored in layer.packed_w().items())
            self.packed.release(name)
        if self.ranks.sum_numbers(num_others) != [0]:
            self._original, self._let_go = None, True

    def abandon_step(self) -> None:
        """Takes back `begin_step`, of a step without a gradient."""
        for layer in self.layers.values():
            layer.tap = None
        self._current = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`. Raises ValueError if it is of before the first initialization, and the original
        weights that this would need have been let go."""
        if self._let_go and len(state["initialized"]) < len(self.layers):
            raise ValueError(
                "the checkpoint is of before the first initialization, and this engine has let go of the original "
                "weights that it compensates for; load it into a new engine"
            )
        self._initialized = set()
        self._mark_initialized(*state["initialized"])
        self._overdue = bool(state["overdue"])
