"""Other ways to round a weight to four bits and to compensate for it, for `candidates.py`.

The product rounds to the nearest code under the largest magnitude of each block, and compensates in the Frobenius norm
(`loqt_ds.core.quantization`, `loqt_ds.core.compensation`). Here each of these can be something else. Clarity comes
before speed: what is found is dense, and packed by the product's own `quantize`, which gives codes and scales of values
that lie on its grid back unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loqt_ds.core.compensation import merge, solve_factor
from loqt_ds.core.quantization import BLOCKSIZE, QuantSpec, dequantize, quantize

CLIPPING = tuple(1.0 - 0.2 * i / 7 for i in range(8))  # of absmax, for the scale of a block; ties take the larger
DAMPING = 1e-3  # added to an importance whose mean is 1: no row or column counts for nothing


# ---------------------------------------------------------------- importance


@dataclass(frozen=True)
class Importance:
    """The diagonal Fisher information of a weight (out, in), factored: F_ij ≈ rows_i · columns_j; each has mean 1."""

    rows: Tensor  # (out,) float32
    columns: Tensor  # (in,) float32

    @staticmethod
    def of(rows: Tensor | None, columns: Tensor | None, shape: tuple[int, int]) -> Importance:
        """From mean squares; None, zeros only, or something not finite: alike for all."""
        like = rows if rows is not None else columns
        device = None if like is None else like.device
        return Importance(_normalized(rows, shape[0], device), _normalized(columns, shape[1], device))

    def scale(self, matrix: Tensor) -> Tensor:
        """√F ∘ matrix (out, in)."""
        return matrix * self.rows.sqrt()[:, None] * self.columns.sqrt()

    def whole(self) -> Tensor:
        """F (out, in)."""
        return self.rows[:, None] * self.columns


def _normalized(squares: Tensor | None, length: int, device: torch.device | None) -> Tensor:
    ones = torch.ones(length, device=device)
    if squares is None:
        return ones
    mean = float(squares.float().mean())
    return squares.float() / mean + DAMPING if math.isfinite(mean) and mean > 0 else ones


# ---------------------------------------------------------------- rounding


@lru_cache(maxsize=8)
def levels(kind: str, device: torch.device) -> Tensor:
    """The values that codes stand for, as fractions of the scale: ascending, each once, float32; the ends are ±1."""
    codes = torch.arange(0, 16, 2, dtype=torch.uint8) * 16 + torch.arange(1, 16, 2, dtype=torch.uint8)
    packed = {"codes": codes, "absmax": torch.ones(1).view(torch.uint8)}
    found = dequantize(packed, (1, 16), QuantSpec(kind)).unique()
    return found[found.abs() <= 1].to(device)  # int4 has a code for −8/7 that it does not use


@dataclass(frozen=True)
class Grid:
    """What values a weight may have: the levels of `kind` times a scale for each block of `blocksize` values.

    searches: the scale is that of CLIPPING times absmax with the smallest squared error, and not absmax itself.
    """

    kind: str
    blocksize: int = BLOCKSIZE
    searches: bool = False

    def nearest(self, matrix: Tensor, importance: Importance | None = None) -> Tensor:
        """The values (out, in) float32 nearest to a matrix (out, in); `importance` weighs errors of the search."""
        blocks = self._blocks(matrix)
        return self._matrix(self._round(blocks, self._scales(blocks, importance)), matrix)

    def stochastic(self, matrix: Tensor, generator: torch.Generator, importance: Importance | None = None) -> Tensor:
        """One of the two neighbouring values of each, so that the mean is the matrix (or, with a search, the clipped
        matrix). The generator is on the matrix's device."""
        blocks = self._blocks(matrix)
        scales = self._scales(blocks, importance)
        fractions, table = self._fractions(blocks, scales), levels(self.kind, blocks.device)
        upper = torch.bucketize(fractions, table).clamp_(min=1)
        below, above = table[upper - 1], table[upper]
        chance = torch.rand(fractions.shape, generator=generator, device=fractions.device)
        # An end of the table, where the block's scale comes from, is met exactly and stays.
        chosen = torch.where(chance < (fractions - below) / (above - below), above, below)
        return self._matrix(chosen * scales[:, None], matrix)

    def _blocks(self, matrix: Tensor) -> Tensor:
        flat = matrix.detach().float().reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.blocksize)).view(-1, self.blocksize)

    @staticmethod
    def _matrix(blocks: Tensor, like: Tensor) -> Tensor:
        return blocks.view(-1)[: like.numel()].view(like.shape)

    @staticmethod
    def _fractions(blocks: Tensor, scales: Tensor) -> Tensor:
        # A division, so that the largest of a block becomes ±1 exactly.
        return (blocks / torch.where(scales > 0, scales, 1.0)[:, None]).clamp_(-1.0, 1.0)

    def _round(self, blocks: Tensor, scales: Tensor) -> Tensor:
        if self.blocksize == BLOCKSIZE:  # by the product's look-up, which is faster; what is clipped has such a scale
            spec, clipped = QuantSpec(self.kind), blocks.clamp(-scales[:, None], scales[:, None])
            return dequantize(quantize(clipped, spec), (clipped.shape[0], BLOCKSIZE), spec)
        table = levels(self.kind, blocks.device)
        nearest = torch.bucketize(self._fractions(blocks, scales), (table[1:] + table[:-1]) / 2)
        return table[nearest] * scales[:, None]

    def _scales(self, blocks: Tensor, importance: Importance | None) -> Tensor:
        absmax = blocks.abs().amax(dim=1)
        if not self.searches:
            return absmax
        weights = None if importance is None else self._blocks(importance.whole())
        best, scales = torch.full_like(absmax, math.inf), absmax
        for part in CLIPPING:
            squares = (self._round(blocks, absmax * part) - blocks).square_()
            errors = (squares if weights is None else squares.mul_(weights)).sum(dim=1)
            scales = torch.where(errors < best, absmax * part, scales)
            best = torch.minimum(best, errors)
        return scales


# ---------------------------------------------------------------- compensation


@dataclass(frozen=True)
class Rounded:
    """What `compensate` in `loqt_ds.core.compensation` returns, with dense values in place of packed ones."""

    values: Tensor  # W_q (out, in) float32
    factor: Tensor  # (l, r) float32
    error_before: float
    error_after: float
    kept_iteration: int


@dataclass(frozen=True)
class LowRank:
    """The low-rank path of a layer: P̂ (k, r), the side it is on, and the scale s."""

    basis_hat: Tensor
    side: str
    scale: float

    def solve(self, error: Tensor, importance: Importance | None) -> Tensor:
        """The factor (l, r) that makes ‖√F ∘ (error − s · (P̂, B product))‖ smallest.

        With F_ij = rows_i · columns_j each vector of B along the long side is a least-squares problem of its own, which
        its own weight does not change: P̂ and the error are scaled along P's side, and that is all.
        """
        basis = self.basis_hat
        if importance is not None:
            roots = (importance.columns if self.side == "right" else importance.rows).sqrt()
            basis = basis * roots[:, None]
            error = error * (roots if self.side == "right" else roots[:, None])
        return solve_factor(error, basis, side=self.side, scale=self.scale)

    def without(self, weight: Tensor, factor: Tensor) -> Tensor:
        """weight − s · (P̂, B product)."""
        return merge(weight.clone(), self.basis_hat, factor, side=self.side, scale=-self.scale)


@torch.no_grad()
def compensate(
    weight: Tensor,
    path: LowRank,
    *,
    iterations: int,
    grid: Grid,
    importance: Importance | None = None,
    current: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Rounded:
    """Rounds a weight (out, in) float32 to a grid, and finds the factor that goes with it.

    The alternation of the product's `compensate`, the iterate with the smallest error under `importance` kept.

    Args:
        iterations: C; 0: no factor.
        current: the W_q (out, in) that is there, to begin the alternation with in place of the rounded weight.
        generator: the last rounding, of what the kept factor leaves of the weight, is stochastic; the factor is then
            found anew. The mean of W_eff over roundings is the weight, where nothing is clipped.
    """
    size = float(weight.norm())

    def length(error: Tensor) -> float:
        return float((error if importance is None else importance.scale(error)).norm())

    values = grid.nearest(weight, importance)
    before = float((weight - values).norm()) / max(size, 1e-30)
    kept_iteration, kept = 0, values
    long_side = weight.shape[0] if path.side == "right" else weight.shape[1]
    factor = torch.zeros(long_side, path.basis_hat.shape[1], device=weight.device)
    smallest = length(weight - values)
    values = values if current is None else current
    for iteration in range(1, iterations + 1):
        found = path.solve(weight - values, importance)
        rest = path.without(weight, found)
        if (error := length(rest - values)) < smallest:
            kept_iteration, kept, factor, smallest = iteration, values, found, error
        if iteration < iterations:
            values = grid.nearest(rest, importance)
    if generator is not None:
        kept = grid.stochastic(path.without(weight, factor), generator, importance)
        if iterations:
            factor = path.solve(weight - kept, importance)
    after = float((path.without(weight, factor) - kept).norm()) / max(size, 1e-30)
    return Rounded(kept, factor, before, after, kept_iteration)
