"""GaLore, Q-GaLore, APOLLO and APOLLO-Mini: optimizers that see the gradients of the linears through a projection.

    galore:R     galore-torch's GaLoreAdamW; scale 0.25 (GaLore, arXiv 2403.03507, section 5.1), projections by SVD
    qgalore:R    q-galore-torch's 8-bit AdamW; INT8 weights in groups of 256 that are rounded stochastically, INT4
                 projections in groups of 256, scale 0.25; at each refresh a layer's interval doubles where the cosine
                 between the first vector of a projection and that of the one before was, on average over the last
                 five refreshes, at least 0.4 (Q-GaLore, arXiv 2407.08296, sections 3 and 4)
    apollo:R     apollo-torch's APOLLOAdamW; random projections, a scale for each channel, alpha 1 (APOLLO, arXiv
                 2412.05270, section 4)
    apollomini   the same with rank 1, one scale for each matrix and alpha sqrt(128) (section 4.3 there)

The packages take the square of APOLLO's alpha as `scale`. How often projections are renewed is the comparison's
interval (200 steps in all four papers); it is where Q-GaLore's intervals start. GaLore's projector keeps a view of all
the vectors that the SVD gave; here it keeps a copy of the R that it uses, and these are what is counted.

What q-galore-torch 1.0 needs on our side, seen with torch 2.13 and bitsandbytes 0.50.2:

- its `AdamW8bit` stops in its first step with `KeyError: 'percentile_clipping'`, an option that bitsandbytes has
  dropped; and it hands arguments to bitsandbytes by position, where others are today: the 100 for percentile clipping
  arrives as `max_unorm=100`, the True for blockwise states as `skip_zeros=True`. `QGaLoreAdamW` below builds and
  updates by bitsandbytes' own code of today; projection, INT8 weights and rounding are the package's;
- it calls `torch.cuda.synchronize()` after every parameter, on a CPU too (`AssertionError: Torch not compiled with CUDA
  enabled`): the call is left out there;
- its `QGaLoreAdamW8bit_simulate`, which rounds dense weights instead of storing INT8, does run with that call left out,
  but with `max_unorm=100`: the update of a matrix whose projected gradient has fewer than 4096 numbers is then measured
  against a weight that the package has set to zero, and comes out too small (a first step of rank 8 on 128 x 128 moves
  W by 0.013 in norm, without that option by 0.081). It is not used;
- the linear with INT8 weights is in the authors' repository and not in the package: `Int8Linear` is ours;
- groups must divide a matrix (`assert w.nelement() % q_group_size == 0`): where 256 does not, the largest size that
  does is taken;
- INT4 codes of projections are stored one to a byte. Bytes are counted as they are;
- whether a projection has changed is asked of its first vector with its sign, which an SVD is free to choose: a layer
  whose subspace stays may not be seen to. That is left as it was published.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

import torch
from rivals_base import Clock, Rival, Setup, dense_model, gradient, groups, imported
from torch import Tensor, nn

from loqt_ds.method.conversion import target_linears

NEVER = 2**62  # steps
SCALE = 0.25
QUANT_GROUP = 256
MIN_GROUP = 16  # with fewer numbers to a scale and a zero point these take as much as the codes


@contextmanager
def timed_bases(projector: type, device: torch.device) -> Iterator[list[float]]:
    """The seconds of each basis that a package's projectors find, as they come. It has its memory for itself."""
    original, spent = projector.get_orthogonal_matrix, []  # type: ignore[attr-defined]  # type: Any, list[float]

    def measured(*args: Any, **kwargs: Any) -> Tensor:
        clock = Clock(device)
        basis = original(*args, **kwargs).clone(memory_format=torch.contiguous_format)
        spent.append(clock.skip())
        return basis

    with mock.patch.object(projector, "get_orthogonal_matrix", measured):
        yield spent


class Projected(Rival):
    """A model whose optimizer projects.

    The packages' projectors find a new basis where their own count of steps is divisible by `update_proj_gap`.

    Args:
        projector: the package's class.
    """

    def __init__(
        self, name: str, setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer, projector: type
    ) -> None:
        super().__init__(name, setup, model, optimizer)
        self._projector = projector
        if setup.is_large:
            self.preset()

    def _projectors(self) -> Iterator[tuple[Tensor, Any]]:
        for parameter, state in self.optimizer.state.items():
            if "projector" in state:
                yield parameter, state["projector"]

    def set_gap(self, refresh: bool) -> None:
        if self.setup.interval is None:
            for _, projector in self._projectors():
                projector.update_proj_gap = 1 if refresh and not self.setup.is_large else NEVER

    def update(self) -> float | None:
        with timed_bases(self._projector, self.device) as spent:
            super().update()
        return sum(spent) if spent else None

    def refresh_beside(self) -> float | None:
        """Of GaLore, where all matrices would take too long: one of each shape, times how many there are."""
        if not self.setup.is_large:
            return None
        counts: dict[torch.Size, int] = {}
        found: dict[torch.Size, tuple[Tensor, Any]] = {}
        for parameter, projector in self._projectors():
            taken = gradient(parameter)
            assert taken is not None
            counts[parameter.shape] = counts.get(parameter.shape, 0) + 1
            found.setdefault(parameter.shape, (taken, projector))
        total = 0.0
        for shape, (taken, projector) in found.items():
            side = "right" if shape[0] >= shape[1] else "left"
            clock = Clock(self.device)
            extra = {"seed": 1} if hasattr(projector, "seed") else {}
            projector.get_orthogonal_matrix(taken, projector.rank, type=side, **extra)
            total += clock.skip() * counts[shape]
        return total

    def preset(self) -> None:
        """Gives every matrix a random basis, so that the first step finds none."""
        for group in self.optimizer.param_groups:
            if "rank" not in group:
                continue
            for parameter in group["params"]:
                rows, columns = parameter.shape
                basis = torch.empty(min(rows, columns), group["rank"], dtype=torch.float32, device=self.device)
                nn.init.orthogonal_(basis)
                entry = self.optimizer.state[parameter]
                projector = self._new_projector(group, entry)
                dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
                self._set_basis(projector, (basis.T if rows >= columns else basis).to(dtype).contiguous())
                entry |= {"projector": projector, "step": 1}

    def _set_basis(self, projector: Any, basis: Tensor) -> None:
        projector.ortho_matrix = basis

    def _new_projector(self, group: dict[str, Any], entry: dict[str, Any]) -> Any:
        names = ("update_proj_gap", "scale", "proj_type")
        seed = {"seed": entry["seed"]} if "seed" in entry else {}  # APOLLO's
        return self._projector(group["rank"], **{name: group[name] for name in names}, **seed)

    def packed_entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {name: vars(value) if name == "projector" else value for name, value in entry.items()}

    def unpacked_entry(self, entry: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        if "projector" not in entry:
            return entry
        projector = self._new_projector(group, entry)
        vars(projector).update(entry["projector"])
        return entry | {"projector": projector}


def galore(name: str, setup: Setup, rank: int | None) -> Rival:
    """GaLoreAdamW, on the linears that LoQT adapts."""
    package = imported("galore_torch", "galore-torch")
    projector = imported("galore_torch.galore_projector", "galore-torch").GaLoreProjector
    return _projected(name, setup, rank, package.GaLoreAdamW, projector, scale=SCALE)


def apollo(name: str, setup: Setup, rank: int | None) -> Rival:
    """APOLLOAdamW; APOLLO-Mini where no rank is given."""
    package = imported("apollo_torch", "apollo-torch")
    projector = imported("apollo_torch.random_projector", "apollo-torch").GradientProjector
    mini = rank is None
    options = {"proj": "random", "scale_type": "tensor" if mini else "channel", "scale": 128.0 if mini else 1.0}
    return _projected(name, setup, rank or 1, package.APOLLOAdamW, projector, **options)


def _projected(name: str, setup: Setup, rank: int | None, make: Any, projector: type, **options: Any) -> Rival:
    assert rank is not None
    model = dense_model(setup)
    matrices, others = groups(setup, model)
    matrices |= {"rank": rank, "update_proj_gap": setup.interval or NEVER, "proj_type": "std", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that torch has an AdamW, too
        optimizer = make([others, matrices], lr=setup.lr, weight_decay=0.0)
    return Projected(name, setup, model, optimizer, projector)


# ---------------------------------------------------------------- Q-GaLore


@cache
def qgalore_optimizer() -> type:
    """q-galore-torch's AdamW8bit with what bitsandbytes has changed since. Raises MissingPackage."""
    package = imported("q_galore_torch", "q-galore-torch")
    from bitsandbytes.optim.optimizer import Optimizer2State

    class QGaLoreAdamW(package.QGaLoreAdamW8bit):  # type: ignore[name-defined]
        """Args:
        params: groups; those with a rank are projected, their weights may be INT8 (`Int8Linear`).
        lr: of groups without their own.
        """

        def __init__(self, params: Any, lr: float) -> None:
            Optimizer2State.__init__(self, "adam", params, lr=lr, weight_decay=0.0, optim_bits=8)

        def update_step(
            self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int, flag_use_float_grad: bool = False
        ) -> None:
            """By now `p` is float, and its gradient, if it has INT8 weights, in the attribute."""
            if flag_use_float_grad:
                p.grad = p.float_grad  # type: ignore[attr-defined]
            Optimizer2State.update_step(self, group, p, gindex, pindex)
            if flag_use_float_grad:
                p.grad = None

    return QGaLoreAdamW


def group_size(*numbers: int) -> int:
    """The largest size of groups, at most Q-GaLore's, that divides all these. Raises ValueError where it is tiny."""
    size = math.gcd(QUANT_GROUP, *numbers)
    if size < MIN_GROUP:
        counts = ", ".join(map(str, sorted(set(numbers))))
        raise ValueError(
            f"Q-GaLore quantizes in groups of up to {QUANT_GROUP} that divide a matrix, and of matrices of {counts} "
            f"numbers only groups of {size} do; take a rank and a shape that {MIN_GROUP} divides"
        )
    return size


def projection_group(linears: dict[str, nn.Linear], rank: int) -> int:
    """Of what size the groups of INT4 projections are. Raises ValueError where these, or those of INT8 weights, would
    be tiny."""
    for linear in linears.values():
        group_size(linear.weight.numel())
    return group_size(*(rank * min(linear.weight.shape) for linear in linears.values()))


class _Int8Product(torch.autograd.Function):
    """y = x Wᵀ with W dequantized for the forward, and again for the backward. The gradient of W is added to an
    attribute of it: torch has gradients of floating point parameters only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.dequantized(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), weight, dy = ctx.saved_tensors, ctx.layer.weight, gradients[0]
        found = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.scales.dtype)  # (out, in)
        weight.float_grad = found if weight.float_grad is None else weight.float_grad + found
        return dy @ ctx.layer.dequantized(x.dtype), None


class Int8Linear(nn.Module):
    """A linear whose trained weight is INT8: uint8 codes (out, in), a scale and a zero point for each group.

    The parameter's attributes are those that the package's optimizer reads: scales and zeros, both (groups, 1), in the
    dtype of the weight, group_size, stochastic_round, and float_grad, which is the gradient.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._package = qgalore_optimizer()
        size = group_size(linear.weight.numel())
        codes, scales, zeros = self._package._quantize(None, linear.weight.data, q_group_size=size)  # type: ignore[attr-defined]
        self.weight = nn.Parameter(codes, requires_grad=False)
        attributes = {"scales": scales, "zeros": zeros, "group_size": size, "stochastic_round": True}
        for name, value in (attributes | {"float_grad": None}).items():
            setattr(self.weight, name, value)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(out, in)"""
        w: Any = self.weight
        return self._package._dequantize(None, w.data, dtype, w.group_size, w.scales, w.zeros)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # which the backward, of its own making, knows nothing of
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _Int8Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class QGaLore(Projected):
    """Q-GaLore on INT8 weights."""

    def update(self) -> float | None:
        without = mock.patch("torch.cuda.synchronize") if self.device.type == "cpu" else nullcontext()
        with without:
            return super().update()

    def _set_basis(self, projector: Any, basis: Tensor) -> None:
        found = projector._quantize(basis, q_group_size=projector.quant_group_size, n_bit=projector.quant_n_bit)
        names = ("ortho_matrix", "ortho_matrix_scales", "ortho_matrix_zeros", "ortho_matrix_shape")
        vars(projector).update(zip(names, found, strict=True))

    def _new_projector(self, group: dict[str, Any], entry: dict[str, Any]) -> Any:
        names = ("update_proj_gap", "scale", "proj_type", "quant", "cos_threshold", "gamma_proj", "queue_size")
        options = {name: group[name] for name in names}
        options |= {"group_size": group["quant_group_size"], "n_bit": group["quant_n_bit"]}
        return self._projector(group["rank"], **options)


def qgalore(name: str, setup: Setup, rank: int | None) -> Rival:
    """The package's optimizer on the linears that LoQT adapts, with INT8 weights; the rest is trained by 8-bit Adam."""
    assert rank is not None
    imported("q_galore_torch", "q-galore-torch")
    make = qgalore_optimizer()
    projector = imported("q_galore_torch.q_galore_projector", "q-galore-torch").GaLoreProjector
    model = dense_model(setup)
    matrices, others = groups(setup, model)
    targets = target_linears(model, "all-linear")
    size = projection_group(targets, rank)
    quantized = {path: Int8Linear(linear) for path, linear in targets.items()}
    for path, layer in quantized.items():
        model.set_submodule(path, layer)
    matrices |= {
        "params": [layer.weight for layer in quantized.values()],
        "rank": rank,
        "update_proj_gap": setup.interval or NEVER,
        "scale": SCALE,
        "proj_type": "std",
        "quant": True,
        "quant_n_bit": 4,
        "quant_group_size": size,
        "cos_threshold": 0.4,
        "gamma_proj": 2,
        "queue_size": 5,
    }
    return QGaLore(name, setup, model, make([others, matrices], lr=setup.lr), projector)
