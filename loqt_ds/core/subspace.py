"""From the gradient of a weight, or a linear sketch of it, to the frozen low-rank factor P.

Idea: P spans the directions, on the smaller side of the weight, that hold most of the gradient's energy:

    P = the top r left singular vectors of A,      captured energy = ‖Pᵀ A‖² / ‖A‖²

(LoQT, arXiv 2405.16528, section 3.1; the projection is GaLore's, arXiv 2403.03507.) Four ways to it: the exact SVD of
A; the eigenvectors of A Aᵀ (k × k, formed and solved in float64, because it squares the condition number); subspace
iteration, U ← orth(A Aᵀ U) from r + p Gaussian columns, and then the SVD of Uᵀ A, which costs less than either while
r + p is well below k (Halko, Martinsson, Tropp, arXiv 0909.4061, section 4.5); and the SVD of a sketch S = A Ω, which
can be summed over micro-batches and ranks without A ever existing. Ω starts Gaussian and is turned by power iterations,
Ω ← orth(Aᵀ A Ω), on the first micro-batch of all ranks. Starting from the first moment of the trained factor, an
average of earlier AᵀP, was measured and is not better once there is an iteration (benchmarks/results/reinit).

Departures from the paper: it uses the exact SVD only. Directions that the gradient does not have (fewer tokens than the
rank) are taken from the old P, then at random, instead of being whatever a decomposition of rounding errors returns.

Legend (used all over the package). The weight W and its gradient G have shape (out, in).
  side "right", in ≤ out: A = Gᵀ (in, out);  P (in, r);   B (out, r) = F;   W_eff = W_q + s · B Pᵀ
  side "left",  in > out: A = G  (out, in);  P (out, r);  B (r, in)  = Fᵀ;  W_eff = W_q + s · P B
"Canonical" names: A is (k, l), P is (k, r), the factor F is (l, r).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

SIDES = ("auto", "left", "right")
POWER_ITERATIONS = 2  # of subspace iteration, and of the columns that a sketch is taken with

# Directions of the old P whose part outside the new one is shorter than this are rounding errors of quantization.
_SMALLEST_RESIDUAL = 1e-2
# Values converted to float64 at once.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions, strongest first."""

    vectors: Tensor
    """(k, numerical_rank) float32."""
    numerical_rank: int
    """How many directions the matrix has, at most the rank asked for."""
    values: Tensor
    """(numerical_rank,) float64: ‖vᵀ A‖ of each direction v, that is, the singular values of A or of its sketch."""


@dataclass(frozen=True)
class Completed:
    """A basis filled up to its rank, and where the filling came from."""

    vectors: Tensor
    """(k, rank) float32, orthonormal columns."""
    num_from_previous: int
    num_random: int


def resolve_side(side: str, out_features: int, in_features: int) -> str:
    """ "right" (P on the input side) or "left" (P on the output side). "auto" puts P on the smaller one."""
    if side not in SIDES:
        raise ValueError(f"side={side!r} does not exist; use one of {', '.join(SIDES)}")
    if side != "auto":
        return side
    return "right" if in_features <= out_features else "left"


def layer_seed(seed: int, step: int, name: str) -> int:
    """A 63-bit number for one layer at one step: the same in every process, Python version and machine."""
    digest = hashlib.blake2b(f"{seed}\n{step}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---- decompositions -------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_basis(gradient: Tensor, rank: int) -> Basis:
    """Top singular vectors of `gradient` (k, l) by a float32 SVD. Raises LinAlgError where that fails."""
    left, values, _ = torch.linalg.svd(gradient.detach().float(), full_matrices=False)
    return _cut(left, values, rank, _tolerance(gradient))


@torch.no_grad()
def gram_basis(gradient: Tensor, rank: int) -> Basis:
    """Top singular vectors of `gradient` (k, l) as eigenvectors of its (k, k) Gram matrix, in float64.

    Raises LinAlgError where the eigendecomposition fails.
    """
    vectors, values = _left_vectors(gradient.detach())
    return _cut(vectors, values, rank, _tolerance(gradient))


def _left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, m) of a matrix (m, n) and its min(m, n) singular values, largest first, float64."""
    num_rows, num_columns = matrix.shape
    gram = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=matrix.device)
    for chunk in matrix.split(max(1, _CHUNK // max(num_rows, 1)), dim=1):  # never a float64 copy of the whole
        wide = chunk.double()
        gram.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(gram)  # ascending; eigenvectors are the COLUMNS
    values, vectors = values.flip(0).clamp_(min=0).sqrt_(), vectors.flip(1)
    return vectors, values[: min(num_rows, num_columns)]


@torch.no_grad()
def sketch_basis(sketch: Tensor, rank: int) -> Basis:
    """Top singular vectors of a sketch S = A Ω (k, c): QR, then those of the small triangle R, as eigenvectors of
    R Rᵀ in float64."""
    q, r = torch.linalg.qr(sketch.detach().float())  # (k, min(k, c)), (min(k, c), c)
    left, values = _left_vectors(r)
    small = _cut(left, values, rank, _tolerance(sketch))
    return Basis(q @ small.vectors, small.numerical_rank, small.values)


@torch.no_grad()
def iterated_basis(gradient: Tensor, rank: int, *, oversampling: int, seed: int) -> Basis:
    """Top singular vectors of `gradient` (k, l), up to what POWER_ITERATIONS leave unseparated, in float32."""
    matrix = gradient.detach().float()
    num_columns = min(rank + oversampling, *matrix.shape)
    # The columns rather than A are scaled, so that products of a tiny gradient do not underflow, without a copy of it.
    size = max(*(abs(float(end)) for end in torch.aminmax(matrix)), 1e-30)
    columns = _gaussian(len(matrix), num_columns, _generator(seed, "subspace iteration")).to(matrix.device)
    for _ in range(POWER_ITERATIONS):
        columns = orthonormal(matrix @ (matrix.T @ (columns / size)))  # (k, c)
    left, values = _left_vectors(columns.T @ matrix)  # (c, c)
    small = _cut(left, values, rank, _tolerance(matrix))
    return Basis(columns @ small.vectors, small.numerical_rank, small.values)


_METHODS: dict[str, tuple[str, ...]] = {
    "exact": ("exact", "gram"),
    "gram": ("gram", "exact"),
    "iterated": ("iterated", "gram", "exact"),
    "sketch": ("sketch", "exact"),
}


def decompose(gradient: Tensor, rank: int, method: str, *, oversampling: int = 32, seed: int = 0) -> tuple[Basis, str]:
    """The basis of `gradient` (k, l), or of a sketch (k, c), by `method`; where that fails, by the next one.

    `oversampling` and `seed` are those of subspace iteration; the others do not use them. Returns the basis and the
    method that gave it. Raises LinAlgError, naming every attempt, when all fail: the caller decides what that means (a
    training run keeps its old P).
    """
    if method not in _METHODS:
        raise ValueError(f"subspace method {method!r} does not exist; use one of {', '.join(_METHODS)}")
    functions: dict[str, Callable[[Tensor, int], Basis]] = {
        "exact": exact_basis,
        "gram": gram_basis,
        "iterated": partial(iterated_basis, oversampling=oversampling, seed=seed),
        "sketch": sketch_basis,
    }
    failures = []
    for name in _METHODS[method]:
        try:
            return functions[name](gradient, rank), name
        except torch.linalg.LinAlgError as error:
            failures.append(f"{name}: {error}")
    raise torch.linalg.LinAlgError(f"no decomposition of a {tuple(gradient.shape)} matrix: {'; '.join(failures)}")


def _tolerance(matrix: Tensor) -> float:
    # Singular values below this part of the largest are rounding errors of a float32 matrix.
    return max(matrix.shape) * torch.finfo(torch.float32).eps


def _cut(vectors: Tensor, values: Tensor, rank: int, tolerance: float) -> Basis:
    """The first `rank` columns, less those whose singular value is a rounding error."""
    largest = float(values[0]) if values.numel() else 0.0
    # Some builds return NaN instead of raising; a NaN basis must never reach a weight.
    if not bool(torch.isfinite(values).all()) or not bool(torch.isfinite(vectors).all()):
        raise torch.linalg.LinAlgError("the decomposition returned values that are not finite")
    numerical_rank = 0 if largest == 0.0 else min(rank, int((values > tolerance * largest).sum()))
    return Basis(vectors[:, :numerical_rank].float().contiguous(), numerical_rank, values[:numerical_rank].double())


# ---- sketches -------------------------------------------------------------------------------------------------------


def _gaussian(num_rows: int, num_columns: int, generator: torch.Generator) -> Tensor:
    # Always drawn on the CPU: generators of different devices give different numbers for one seed.
    return torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float32)


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A private stream: the global one is not consumed, and different purposes are independent under one seed."""
    return torch.Generator("cpu").manual_seed(layer_seed(seed, 0, purpose))


@torch.no_grad()
def test_matrix(*, length: int, num_columns: int, seed: int, device: torch.device | str) -> Tensor:
    """Ω (length, num_columns) to start from, standard Gaussian; the same on every machine for one seed."""
    if not 1 <= num_columns <= length:
        raise ValueError(f"num_columns={num_columns} of vectors of length {length}; use 1 to {length}")
    return _gaussian(length, num_columns, _generator(seed, "test matrix")).to(device)


def orthonormal(columns: Tensor) -> Tensor:
    """The Q of a QR decomposition in float32, in the dtype of `columns` (l, c), c ≤ l."""
    return torch.linalg.qr(columns.float()).Q.to(columns.dtype)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def power_iterate(
    omega: Tensor,
    inner: Tensor,
    outer: Tensor,
    *,
    iterations: int,
    total: Callable[[Tensor], Tensor] = _unchanged,
    total_orthonormal: Callable[[Tensor], Tensor] = orthonormal,
) -> Tensor:
    """Turns Ω (l, c) towards the leading right singular vectors of A = innerᵀ outer, which is never formed.

    Each iteration is Ω ← orth(Aᵀ A Ω). Returns the dtype of `omega`.

    Args:
        inner, outer: (T, k), (T, l).
        total: makes the sum over all that hold rows of A out of this one's (k, c).
        total_orthonormal: likewise of (l, c), and then orthonormal columns, the same for all.
    """
    for _ in range(iterations):
        image = total(inner.t() @ (outer @ omega))  # A Ω (k, c)
        omega = total_orthonormal(outer.t() @ (inner @ image))
    return omega


@torch.no_grad()
def probe_matrix(*, length: int, num_probes: int = 8, seed: int, device: torch.device | str) -> Tensor:
    """Z (length, num_probes), standard Gaussian: E‖A Z‖² = num_probes · ‖A‖², and so for Pᵀ A.

    Independent of the test matrix of the same seed: probes that P was fitted to would flatter it.
    """
    return _gaussian(length, num_probes, _generator(seed, "probe matrix")).to(device)


# ---- the basis of a layer -------------------------------------------------------------------------------------------


@torch.no_grad()
def complete_basis(vectors: Tensor, rank: int, *, previous: Tensor | None, seed: int) -> Completed:
    """Fills `vectors` (k, r') up to `rank` columns: from the span of `previous` (k, r), then from a seeded random one.

    The directions taken from the previous basis are those that lie outside the new one most. Returns orthonormal
    columns, the given ones first and unchanged.
    """
    num_rows = vectors.shape[0]
    if rank > num_rows:
        raise ValueError(f"rank={rank} is larger than the smaller side ({num_rows}); use a rank of at most {num_rows}")
    result = vectors.detach().float()[:, :rank]
    num_from_previous = num_random = 0
    missing = rank - result.shape[1]
    if missing and previous is not None and previous.numel():
        residual = _project_out(previous.detach().float(), result)
        right, values = _left_vectors(residual.T)  # (r, r): of the smaller side
        num_from_previous = min(missing, int((values > _SMALLEST_RESIDUAL).sum()))
        result = _append(result, residual @ (right[:, :num_from_previous] / values[:num_from_previous]).float())
        missing -= num_from_previous
    if missing:
        generator = _generator(seed, "random basis")
        result = _append(result, _gaussian(num_rows, missing, generator).to(result.device))
        num_random = missing
    return Completed(result.contiguous(), num_from_previous, num_random)


def _project_out(matrix: Tensor, vectors: Tensor) -> Tensor:
    for _ in range(2):  # twice is enough (Kahan): the first pass leaves rounding errors along `vectors`
        matrix = matrix - vectors @ (vectors.T @ matrix)
    return matrix


def _append(vectors: Tensor, new: Tensor) -> Tensor:
    q, _ = torch.linalg.qr(_project_out(new, vectors))
    # QR enlarges what the projection left along `vectors` by the conditioning of `new`; one more pass removes it.
    q, _ = torch.linalg.qr(_project_out(q, vectors))
    return torch.cat([vectors, q], dim=1)


# ---- measures and moments -------------------------------------------------------------------------------------------


@torch.no_grad()
def squared_norm(matrix: Tensor) -> float:
    """‖matrix‖² summed in float64 without a float64 copy. Synchronizes with the device."""
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    if matrix.numel():
        for chunk in matrix.detach().split(max(1, _CHUNK // max(1, matrix[0].numel()))):
            total += torch.linalg.vector_norm(chunk, dtype=torch.float64).square_()
    return float(total)


@torch.no_grad()
def captured_energy(gradient: Tensor, vectors: Tensor) -> float:
    """‖Pᵀ A‖² / ‖A‖² for A (k, l), or A Z with the probes Z, and orthonormal P (k, r). Zero where A is zero."""
    gradient = gradient.detach().float()
    total = squared_norm(gradient)
    if total == 0.0:
        return 0.0
    # P rather than A is scaled, so that products of a tiny gradient do not underflow, without a copy of it.
    size = max(math.sqrt(total), 1e-30)
    projected = (vectors.detach().float() / size).T @ gradient
    return squared_norm(projected) * (size * size / total)


@torch.no_grad()
def overlap(old_basis_hat: Tensor, new_basis_hat: Tensor) -> Tensor:
    """O = P̂_oldᵀ P̂_new (r_old, r_new) float32."""
    return old_basis_hat.detach().float().T @ new_basis_hat.detach().float()


@torch.no_grad()
def project_moments(first: Tensor, second: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments of the canonical factor (l, r_old), carried to the new basis (l, r_new), float32.

    M ← M O. The second moment is a mean of squares: V ← V (O ∘ O), which is exact where the gradient's entries along
    the old directions are uncorrelated. Never negative.
    """
    overlap = overlap.detach().float()
    return first.detach().float() @ overlap, (second.detach().float() @ overlap.square()).clamp_(min=0)
