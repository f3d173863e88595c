"""Ideas that may close the gap to full rank, tried without being in the product.

    candidates.install(engine, {"error_feedback": "nf4", "stochastic": "1"})

replaces the controller of an engine on one device, before its first step. What a run names
`loqt:32+candidate.error_feedback=nf4+candidate.stochastic=1` comes here. Every candidate is off by default, and they
can be combined; W, P, B, s and F (the factor: B, or its transpose) are those of `loqt_ds.core.subspace`.

error_feedback=nf4|fp32   What one re-initialization loses is added to W at the next: R = W − W_q − s (P̂, B₀), what
    neither the codes nor the compensation B₀ hold, is kept in NF4 or in float32, and then W ← W_q + s (P̂, B) + R. An
    update too small to move a code adds up until it does, as in 1-bit SGD (Seide et al., Interspeech 2014).
stochastic=1   The last rounding of W picks one of the two neighbouring codes at random, so that the mean is W; B is
    found after it. Seeded by (seed, step, layer). What moves a weight by a tenth of a step then moves one in ten.
fisher=g|x|b   Compensation makes Σ F_ij e_ij² smallest, e the error and F the diagonal Fisher information as a product
    of rows and columns, in place of Σ e_ij²: least squares stays closed (LoQT, arXiv 2405.16528, names this as future
    work). Only the weights along P's side change B; those along the other side change which iterate is kept, and the
    scales of absmax=search. g: mean squares of the rows and columns of G (of a sketch's probes, rows of P's side only);
    x: mean squares over tokens of the layer's inputs and of the gradients of its outputs; b: B's second moment, its
    mean over the rank, for B's side only.
absmax=search   The scale of each block of W is that of eight, from 0.8 to 1 times the largest magnitude, with the
    smallest squared error (weighted by F, if there is one).
blocksize=32|64|128|256   W in NF4 with so many values to a scale, for the loss only: what is stored are the rounded
    values, in float32, so that it takes loqt.quantize_w=none and train.dtype=fp32, and saves no memory. (64 is the
    product's: a control.)
denoise=N   P is found from the gradient summed over the last N steps, and not from that of one step.
sketch=gauss|moment   The columns Ω of a sketch: Gaussian ones as they are, or orth([M, N]) of the first moment M of B,
    an average of earlier AᵀP, and Gaussian N (the first time, as in the product); in place of power iterations. Takes
    loqt.subspace=sketch.
criterion=X   Every loqt.interval steps each layer is asked whether its P still does: it is re-initialized only where
    ‖P̂ᵀA‖² < X ‖P_newᵀA‖², A the gradient of that step and P̂ with orthonormal columns. Replaces the schedule.
momentum=second   Adam's state of B at a re-initialization: M ← 0, and the second moment stays (between reset and
    transport of loqt.optimizer_state).
factor=keep   Compensation starts from the W_q that is there, and not from the rounded W: where that leaves the smallest
    error, codes stay as they are and B takes over what the new P can hold. What it cannot is lost, but for
    error_feedback.
align=1   P is turned within its span towards the old one: P ← P U Vᵀ, where U Σ Vᵀ = PᵀP̂_old (Procrustes), so that the
    moments that optimizer_state=keep keeps mean about what they meant. The subspace is the same.
basis=sample|random   sample: the r directions of P are drawn from all singular vectors of G, without replacement, with
    chances as their singular values (SARA, arXiv 2502.05790), so that weak ones get their turn. random: P is any
    subspace, and G is not looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from candidates_rounding import Grid, Importance, LowRank
from candidates_rounding import compensate as compensate_on_grid
from torch import Tensor

from loqt_ds.config import LoQTConfig
from loqt_ds.core.compensation import Compensated, merge
from loqt_ds.core.quantization import Packed, QuantSpec, dequantize, quantize
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.core.subspace import (
    Basis,
    Completed,
    captured_energy,
    gram_basis,
    layer_seed,
    orthonormal,
    overlap,
    test_matrix,
)
from loqt_ds.engines.single import SingleEngine
from loqt_ds.method.controller import Controller, sketch_columns, subspace_method
from loqt_ds.method.gathered import Gathered, Pending, Step
from loqt_ds.method.linear import LoQTLinear, Tap
from loqt_ds.method.reports import LayerReport, ReinitReport

VALUES: dict[str, tuple[str, ...]] = {
    "error_feedback": ("nf4", "fp32"),
    "stochastic": ("1",),
    "fisher": ("g", "x", "b"),
    "absmax": ("search",),
    "blocksize": ("32", "64", "128", "256"),
    "denoise": ("a number of steps, 2 or more",),
    "sketch": ("gauss", "moment"),
    "criterion": ("a part, above 0 and up to 1",),
    "momentum": ("second",),
    "factor": ("keep",),
    "align": ("1",),
    "basis": ("sample", "random"),
}
# Of no use together: what the first does, the second leaves nothing of, or would measure by something else.
CONFLICTS = (("sketch", "basis"), ("denoise", "basis=random"), ("criterion", "basis"))
ROUNDING = ("stochastic", "fisher", "absmax", "blocksize", "factor")  # replace the product's rounding and compensation
# Of no use where there is one re-initialization only.
BETWEEN = ("error_feedback", "denoise", "criterion", "momentum", "factor", "align")


@dataclass(frozen=True)
class Candidates:
    """Values of the candidates that are on, as the module says; None: off."""

    error_feedback: str | None = None
    stochastic: str | None = None
    fisher: str | None = None
    absmax: str | None = None
    blocksize: int | None = None
    denoise: int | None = None
    sketch: str | None = None
    criterion: float | None = None
    momentum: str | None = None
    factor: str | None = None
    align: str | None = None
    basis: str | None = None

    @property
    def names(self) -> list[str]:
        """Of those that are on."""
        return [name for name in VALUES if getattr(self, name) is not None]

    @property
    def rounds(self) -> bool:
        """Whether W is rounded and compensated for here and not in the product."""
        return any(name in ROUNDING for name in self.names)


def check(options: Mapping[str, str]) -> Candidates:
    """The candidates that are asked for. Raises ValueError for names and values that there are not, telling those that
    there are, and for candidates of no use together."""
    there_are = "; ".join(f"{name}={'|'.join(values)}" for name, values in VALUES.items())
    for name, value in options.items():
        if name not in VALUES:
            raise ValueError(f"there is no candidate.{name}; there are {there_are}")
        if not _is_value(name, value):
            raise ValueError(f"candidate.{name}={value!r} does not exist; use {' or '.join(VALUES[name])}")
    for one, other in CONFLICTS:
        name, _, value = other.partition("=")
        if one in options and name in options and options[name].startswith(value):
            raise ValueError(
                f"candidate.{one} does nothing of use with candidate.{name}={options[name]}; leave one out"
            )
    readers: dict[str, Callable[[str], Any]] = {"blocksize": int, "denoise": int, "criterion": float}
    return Candidates(**{name: readers.get(name, str)(value) for name, value in options.items()})


def _is_value(name: str, value: str) -> bool:
    if name == "denoise":
        return value.isdecimal() and int(value) >= 2
    if name == "criterion":
        try:
            return 0 < float(value) <= 1
        except ValueError:
            return False
    return value in VALUES[name]


def install(engine: SingleEngine, options: Mapping[str, str]) -> None:
    """Makes an engine re-initialize with candidates, by name and value.

    Raises ValueError for what `check` refuses, for an engine of several ranks or one that has taken a step, and for
    candidates that its options leave nothing to do.
    """
    wanted = check(options)
    if not isinstance(engine, SingleEngine):
        raise ValueError(f"candidates take an engine on one device, not {type(engine).__name__}")
    if engine.step_index:
        raise ValueError(f"candidates are installed before the first step, not after {engine.step_index}")
    plain = engine.controller
    is_known = type(plain.schedule) is ReinitSchedule  # of another one nobody knows what comes
    check_use(wanted, plain.options, plain.layers.values(), is_known_ahead=is_known)
    engine.controller = CandidateController(plain, wanted)


def check_use(
    wanted: Candidates, options: LoQTConfig, layers: Iterable[LoQTLinear], *, is_known_ahead: bool = True
) -> None:
    """Raises ValueError, naming the option, where a candidate would do nothing.

    Args:
        layers: of the model; their weights may be on the meta device.
        is_known_ahead: whether the steps that re-initialize are.
    """
    names, layers = wanted.names, list(layers)
    sketched = [subspace_method(layer, options.subspace) == "sketch" for layer in layers]

    def refuse(name: str, why: str) -> None:
        if name in names:
            raise ValueError(f"candidate.{name}={getattr(wanted, name)} {why}")

    if options.quantize_w == "none" and wanted.blocksize is None:
        for name in ("error_feedback", "stochastic", "fisher", "absmax", "factor"):
            refuse(name, "takes a W that is rounded; loqt.quantize_w is none")
    if options.quantize_w != "none":
        refuse("blocksize", f"takes loqt.quantize_w=none, not {options.quantize_w}")
    if any(layer.spec_w.dense_dtype != torch.float32 for layer in layers):
        refuse("blocksize", "takes a run in float32 (train.dtype=fp32)")
    if options.compensation_steps == 0:
        for name in ("fisher", "factor"):
            refuse(name, "takes compensation; loqt.compensation_steps is 0")
    if options.schedule == "never":
        for name in BETWEEN:
            refuse(name, "takes more than one re-initialization; loqt.schedule is never")
    if not is_known_ahead and wanted.criterion is None:  # which brings a schedule
        refuse("denoise", "takes a schedule that is known ahead; give re-initializations an interval")
    if not any(sketched):
        refuse("sketch", "takes loqt.subspace=sketch; no layer is sketched")
    if any(sketched) and wanted.basis == "sample":
        refuse("basis", "takes whole gradients; use loqt.subspace=gram")
    if options.optimizer_state != "keep":
        refuse("momentum", f"takes the place of loqt.optimizer_state, which is {options.optimizer_state}; use keep")


class CandidateController(Controller):
    """A controller that does some things otherwise; everything else is the product's.

    Args:
        plain: the controller whose place it takes.
        wanted: checked against it.
    """

    def __init__(self, plain: Controller, wanted: Candidates) -> None:
        super().__init__(plain.layers, plain.options, plain.store, original=plain._original, seed=plain._seed)
        self.wanted = wanted
        self.schedule = plain.schedule
        if wanted.criterion is not None:
            self.schedule = ReinitSchedule("static", plain.options.interval)
        self._residuals: dict[str, Packed] = {}  # R, by layer
        self._residual_spec = QuantSpec("nf4" if wanted.error_feedback == "nf4" else "none", dense_dtype=torch.float32)
        self._summed: dict[str, Gathered] = {}  # gradients of steps before the one that re-initializes
        self._squares: dict[str, list[Tensor]] = {}  # Σ over tokens of dY² (out,) and X² (in,), float32
        self._importance: dict[str, Importance] = {}

    def num_bytes(self) -> int:
        """Of what stays between steps, beside what the product keeps."""
        return sum(tensor.nbytes for packed in self._residuals.values() for tensor in packed.values())

    # ---------------------------------------------------------------- the gradient

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        current = self._current
        assert current is not None
        if self.wanted.denoise is None:
            return
        current.gathered = self._summed
        if not current.due and any(self.schedule.is_due(step + i) for i in range(1, self.wanted.denoise)):
            for name, layer in self.layers.items():
                layer.tap = self._tap(name, layer)

    def _tap(self, name: str, layer: LoQTLinear) -> Tap:
        tap = super()._tap(name, layer)
        if self.wanted.fisher != "x":
            return tap

        @torch.no_grad()
        def both(dy: Tensor, x: Tensor) -> None:
            tap(dy, x)
            squares = [tensor.float().square().sum(0) for tensor in (dy, x)]
            known = self._squares.get(name)
            self._squares[name] = squares if known is None else [a + b for a, b in zip(known, squares, strict=True)]

        return both

    @torch.no_grad()
    def end_step(self, applied: bool) -> ReinitReport | None:
        current = self._current
        assert current is not None
        report = super().end_step(applied)
        if current.due or not applied:  # what was summed is used, or has a gradient in it that is not finite
            self._summed = {}
            self._squares.clear()
            self._importance.clear()
        for layer in self.layers.values():
            layer.tap = None
        return report

    def _omega(self, name: str, layer: LoQTLinear, inner: Tensor, outer: Tensor) -> Tensor:
        if self.wanted.sketch == "gauss":
            return self._gaussian_omega(name, layer).to(outer.dtype)
        is_known = name in self._initialized and self.store.has_moments(name)
        if self.wanted.sketch is None or not is_known:
            return super()._omega(name, layer, inner, outer)
        moment = self.store.moment(name, 0)
        assert moment is not None
        num_others = sketch_columns(layer, self.options.sketch_oversampling) - layer.rank
        gaussian = self._gaussian_omega(name, layer)[:, :num_others]
        return orthonormal(torch.cat([layer.canonical(moment).float(), gaussian], dim=1)).to(outer.dtype)

    # ---------------------------------------------------------------- from G to P

    def _next_basis(self, current: Step, name: str) -> Pending:
        gathered = current.gathered.get(name)
        if gathered is not None and self.wanted.fisher in ("g", "x"):
            self._importance[name] = self._measured(name, gathered)
        return super()._next_basis(current, name)

    def _measured(self, name: str, gathered: Gathered) -> Importance:
        """F of a layer, from what its taps have seen."""
        layer = self.layers[name]
        if self.wanted.fisher == "x":
            of_outputs, of_inputs = self._squares[name]
            return Importance.of(of_outputs, of_inputs, layer.weight_shape)
        short = gathered.probed().float().square().mean(1)  # (k,)
        long = None if gathered.is_sketch else gathered.total.square().mean(0)  # (l,)
        return _importance(layer, short, long)

    def _find_basis(self, name: str, gathered: Gathered | None) -> tuple[Completed | None, LayerReport]:
        full, report = super()._find_basis(name, gathered)
        if full is None or name not in self._initialized:
            return full, report
        old = self.layers[name].basis_hat()
        if self.wanted.criterion is not None:
            assert gathered is not None
            best = captured_energy(gathered.probed(), full.vectors)
            part = captured_energy(gathered.probed(), orthonormal(old)) / max(best, 1e-30)
            if part >= self.wanted.criterion:
                report.kept = f"P captures {part:.3f} of what the best of its rank would"
                return None, report
        if self.wanted.align is not None:
            left, _, right = torch.linalg.svd(overlap(full.vectors, old).double())
            full = dataclasses.replace(full, vectors=full.vectors @ (left @ right).float())
        return full, report

    def _decompose(self, layer: LoQTLinear, gathered: Gathered, seed: int) -> tuple[Basis, str]:
        if self.wanted.basis is None:
            return super()._decompose(layer, gathered, seed)
        if self.wanted.basis == "random":
            k, rank = layer.basis_shape
            vectors = orthonormal(test_matrix(length=k, num_columns=rank, seed=seed, device=layer.B.device))
            return Basis(vectors, rank, _energies(vectors, gathered)), "random"
        every = gram_basis(gathered.total, layer.basis_shape[0])
        if every.numerical_rank <= layer.rank:
            return every, "gram"
        generator = torch.Generator("cpu").manual_seed(layer_seed(seed, 0, "sampled basis"))
        chosen = torch.multinomial(every.values.cpu(), layer.rank, generator=generator).sort().values
        chosen = chosen.to(every.vectors.device)
        return Basis(every.vectors[:, chosen], layer.rank, every.values[chosen]), "sampled"

    # ---------------------------------------------------------------- from P to W, B

    @property
    def _carries_moments(self) -> bool:
        return self.wanted.momentum is not None or super()._carries_moments

    def _carry_moments(
        self, layer: LoQTLinear, first: Tensor, second: Tensor, new_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.wanted.momentum is None:
            return super()._carry_moments(layer, first, second, new_hat)
        return torch.zeros_like(first), second

    def _merged(self, name: str, factor: Tensor | None) -> Tensor:
        weight, residual = super()._merged(name, factor), self._residuals.get(name)
        return weight if residual is None else weight + dequantize(residual, self._shape(name), self._residual_spec)

    def _shape(self, name: str) -> tuple[int, int]:
        return self.layers[name].weight_shape

    def _compensate(self, name: str, weight: Tensor, new_hat: Tensor) -> Compensated:
        layer, rounds = self.layers[name], self.wanted.rounds
        result = self._round(name, weight, new_hat) if rounds else super()._compensate(name, weight, new_hat)
        if self.wanted.error_feedback is not None:
            values = dequantize(result.packed, layer.weight_shape, layer.spec_w)
            values = values.clone() if layer.spec_w.kind == "none" else values
            effective = merge(values, new_hat, result.factor, side=layer.side, scale=layer.scale)
            self._residuals[name] = quantize(weight - effective, self._residual_spec)
        return result

    def _round(self, name: str, weight: Tensor, new_hat: Tensor) -> Compensated:
        """`_compensate`, on the grid that is asked for."""
        layer, wanted = self.layers[name], self.wanted
        kind = "nf4" if wanted.blocksize is not None else layer.spec_w.kind
        grid = Grid(kind, wanted.blocksize or 64, wanted.absmax == "search")
        generator = None
        if wanted.stochastic is not None:
            generator = torch.Generator(layer.B.device).manual_seed(self._layer_seed(name + "/rounding"))
        rounded = compensate_on_grid(
            weight,
            LowRank(new_hat, layer.side, layer.scale),
            iterations=self.options.compensation_steps,
            grid=grid,
            importance=self._importance_by_moment(name) if wanted.fisher == "b" else self._importance.get(name),
            current=layer.weight_q() if wanted.factor is not None and name in self._initialized else None,
            generator=generator,
        )
        return Compensated(
            quantize(rounded.values, layer.spec_w),
            rounded.factor,
            rounded.error_before,
            rounded.error_after,
            rounded.kept_iteration,
        )

    def _importance_by_moment(self, name: str) -> Importance | None:
        """F from B's second moment, along B's side; none the first time."""
        layer = self.layers[name]
        if name not in self._initialized or not self.store.has_moments(name):
            return None
        moment = self.store.moment(name, 1)
        assert moment is not None
        squares = layer.canonical(moment).float().mean(1)  # (l,)
        return _importance(layer, None, squares)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """As the product's, with tensors: residuals, and what was summed for a re-initialization to come."""
        summed = {
            name: {
                "total": gathered.total.clone(),
                "columns": gathered.columns,
                "is_sketch": gathered.is_sketch,
                "num_tokens": gathered.num_tokens,
            }
            for name, gathered in self._summed.items()
        }
        residuals = {name: dict(packed) for name, packed in self._residuals.items()}
        squares = {name: list(pair) for name, pair in self._squares.items()}
        return super().state_dict() | {"candidates": {"residuals": residuals, "summed": summed, "squares": squares}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`. Raises ValueError for a state of the product's controller too."""
        if "candidates" not in state:
            raise ValueError("the state is of a run without candidates; go on without them, or begin anew")
        super().load_state_dict(state)
        kept = state["candidates"]

        def here(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(self.layers[name].B.device, copy=True)

        self._residuals = {n: {k: here(n, t) for k, t in packed.items()} for n, packed in kept["residuals"].items()}
        self._squares = {n: [here(n, t) for t in pair] for n, pair in kept["squares"].items()}
        self._summed = {}
        for name, one in kept["summed"].items():
            columns = None if one["columns"] is None else here(name, one["columns"])
            self._summed[name] = Gathered(here(name, one["total"]), columns, one["is_sketch"], one["num_tokens"])


def _importance(layer: LoQTLinear, short: Tensor | None, long: Tensor | None) -> Importance:
    """F of a layer from mean squares along the side of P (k,) and that of B (l,)."""
    rows, columns = (long, short) if layer.side == "right" else (short, long)
    return Importance.of(rows, columns, layer.weight_shape)


def _energies(vectors: Tensor, gathered: Gathered) -> Tensor:
    """‖vᵀ A‖ of each direction v (k, r), in float64; of a sketch as its probes have it."""
    return (vectors.double().T @ gathered.probed().double()).norm(dim=1)
