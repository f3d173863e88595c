"""The layer: a frozen quantized weight, a frozen quantized projection, and one trained factor.

For `nn.Linear` with weight W of shape (out, in), scale s and rank r (paper section 3.1; ALGORITHM.md, "Layer"):

    side "right" (in <= out):  y = x W_q^T + s (x P) B^T + b      P (in, r), B (out, r)
    side "left"  (in > out):   y = x W_q^T + s (x B^T) P^T + b    P (out, r), B (r, in)

The layer is computed in this factored form. W_q and P are buffers of packed bytes (uint8), so no cast, broadcast or
optimizer of anybody touches them. The autograd function saves what the gradient of B needs and nothing dequantized:
x P on the right side, x on the left side, and x on both while the layer is tapped; where x carries a recipe
(`recompute`), what x is computed from instead. The dense gradient of W is never formed in an ordinary step; while `tap`
is set, the backward hands (dY, X) to it.

Legend: T tokens; k the side P lives on, l the other; "canonical" tensors are A (k, l), P (k, r), F (l, r).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loqt_ds.core.compensation import merge
from loqt_ds.core.quantization import Packed, QuantSpec, dequantize, dequantized, packed_layout
from loqt_ds.method.recompute import Recipe, kept_inputs, recipe_of

Tap = Callable[[Tensor, Tensor], None]


class _LoQTLinearFunction(torch.autograd.Function):
    """y and its gradients with respect to x, B and the bias; W and P are constants.

    One dequantized matrix is alive at a time, in a buffer that all layers share: hence the order of products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, bias: Tensor | None, layer: LoQTLinear, recipe: Recipe | None
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, layer.in_features)  # (T, in)
        b = factor.to(dtype)
        right, tapped = layer.side == "right", layer.tap is not None
        projected = None
        if right:
            with layer.basis_hat_buffer(dtype) as p:  # (k, r)
                projected = rows @ p  # (T, r)
        with layer.weight_q_buffer(dtype) as w:
            y = nn.functional.linear(rows, w, None if bias is None else bias.to(dtype))  # (T, out)
        if projected is not None:
            y.addmm_(projected, b.t(), alpha=layer.scale)
        else:
            with layer.basis_hat_buffer(dtype) as p:
                y.addmm_(rows @ b.t(), p.t(), alpha=layer.scale)
        keeps_x = tapped or not right
        ctx.save_for_backward(factor, projected, *(_inputs_of(rows, recipe) if keeps_x else ()))
        ctx.compute_x = recipe.computation if recipe is not None and keeps_x else None
        ctx.layer, ctx.tapped, ctx.x_shape, ctx.x_dtype = layer, tapped, x.shape, dtype
        ctx.has_bias, ctx.bias_dtype = bias is not None, None if bias is None else bias.dtype
        ctx.versions = layer.versions()
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        layer: LoQTLinear = ctx.layer
        if ctx.versions != layer.versions():
            raise RuntimeError("W or P of a LoQTLinear was rewritten between its forward and its backward")
        factor, projected, *inputs = kept_inputs(ctx, ctx.compute_x)
        dy = grad_output.reshape(-1, layer.out_features)  # (T, out)
        dtype = dy.dtype
        need_x, need_factor, need_bias = ctx.needs_input_grad[:3]
        b = factor.to(dtype)
        right, tap = layer.side == "right", layer.tap if ctx.tapped else None
        dx = dfactor = dbias = None
        # (T, r): what reaches the low-rank path from above.
        if right:
            inner = dy @ b
        else:
            with layer.basis_hat_buffer(dtype) as p:
                inner = dy @ p
        rows: Any = None  # (T, in)
        if tap is not None or (need_factor and not right):
            rows = inputs[0] if ctx.compute_x is None else ctx.compute_x(*inputs).to(ctx.x_dtype)
            rows = rows.reshape(-1, layer.in_features)
        if need_factor:
            product = dy.t() @ projected if right else inner.t() @ rows
            dfactor = product.mul_(layer.scale).to(factor.dtype)
        if tap is not None:
            tap(dy, rows)
        if ctx.has_bias and need_bias:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        if need_x:
            rows = None  # x that was computed again goes before dx, of the same size, comes
            with layer.weight_q_buffer(dtype) as w:
                dx = dy @ w  # (T, in)
            if right:
                with layer.basis_hat_buffer(dtype) as p:
                    dx.addmm_(inner, p.t(), alpha=layer.scale)
            else:
                dx.addmm_(inner, b, alpha=layer.scale)
            dx = dx.view(ctx.x_shape)
        return dx, dfactor, dbias, None, None


def _inputs_of(rows: Tensor, recipe: Recipe | None) -> tuple[Tensor, ...]:
    """What is kept for x: x, or what it can be computed from."""
    return (rows,) if recipe is None else recipe.tensors


class LoQTLinear(nn.Module):
    """`nn.Linear` with frozen quantized W and P and a trained factor B.

    Args:
        in_features, out_features: as in `nn.Linear`.
        rank: r, at most min(in_features, out_features).
        side: "right" or "left", resolved (see `core.subspace.resolve_side`).
        scale: s, multiplies the product of P and B; it is not divided by the rank.
        spec_w, spec_p: how W and P are stored.
        bias: whether there is a (trained) bias.
        dtype: of B and the bias.

    W, P and B are zero until they are set. State: uint8 buffers `w_*` and `p_*`, parameters `B` and `bias`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        side: str,
        scale: float,
        spec_w: QuantSpec,
        spec_p: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"loqt.rank={rank} does not fit a weight of shape ({out_features}, {in_features}); "
                f"use a rank from 1 to {min(in_features, out_features)}"
            )
        if side not in ("left", "right"):
            raise ValueError(f"side={side!r} is not resolved; use 'left' or 'right'")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.side, self.scale = rank, side, float(scale)
        self.spec_w, self.spec_p = spec_w, spec_p
        self.tap: Tap | None = None
        for prefix, shape, spec in (("w", self.weight_shape, spec_w), ("p", self.basis_shape, spec_p)):
            for key, num_bytes in packed_layout(shape, spec).items():
                self.register_buffer(f"{prefix}_{key}", torch.zeros(num_bytes, dtype=torch.uint8, device=device))
        shape_b = (out_features, rank) if side == "right" else (rank, in_features)
        self.B = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def basis_shape(self) -> tuple[int, int]:
        """(k, r): k is the side that P lives on."""
        return (self.in_features if self.side == "right" else self.out_features), self.rank

    @property
    def factor_length(self) -> int:
        """l: the side that B lives on."""
        return self.out_features if self.side == "right" else self.in_features

    def _packed(self, prefix: str, shape: tuple[int, int], spec: QuantSpec) -> Packed:
        return {key: getattr(self, f"{prefix}_{key}") for key in packed_layout(shape, spec)}

    def packed_w(self) -> Packed:
        """The buffers of W themselves, by key."""
        return self._packed("w", self.weight_shape, self.spec_w)

    def packed_p(self) -> Packed:
        """The buffers of P themselves, by key."""
        return self._packed("p", self.basis_shape, self.spec_p)

    @torch.no_grad()
    def set_w(self, packed: Packed) -> None:
        """Overwrites the bytes of W in place."""
        for key, buffer in self.packed_w().items():
            buffer.copy_(packed[key])

    @torch.no_grad()
    def set_p(self, packed: Packed) -> None:
        """Overwrites the bytes of P in place."""
        for key, buffer in self.packed_p().items():
            buffer.copy_(packed[key])

    def versions(self) -> tuple[int, ...]:
        """Counts of in-place writes to W and P: a backward compares them with those of its forward."""
        return tuple(t._version for t in (*self.packed_w().values(), *self.packed_p().values()))

    def weight_q(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized W_q, (out, in). May share memory with the buffer where W is not quantized."""
        return dequantize(self.packed_w(), self.weight_shape, self.spec_w, dtype=dtype)

    def basis_hat(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized P, (k, r). May share memory with the buffer where P is not quantized."""
        return dequantize(self.packed_p(), self.basis_shape, self.spec_p, dtype=dtype)

    def weight_q_buffer(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """W_q, (out, in), for as long as the context lasts, in memory that all layers use in turn."""
        return dequantized(self.packed_w(), self.weight_shape, self.spec_w, dtype=dtype)

    def basis_hat_buffer(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """P, (k, r), for as long as the context lasts, in memory that all layers use in turn."""
        return dequantized(self.packed_p(), self.basis_shape, self.spec_p, dtype=dtype)

    def canonical(self, factor: Tensor) -> Tensor:
        """A tensor shaped like B, as (l, r); its own inverse for one side."""
        return factor if self.side == "right" else factor.t()

    def factor(self) -> Tensor:
        """B in canonical orientation (l, r), float32."""
        return self.canonical(self.B.detach()).float()

    @torch.no_grad()
    def effective_weight(self, factor: Tensor | None = None) -> Tensor:
        """W_q + s (product of P and B), (out, in) float32; `factor` (l, r) replaces B (say, by its fp32 master)."""
        weight = self.weight_q().clone() if self.spec_w.kind == "none" else self.weight_q()
        factor = self.factor() if factor is None else factor
        return merge(weight, self.basis_hat(), factor, side=self.side, scale=self.scale)

    # Dynamo cannot trace through packed bytes and a Python tap: it breaks the graph here and runs the layer eagerly.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), computed in the dtype of x, or of autocast where that is on."""
        recipe = recipe_of(x) if torch.is_grad_enabled() else None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _LoQTLinearFunction.apply(x, self.B, self.bias, self, recipe)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, side={self.side}, "
            f"scale={self.scale}, W={self.spec_w.kind}, P={self.spec_p.kind}, bias={self.bias is not None}"
        )
