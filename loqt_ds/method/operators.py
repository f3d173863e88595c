"""The layer as one operator of torch: what `torch.compile` sees of a LoQT layer.

Dynamo cannot look into a layer: packed bytes, buffers that layers share, products chosen by the number of tokens, and a
tap that is a Python function. Nor need it: to the compiler the layer is an operation `loqt_ds::linear` and its gradient
`loqt_ds::linear_backward`, opaque, each with the shapes of what it gives ("fake" kernels) and together differentiable.
What lies between layers (norms, rotations, activations, additions) is the compiler's to fuse, and so is the decision
what of it is kept for the backward. Eagerly the operators are not used: autograd's own function costs less.

The operators find their layer by a *handle*, a number in a CPU tensor: a number in Python would be a constant of the
graph, and each block of a model would be compiled anew. B and the bias are arguments because they are differentiated,
the bytes of W and P because saving them lets autograd see whether they were rewritten between forward and backward.

Tapping: whether a layer is tapped is a constant of a graph, so that a model has two, with and without. In the former x
is saved, and the backward calls the layer's tap.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    """What the operators need of a layer."""

    in_features: int
    out_features: int
    rank: int
    side: str
    tap: Callable[[Tensor, Tensor], None] | None
    handle: Tensor
    B: Any
    bias: Any

    def packed_tensors(self) -> dict[str, Tensor]: ...

    def multiply(
        self, x: Tensor, factor: Tensor, bias: Tensor | None, *, training: bool, wants_projected: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def differentiate(
        self,
        grad_output: Tensor,
        factor: Tensor,
        projected: Tensor | None,
        compute_x: Callable[[], Tensor],
        *,
        wanted: Sequence[bool],
        tap: Callable[[Tensor, Tensor], None] | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Layer) -> Tensor:
    """A new handle for a layer: a number, int64, on the CPU whatever the default device."""
    number = next(_numbers)
    _layers[number] = layer
    with torch.inference_mode(False):  # saved for the backward, which an inference tensor cannot be
        return torch.tensor(number, device="cpu")


def call(layer: Layer, x: Tensor) -> Tensor:
    """y (..., out) of x (..., in), for tracing."""
    packed = list(layer.packed_tensors().values())
    training, right = torch.is_grad_enabled(), layer.side == "right"
    columns = layer.rank if training and right and layer.B.requires_grad else 0
    tapped = training and layer.tap is not None
    y: Tensor = torch.ops.loqt_ds.linear(
        x, layer.B, layer.bias, packed, layer.handle, layer.out_features, columns, right, training, tapped
    )[0]
    return y


# Schemas are written out: how torch reads them from annotations differs between its versions.
@torch.library.custom_op(
    "loqt_ds::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor factor, Tensor? bias, Tensor[] packed, Tensor handle, int out_features, int columns, "
    "bool right, bool training, bool tapped) -> (Tensor, Tensor)",
)
def _linear(
    x: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    handle: Tensor,
    out_features: int,
    columns: int,
    right: bool,
    training: bool,
    tapped: bool,
) -> tuple[Tensor, Tensor]:
    """y (..., out), and x P (T, columns) where there are columns, else nothing (0,)."""
    layer = _layers[int(handle)]
    y, projected = layer.multiply(x, factor, bias, training=training, wants_projected=columns > 0)
    return y, x.new_empty(0) if projected is None else projected


@_linear.register_fake
def _(
    x: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    handle: Tensor,
    out_features: int,
    columns: int,
    right: bool,
    training: bool,
    tapped: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty((num_tokens, columns) if columns else (0,))


@torch.library.custom_op(
    "loqt_ds::linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor? projected, Tensor factor, Tensor? bias, Tensor[] packed, Tensor handle, "
    "int in_features, bool[] wanted, bool tapped) -> (Tensor, Tensor, Tensor)",
)
def _linear_backward(
    dy: Tensor,
    x: Tensor | None,
    projected: Tensor | None,
    factor: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    handle: Tensor,
    in_features: int,
    wanted: Sequence[bool],
    tapped: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, B and the bias; those that are not wanted are empty (0,)."""
    layer = _layers[int(handle)]

    def compute_x() -> Tensor:
        assert x is not None
        return x

    tap = layer.tap if tapped else None
    gradients = layer.differentiate(dy, factor, projected, compute_x, wanted=wanted, tap=tap)
    dx, dfactor, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dfactor, dbias if bias is None else dbias.to(bias.dtype)


@_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    projected: Tensor | None,
    factor: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    handle: Tensor,
    in_features: int,
    wanted: Sequence[bool],
    tapped: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_factor, need_bias = wanted
    return (
        dy.new_empty((*dy.shape[:-1], in_features) if need_x else (0,)),
        factor.new_empty(factor.shape if need_factor else (0,)),
        dy.new_empty(0) if bias is None else bias.new_empty(bias.shape if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, factor, bias, packed, handle, _, columns, right, _, tapped = inputs
    keeps_x = tapped or not right
    ctx.save_for_backward(x if keeps_x else None, output[1] if columns else None, factor, bias, handle, *packed)
    ctx.in_features, ctx.tapped = x.shape[-1], tapped
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, projected, factor, bias, handle, *packed = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    found = torch.ops.loqt_ds.linear_backward(
        dy, x, projected, factor, bias, packed, handle, ctx.in_features, wanted, ctx.tapped
    )
    gradients = [gradient if need else None for gradient, need in zip(found, wanted, strict=True)]
    return *gradients, [None] * len(packed), *(None,) * 6


_linear.register_autograd(_backward, setup_context=_setup_context)
