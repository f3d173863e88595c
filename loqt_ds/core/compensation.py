"""Quantizing a weight and choosing the trained factor so that it makes up for the error.

Idea: with P̂ fixed, alternate between the two things that can be chosen, starting from Ŵ = W:

    W_q ← quant(Ŵ);    B ← argmin_B ‖W − W_q − s · (P̂, B product)‖;    Ŵ ← W − s · (P̂, B product)

and keep the iterate with the smallest ‖W − W_eff‖_F (LoQT, arXiv 2405.16528, section 3.2 and algorithm 1, lines 9-14).
The least-squares factor, in the canonical orientation of `subspace` (E is the residual W − W_q):

    F = (1/s) · Eᵀ P̂ (P̂ᵀP̂)⁻¹  (left),      F = (1/s) · E P̂ (P̂ᵀP̂)⁻¹  (right)

Departures: the r × r Gram matrix is factored by Cholesky in float64 (P̂ is only nearly orthonormal after quantization,
and nearly is enough for that), once for all iterations, instead of a pseudo-inverse of P̂ in each; the best iterate is
kept, not the last, because re-quantizing moves the block scales and can make things worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantization import Packed, QuantSpec, dequantize, quantize
from .subspace import squared_norm

# Below this ratio of its diagonal's ends, a float32 Cholesky factor no longer solves to float32 accuracy.
_SMALLEST_PIVOT_RATIO = 1e-3


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
    norm = math.sqrt(squared_norm(weight))
    if not math.isfinite(norm):
        raise ValueError(f"a weight of shape {shape} has values that are not finite; it cannot be quantized")

    packed = quantize(weight, spec)
    buffer = dequantize(packed, shape, spec, out=torch.empty_like(weight, memory_format=torch.contiguous_format))
    torch.sub(weight, buffer, out=buffer)  # from here on the residual E of the current W_q
    error_before = _relative(buffer, norm)
    length = weight.shape[0] if side == "right" else weight.shape[1]
    factor = torch.zeros(length, basis_hat.shape[1], dtype=torch.float32, device=weight.device)
    best = Compensated(packed, factor, error_before, error_before, 0)
    if spec.kind == "none":
        return best

    solver = _GramSolver(basis_hat) if iterations else None
    for iteration in range(1, iterations + 1):
        assert solver is not None
        factor = solver.factor(buffer, basis_hat, side=side, scale=scale)
        error = _relative(_add_product(buffer, basis_hat, factor, side=side, scale=-scale), norm)
        if error < best.error_after:
            best = Compensated(packed, factor, error_before, error, iteration)
        if iteration == iterations:
            break
        buffer.copy_(weight)
        packed = quantize(_add_product(buffer, basis_hat, factor, side=side, scale=-scale), spec)
        torch.sub(weight, dequantize(packed, shape, spec, out=buffer), out=buffer)
    return best


@torch.no_grad()
def merge(weight_q: Tensor, basis_hat: Tensor, factor: Tensor, *, side: str, scale: float) -> Tensor:
    """W_eff (out, in) float32. A float32 `weight_q` is changed in place and returned, others are copied."""
    return _add_product(
        weight_q.detach().float(), basis_hat.detach().float(), factor.detach().float(), side=side, scale=scale
    )


@torch.no_grad()
def solve_factor(residual: Tensor, basis_hat: Tensor, *, side: str, scale: float) -> Tensor:
    """The canonical factor (l, r) float32 that minimizes ‖residual − s · (P̂, B product)‖_F, residual (out, in).

    Where P̂ has dependent columns, the smallest such factor. Raises ValueError for a scale that is not positive.
    """
    _check_scale(scale)
    basis_hat = basis_hat.detach().float()
    return _GramSolver(basis_hat).factor(residual.detach().float(), basis_hat, side=side, scale=scale)


class _GramSolver:
    """X ↦ X (P̂ᵀP̂)⁻¹ for X (l, r). The Gram matrix is formed and factored in float64, applied in float32."""

    def __init__(self, basis_hat: Tensor) -> None:
        wide = basis_hat.double()  # (k, r)
        gram = wide.T @ wide  # (r, r)
        factor, info = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal()
        # P̂ of any sane training run passes. A zero or repeated column of P̂ does not, and then the pseudo-inverse of the
        # Gram matrix gives the smallest least-squares solution: directions that are not there get no weight.
        self.cholesky: Tensor | None = None
        if int(info) == 0 and float(pivots.min()) > _SMALLEST_PIVOT_RATIO * float(pivots.max()):
            self.cholesky = factor.float()
            return
        values, vectors = torch.linalg.eigh(gram)
        threshold = max(wide.shape) * torch.finfo(torch.float32).eps * float(values[-1])
        kept = values > threshold
        inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
        self.inverse = ((vectors * inverse) @ vectors.T).float()

    def factor(self, residual: Tensor, basis_hat: Tensor, *, side: str, scale: float) -> Tensor:
        product = (residual if side == "right" else residual.T) @ basis_hat  # (l, r)
        if self.cholesky is not None:
            return torch.cholesky_solve(product.T, self.cholesky).T.div(scale).contiguous()
        return (product @ self.inverse).div_(scale)


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"loqt.alpha={scale} cannot scale the low-rank factor; use a finite value above 0")


def _add_product(matrix: Tensor, basis_hat: Tensor, factor: Tensor, *, side: str, scale: float) -> Tensor:
    """matrix += scale · (P̂, B product), in place."""
    assert side in ("left", "right"), side
    if side == "right":
        return matrix.addmm_(factor, basis_hat.T, alpha=scale)  # (out, r) (r, in)
    return matrix.addmm_(basis_hat, factor.T, alpha=scale)  # (out, r) (r, in)


def _relative(residual: Tensor, norm: float) -> float:
    return math.sqrt(squared_norm(residual)) / norm if norm else 0.0
