"""Quantizing a weight and choosing the trained factor so that it makes up for the error.

Idea: with P̂ fixed, alternate between the two things that can be chosen, starting from Ŵ = W:

    W_q ← quant(Ŵ);    B ← argmin_B ‖W − W_q − s · (P̂, B product)‖;    Ŵ ← W − s · (P̂, B product)

and keep the iterate with the smallest ‖W − W_eff‖_F (LoQT, arXiv 2405.16528, section 3.2 and algorithm 1, lines 9-14).
The least-squares factor, in the canonical orientation of `subspace` (E is the residual W − W_q):

    F = (1/s) · Eᵀ P̂ (P̂ᵀP̂)⁻¹  (left),      F = (1/s) · E P̂ (P̂ᵀP̂)⁻¹  (right)

It is computed through orthonormal columns Q of P̂'s span, P̂ = Q Cᵀ with C the Cholesky factor of P̂ᵀP̂: with Y = E Q (or
Eᵀ Q), the product that is taken away is Y Qᵀ, the error that remains is ‖E‖² − ‖Y‖², and F = (1/s) Y C⁻¹ is needed of
the kept iterate only. An iteration is two products with Q and one quantization.

Departures: C is found in float64 (P̂ is only nearly orthonormal after quantization, and nearly is enough for that), once
for all iterations, instead of a pseudo-inverse of P̂ in each; the best iterate is kept, not the last, because
re-quantizing moves the block scales and can make things worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantization import Packed, QuantSpec, dequantize, quantize

# Below this ratio of its diagonal's ends, the columns of P̂ are taken to be dependent.
_SMALLEST_PIVOT_RATIO = 1e-3
# Below this part of ‖E‖², a difference of two squared norms of float32 matrices is not exact enough.
_SMALLEST_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Compensated:
    """A quantized weight and the factor that goes with it."""

    packed: Packed
    factor: Tensor
    """(l, r) float32, canonical: B where P is on the right, Bᵀ where it is on the left."""
    error_before: float
    """‖W − quant(W)‖_F / ‖W‖_F."""
    error_after: float
    """‖W − W_eff‖_F / ‖W‖_F of the iterate that was kept."""
    kept_iteration: int
    """1 … iterations; 0 where nothing was compensated or no iterate was better than plain quantization."""


@torch.no_grad()
def compensate(
    weight: Tensor, basis_hat: Tensor, *, side: str, scale: float, iterations: int, spec: QuantSpec
) -> Compensated:
    """Quantizes `weight` (out, in) float32 under `spec`, with `iterations` rounds of compensation by P̂ (k, r) float32.

    The input is not changed. One temporary of the weight's size is held. Without quantization, or with no iterations,
    the factor is zero. Raises ValueError for a scale that is not positive, and for a weight that is not finite.
    """
    _check_scale(scale)
    weight, basis_hat = weight.detach().float(), basis_hat.detach().float()
    shape = (weight.shape[0], weight.shape[1])
    norm = math.sqrt(_squared(weight))
    if not math.isfinite(norm):
        raise ValueError(f"a weight of shape {shape} has values that are not finite; it cannot be quantized")

    packed = quantize(weight, spec)
    # From here on the residual E of the current W_q.
    residual = _residual(weight, packed, spec, torch.empty_like(weight, memory_format=torch.contiguous_format))
    squared_error = _squared(residual)
    error_before = error_after = _relative(squared_error, norm)
    kept_iteration, kept, kept_y = 0, packed, None
    span = _Span(basis_hat) if iterations and spec.kind != "none" else None
    for iteration in range(1, iterations + 1 if span else 1):
        assert span is not None
        y = span.coordinates(residual, side=side)
        error = _relative(_remaining(squared_error, residual, y, span, side=side), norm)
        if error < error_after:
            kept_iteration, kept, kept_y, error_after = iteration, packed, y, error
        if iteration < iterations:
            packed = quantize(span.without(weight, y, side=side, out=residual), spec)
            squared_error = _squared(_residual(weight, packed, spec, residual))
    if kept_y is None:
        length = weight.shape[0] if side == "right" else weight.shape[1]
        factor = torch.zeros(length, basis_hat.shape[1], dtype=torch.float32, device=weight.device)
    else:
        assert span is not None
        factor = span.factor(kept_y, scale=scale)
    return Compensated(kept, factor, error_before, error_after, kept_iteration)


def _residual(weight: Tensor, packed: Packed, spec: QuantSpec, out: Tensor) -> Tensor:
    """W − W_q, into `out`."""
    return torch.sub(weight, dequantize(packed, (weight.shape[0], weight.shape[1]), spec, out=out), out=out)


def _remaining(squared_error: float, residual: Tensor, y: Tensor, span: _Span, *, side: str) -> float:
    """‖E − Y Qᵀ‖², given ‖E‖²."""
    difference = squared_error - _squared(y)
    if difference > _SMALLEST_DIFFERENCE * squared_error:
        return difference
    return _squared(span.without(residual, y, side=side))


@torch.no_grad()
def merge(weight_q: Tensor, basis_hat: Tensor, factor: Tensor, *, side: str, scale: float) -> Tensor:
    """W_eff (out, in) float32. A float32 `weight_q` is changed in place and returned, others are copied."""
    assert side in ("left", "right"), side
    result, basis_hat, factor = weight_q.detach().float(), basis_hat.detach().float(), factor.detach().float()
    first, second = (factor, basis_hat.T) if side == "right" else (basis_hat, factor.T)
    return result.addmm_(first, second, alpha=scale)


@torch.no_grad()
def solve_factor(residual: Tensor, basis_hat: Tensor, *, side: str, scale: float) -> Tensor:
    """The canonical factor (l, r) float32 that minimizes ‖residual − s · (P̂, B product)‖_F, residual (out, in).

    Where P̂ has dependent columns, the smallest such factor. Raises ValueError for a scale that is not positive.
    """
    _check_scale(scale)
    span = _Span(basis_hat.detach().float())
    return span.factor(span.coordinates(residual.detach().float(), side=side), scale=scale)


class _Span:
    """Orthonormal columns Q (k, r') of the span of P̂ (k, r), r' ≤ r, and what makes factors of coordinates along them.
    Found in float64, kept in float32."""

    def __init__(self, basis_hat: Tensor) -> None:
        wide = basis_hat.double()  # (k, r)
        gram = wide.T @ wide  # (r, r)
        cholesky, info = torch.linalg.cholesky_ex(gram)
        pivots = cholesky.diagonal()
        # P̂ of any sane training run passes. A zero or repeated column of P̂ does not, and then the pseudo-inverse of the
        # Gram matrix gives the smallest least-squares solution: directions that are not there get no weight.
        if int(info) == 0 and float(pivots.min()) > _SMALLEST_PIVOT_RATIO * float(pivots.max()):
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            to_factor = torch.linalg.solve_triangular(cholesky, identity, upper=False)  # C⁻¹
            columns = wide @ to_factor.T
        else:
            values, vectors = torch.linalg.eigh(gram)
            threshold = max(wide.shape) * torch.finfo(torch.float32).eps * float(values[-1])
            kept = values > threshold
            to_factor = (vectors[:, kept] / values[kept].sqrt()).T
            columns = wide @ to_factor.T
        self.columns, self._to_factor = columns.float().contiguous(), to_factor.float().contiguous()

    def coordinates(self, residual: Tensor, *, side: str) -> Tensor:
        """Y (l, r'): the residual (out, in) along the columns."""
        return (residual if side == "right" else residual.T) @ self.columns

    def without(self, matrix: Tensor, y: Tensor, *, side: str, out: Tensor | None = None) -> Tensor:
        """matrix − Y Qᵀ, or its transpose, (out, in); into `out`, where given."""
        assert side in ("left", "right"), side
        first, second = (y, self.columns.T) if side == "right" else (self.columns, y.T)
        return torch.addmm(matrix, first, second, alpha=-1.0, out=out)

    def factor(self, y: Tensor, *, scale: float) -> Tensor:
        """The canonical F (l, r) with s F P̂ᵀ = Y Qᵀ."""
        return (y @ self._to_factor).div_(scale)


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"loqt.alpha={scale} cannot scale the low-rank factor; use a finite value above 0")


def _squared(matrix: Tensor) -> float:
    """‖matrix‖²: sums of rows in float32, of which the sum is taken in float64. Synchronizes with the device."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square_().sum())


def _relative(squared: float, norm: float) -> float:
    return math.sqrt(squared) / norm if norm else 0.0
