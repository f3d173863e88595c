"""The layer: a frozen quantized weight, a frozen quantized projection, and one trained factor.

For `nn.Linear` with weight W of shape (out, in), scale s and rank r (paper section 3.1; ALGORITHM.md, "Layer"):

    side "right" (in <= out):  y = x W_q^T + s (x P) B^T + b      P (in, r), B (out, r)
    side "left"  (in > out):   y = x W_q^T + s (x B^T) P^T + b    P (out, r), B (r, in)

The layer is computed in this *factored* form; or *merged*, y = x W_effᵀ, with W_eff = W_q + s (product of P and B) made
in a shared buffer for the moment of the product, which takes fewer operations where there are many tokens (see
`LoQTLinear.product_of`). The gradient of B is the same two products in both. W_q and P are buffers of packed bytes
(uint8), so no cast, broadcast or optimizer of anybody touches them. The autograd function saves what the gradient of B
needs and nothing dequantized: x P on the right side, x on the left side, and x on both while the layer is tapped; where
x carries a recipe (`recompute`), what x is computed from instead. The dense gradient of W is never formed in an
ordinary step; while `tap` is set, the backward hands (dY, X) to it.

Legend: T tokens; k the side P lives on, l the other; "canonical" tensors are A (k, l), P (k, r), F (l, r).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loqt_ds.core.compensation import merge
from loqt_ds.core.quantization import Packed, QuantSpec, dequantize, dequantized, packed_layout, scratch
from loqt_ds.method import operators
from loqt_ds.method.recompute import Recipe, kept_inputs, recipe_of

Tap = Callable[[Tensor, Tensor], None]

# Of these, W_eff is no less exact than the two products it replaces; bf16 would round small steps of B away in it.
_MERGES_BY_ITSELF = (torch.float32, torch.float64)


class _LoQTLinearFunction(torch.autograd.Function):
    """y and its gradients with respect to x, B and the bias; W and P are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        bias: Tensor | None,
        layer: LoQTLinear,
        recipe: Recipe | None,
        training: bool,
    ) -> Tensor:
        wants_projected = training and factor.requires_grad
        y, projected = layer.multiply(x, factor, bias, training=training, wants_projected=wants_projected)
        keeps_x = layer.tap is not None or layer.side == "left"
        ctx.save_for_backward(factor, projected, *(_inputs_of(x, recipe) if keeps_x else ()))
        ctx.compute_x = recipe.computation if recipe is not None and keeps_x else None
        ctx.layer, ctx.tapped, ctx.x_dtype = layer, layer.tap is not None, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.versions = layer.versions()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        layer: LoQTLinear = ctx.layer
        if ctx.versions != layer.versions():
            raise RuntimeError("W or P of a LoQTLinear was rewritten between its forward and its backward")
        factor, projected, *inputs = kept_inputs(ctx, ctx.compute_x)

        def compute_x() -> Tensor:
            x: Tensor = inputs[0] if ctx.compute_x is None else ctx.compute_x(*inputs).to(ctx.x_dtype)
            return x

        wanted, tap = ctx.needs_input_grad[:3], layer.tap if ctx.tapped else None
        dx, dfactor, dbias = layer.differentiate(grad_output, factor, projected, compute_x, wanted=wanted, tap=tap)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, dfactor, dbias, None, None, None


# One dequantized matrix is alive at a time where the product is factored, in memory that all layers share: hence the
# order of products. Where it is merged, P is there too while W_eff is made.


def _factored_forward(
    layer: LoQTLinear, rows: Tensor, b: Tensor, bias: Tensor | None, *, wants_projected: bool
) -> tuple[Tensor, Tensor | None]:
    """y (T, out), and x P (T, r) where the gradient of B needs it."""
    dtype, right = rows.dtype, layer.side == "right"
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
    return y, projected if wants_projected else None


def _factored_dx(layer: LoQTLinear, dy: Tensor, b: Tensor, inner: Tensor) -> Tensor:
    """dy W_eff (T, in)."""
    with layer.weight_q_buffer(dy.dtype) as w:
        dx = dy @ w
    if layer.side == "left":
        return dx.addmm_(inner, b, alpha=layer.scale)
    with layer.basis_hat_buffer(dy.dtype) as p:
        return dx.addmm_(inner, p.t(), alpha=layer.scale)


def _merged_forward(
    layer: LoQTLinear, rows: Tensor, b: Tensor, bias: Tensor | None, *, wants_projected: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_factored_forward`, by W_eff."""
    with layer.effective_weight_buffer(b) as w:
        y = nn.functional.linear(rows, w, None if bias is None else bias.to(rows.dtype))
    if not wants_projected or layer.side == "left":
        return y, None
    with layer.basis_hat_buffer(rows.dtype) as p:
        return y, rows @ p


def _inputs_of(x: Tensor, recipe: Recipe | None) -> tuple[Tensor, ...]:
    """What is kept for x: x, or what it can be computed from."""
    return (x,) if recipe is None else recipe.tensors


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
        product: factored, merged, or auto for whichever takes fewer operations (see `product_of`).

    W, P and B are zero until they are set. State: uint8 buffers `w_*` and `p_*` (parameters where an engine shards
    them), parameters `B` and `bias`.
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
        product: str = "auto",
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
        self.product = product
        self.tap: Tap | None = None
        self.is_stored_transposed = False  # in checkpoints of others: (in, out), as GPT-2's Conv1D
        self.is_conditional = False  # an expert: there are steps in which it is not called
        self.keeps_dequantized = False
        self._kept: tuple[tuple[int, ...], Tensor] | None = None  # W_q, and the versions of the bytes it is of
        self._num_bytes: dict[str, int] = {}
        for prefix, shape, spec in (("w", self.weight_shape, spec_w), ("p", self.basis_shape, spec_p)):
            for key, num_bytes in packed_layout(shape, spec).items():
                self._num_bytes[f"{prefix}_{key}"] = num_bytes
                self.register_buffer(f"{prefix}_{key}", torch.zeros(num_bytes, dtype=torch.uint8, device=device))
        self._whole: dict[str, Tensor] | None = None  # the bytes of W and P by name, where they stand for sharded ones
        shape_b = (out_features, rank) if side == "right" else (rank, in_features)
        self.B = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.handle = operators.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = operators.register(self)  # a copy is another layer

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def basis_shape(self) -> tuple[int, int]:
        """(k, r): k is the side that P lives on."""
        return (self.in_features if self.side == "right" else self.out_features), self.rank

    @property
    def dequantized_bytes(self) -> int:
        """Of W_q in the dtype of B."""
        return self.out_features * self.in_features * self.B.dtype.itemsize

    @property
    def factor_length(self) -> int:
        """l: the side that B lives on."""
        return self.out_features if self.side == "right" else self.in_features

    @property
    def weight(self) -> Tensor:
        """A tensor (out, in) in the dtype of B that has no values, for code that asks a linear for its shape, dtype or
        device (T5 does before it calls one); computing with it raises. See `weight_q` and `effective_weight`."""
        return torch.empty(self.weight_shape, dtype=self.B.dtype, device="meta")

    @property
    def packed_bytes(self) -> dict[str, int]:
        """How many bytes of W and P there are, by the names of the tensors."""
        return dict(self._num_bytes)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The bytes of W and P themselves, uint8 by name: buffers, or views of parameters (`packed_to_parameters`)."""
        if self._whole is not None:
            return self._whole
        tensors = {name: getattr(self, name) for name in self._num_bytes}
        if isinstance(next(iter(tensors.values())), nn.Parameter):
            return {name: words.view(torch.uint8)[: self._num_bytes[name]] for name, words in tensors.items()}
        return tensors

    def _packed(self, prefix: str) -> Packed:
        return {name[2:]: tensor for name, tensor in self.packed_tensors().items() if name.startswith(prefix)}

    def packed_w(self) -> Packed:
        """The bytes of W themselves, by key."""
        return self._packed("w_")

    def packed_p(self) -> Packed:
        """The bytes of P themselves, by key."""
        return self._packed("p_")

    def packed_to_parameters(self, dtype: torch.dtype) -> None:
        """Makes frozen parameters of the buffers of W and P, for an engine that shards parameters: words of a dtype
        that it does not cast, with zeros up to whole ones. (FSDP2 of torch up to 2.11 casts integers too.)"""
        for name, num_bytes in self._num_bytes.items():
            buffer = self._buffers.pop(name)
            assert buffer is not None
            words = nn.functional.pad(buffer, (0, -num_bytes % dtype.itemsize)).view(dtype)
            self.register_parameter(name, nn.Parameter(words, requires_grad=False))

    def hold_whole(self, tensors: dict[str, Tensor] | None) -> None:
        """Until it is called with None, W and P are these bytes, by name, whole where the layer's own are sharded."""
        self._whole = tensors

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
        return tuple(tensor._version for tensor in self.packed_tensors().values())

    def weight_q(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized W_q, (out, in). May share memory with the buffer where W is not quantized."""
        return dequantize(self.packed_w(), self.weight_shape, self.spec_w, dtype=dtype)

    def basis_hat(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized P, (k, r). May share memory with the buffer where P is not quantized."""
        return dequantize(self.packed_p(), self.basis_shape, self.spec_p, dtype=dtype)

    def product_of(self, num_tokens: int, dtype: torch.dtype, *, training: bool) -> str:
        """How y and dx of this many tokens are computed: "factored", x W_qᵀ plus the low-rank path, or "merged", by
        W_eff, which is made for the moment of each product.

        Making W_eff takes 2 m n r operations, in the forward and again in the backward; it saves 2 r (2 l + k) for each
        token, l and k the sides of B and P (2 r (l + k) where there is no backward).
        """
        if self.product != "auto":
            return self.product
        if dtype not in _MERGES_BY_ITSELF:
            return "factored"
        (k, _), length = self.basis_shape, self.factor_length
        making, saved = (2 * k * length, 2 * length + k) if training else (k * length, length + k)
        return "merged" if num_tokens * saved > making else "factored"

    def weight_q_buffer(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """W_q, (out, in), for as long as the context lasts, in memory that all layers use in turn. Read only."""
        if self._is_kept(dtype):
            return nullcontext(self._kept_weight())
        return dequantized(self.packed_w(), self.weight_shape, self.spec_w, dtype=dtype)

    @contextmanager
    def effective_weight_buffer(self, b: Tensor) -> Iterator[Tensor]:
        """W_eff, (out, in), from B in the dtype of the computation, as `weight_q_buffer`."""
        dtype = b.dtype
        is_shared = self._is_kept(dtype) or (self.spec_w.kind == "none" and self.spec_w.dense_dtype == dtype)
        with ExitStack() as held:
            weight_q = held.enter_context(self.weight_q_buffer(dtype))
            weight = held.enter_context(scratch(self.weight_shape, dtype, b.device)) if is_shared else weight_q
            p = held.enter_context(self.basis_hat_buffer(dtype))
            one, two = (b, p.t()) if self.side == "right" else (p, b)
            yield torch.addmm(weight_q, one, two, alpha=self.scale, out=weight)

    def _is_kept(self, dtype: torch.dtype) -> bool:
        return self.keeps_dequantized and dtype == self.B.dtype

    def _kept_weight(self) -> Tensor:
        """W_q in the dtype of B, dequantized again only where its bytes have changed since."""
        versions, like = self.versions(), (self.B.dtype, self.B.device)
        kept = self._kept if self._kept is not None and (self._kept[1].dtype, self._kept[1].device) == like else None
        if kept is None or kept[0] != versions:
            out = None if kept is None else kept[1]
            self._kept = None  # before another is made
            with torch.inference_mode(False), torch.no_grad():
                kept = versions, dequantize(self.packed_w(), self.weight_shape, self.spec_w, dtype=like[0], out=out)
            self._kept = kept
        return kept[1]

    def stop_keeping_dequantized(self) -> None:
        """Gives the memory of a W that was kept dequantized back; from now on it is dequantized for each product."""
        self.keeps_dequantized, self._kept = False, None

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

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), computed in the dtype of x, or of autocast where that is on."""
        # Dynamo would drop a recipe: there, it is the compiler that decides what is computed again.
        recipe = recipe_of(x) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():
            return operators.call(self, x)
        return _LoQTLinearFunction.apply(x, self.B, self.bias, self, recipe, torch.is_grad_enabled())

    def multiply(
        self, x: Tensor, factor: Tensor, bias: Tensor | None, *, training: bool, wants_projected: bool
    ) -> tuple[Tensor, Tensor | None]:
        """y (..., out) of x (..., in), and x P (T, r) where it is wanted and P is on the right side. No graph."""
        rows = x.reshape(-1, self.in_features)  # (T, in)
        if not len(rows):  # an expert without tokens: nothing is dequantized
            projected = rows.new_zeros(0, self.rank) if wants_projected and self.side == "right" else None
            return x.new_zeros(*x.shape[:-1], self.out_features), projected
        product = _merged_forward if self._merges(rows, training=training) else _factored_forward
        y, projected = product(self, rows, factor.to(x.dtype), bias, wants_projected=wants_projected)
        return y.view(*x.shape[:-1], self.out_features), projected

    def differentiate(
        self,
        grad_output: Tensor,
        factor: Tensor,
        projected: Tensor | None,
        compute_x: Callable[[], Tensor],
        *,
        wanted: Sequence[bool],
        tap: Tap | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (x, B, bias), those of them that are wanted, of a `multiply` in training; x is computed only
        where it is needed, `tap` called where it is given. The gradient of the bias is in the dtype of grad_output."""
        dy = grad_output.reshape(-1, self.out_features)  # (T, out)
        need_x, need_factor, need_bias = wanted
        if not len(dy):  # no token: zeros, and nothing to tap
            return (
                dy.new_zeros(*grad_output.shape[:-1], self.in_features) if need_x else None,
                torch.zeros_like(factor) if need_factor else None,
                dy.new_zeros(self.out_features) if need_bias and self.bias is not None else None,
            )
        b, right, merged = factor.to(dy.dtype), self.side == "right", self._merges(dy, training=True)
        inner = None  # (T, r): what reaches the low-rank path from above
        if right:
            inner = dy @ b if need_x and not merged else None
        elif need_factor or (need_x and not merged):
            with self.basis_hat_buffer(dy.dtype) as p:
                inner = dy @ p
        rows: Any = None  # (T, in)
        if tap is not None or (need_factor and not right):
            rows = compute_x().reshape(-1, self.in_features)
        dx = dfactor = dbias = None
        if need_factor:
            product = dy.t() @ projected if right else inner.t() @ rows  # type: ignore[operator,union-attr]
            dfactor = product.mul_(self.scale).to(factor.dtype)
        if tap is not None:
            tap(dy, rows)
        if need_bias and self.bias is not None:
            dbias = dy.sum(0)
        if need_x:
            rows = None  # x that was computed again goes before dx, of the same size, comes
            if merged:
                with self.effective_weight_buffer(b) as w:
                    dx = dy @ w  # (T, in)
            else:
                assert inner is not None
                dx = _factored_dx(self, dy, b, inner)
            dx = dx.view(*grad_output.shape[:-1], self.in_features)
        return dx, dfactor, dbias

    def _merges(self, rows: Tensor, *, training: bool) -> bool:
        return self.product_of(len(rows), rows.dtype, training=training) == "merged"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, side={self.side}, "
            f"scale={self.scale}, W={self.spec_w.kind}, P={self.spec_p.kind}, bias={self.bias is not None}"
        )
