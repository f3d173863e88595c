"""Subspaces against numpy's float64 SVD; sketches on gradients built from a common part and noise."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from loqt_ds.core import subspace
from loqt_ds.core.quantization import QuantSpec, dequantize, quantize

SHAPES = [(32, 32), (64, 172), (37, 53), (128, 352), (53, 37), (1, 9), (9, 1)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def orthonormal(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(num_rows, num_columns, seed=seed).double())[0].float()


def spectrum_matrix(k: int, length: int, kind: str, seed: int = 0) -> Tensor:
    """random: Gaussian; flat: all singular values 1; low: rank 3 exactly; tiny: scaled by 1e-20; decaying: 1/(1+i)."""
    small = min(k, length)
    if kind == "random":
        return gaussian(k, length, seed=seed)
    if kind == "low":
        return gaussian(k, min(3, small), seed=seed) @ gaussian(min(3, small), length, seed=seed + 1)
    if kind == "tiny":
        return gaussian(k, length, seed=seed) * 1e-20
    values = torch.ones(small) if kind == "flat" else 1 / (1 + torch.arange(small).float())
    return (orthonormal(k, small, seed) * values) @ orthonormal(length, small, seed + 1).T


def best_energy(matrix: Tensor, rank: int) -> float:
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    return float(squares[:rank].sum() / squares.sum())


def energy_float64(matrix: Tensor, vectors: Tensor) -> float:
    a, p = matrix.double().numpy(), vectors.double().numpy()
    return float((np.linalg.norm(p.T @ a) / np.linalg.norm(a)) ** 2)


def assert_orthonormal(vectors: Tensor, tolerance: float = 2e-6) -> None:
    gram = vectors.double().T @ vectors.double()
    assert (
        float((gram - torch.eye(vectors.shape[1], dtype=torch.float64)).abs().max()) < tolerance if len(gram) else True
    )


# ---- sides and seeds ------------------------------------------------------------------------------------------------


def test_sides() -> None:
    assert subspace.resolve_side("auto", 128, 64) == "right"
    assert subspace.resolve_side("auto", 64, 64) == "right"
    assert subspace.resolve_side("auto", 64, 128) == "left"
    assert subspace.resolve_side("left", 128, 64) == "left"
    assert subspace.resolve_side("right", 64, 128) == "right"
    with pytest.raises(ValueError, match="side='both'.*auto, left, right"):
        subspace.resolve_side("both", 1, 1)


def test_layer_seed_is_a_stable_hash() -> None:
    digest = hashlib.blake2b(b"7\n300\nmodel.layers.0.mlp.up_proj", digest_size=8).digest()
    assert subspace.layer_seed(7, 300, "model.layers.0.mlp.up_proj") == int.from_bytes(digest, "little") // 2
    seeds = {subspace.layer_seed(a, b, c) for a in range(5) for b in range(5) for c in ("x", "y", "1")}
    assert len(seeds) == 75 and all(0 <= s < 2**63 for s in seeds)


# ---- decompositions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("kind", ["random", "flat", "low", "tiny", "decaying"])
@pytest.mark.parametrize("shape", SHAPES)
def test_captured_energy_is_that_of_a_float64_svd(method: str, kind: str, shape: tuple[int, int]) -> None:
    matrix = spectrum_matrix(*shape, kind, seed=shape[0])
    for rank in sorted({1, max(1, min(shape) // 4), min(shape)}):
        basis, used = subspace.decompose(matrix, rank, method)
        assert used == method
        expected_rank = min(rank, 3, min(shape)) if kind == "low" else rank
        assert basis.numerical_rank == expected_rank
        assert basis.vectors.shape == (shape[0], expected_rank) and basis.vectors.dtype == torch.float32
        assert_orthonormal(basis.vectors)
        best = best_energy(matrix, rank)
        assert energy_float64(matrix, basis.vectors) == pytest.approx(best, abs=1e-4)
        assert subspace.captured_energy(matrix, basis.vectors) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("method", ["exact", "gram", "iterated", "sketch"])
@pytest.mark.parametrize("out_features, in_features", [(352, 128), (128, 352), (96, 96), (53, 37)])
def test_a_low_rank_gradient_is_captured_whole_on_both_sides(method: str, out_features: int, in_features: int) -> None:
    # Mistake 2 of the reference: rows instead of columns of the eigenvectors on the right side, 0.18 captured.
    rank = 8
    gradient = gaussian(out_features, rank, seed=1) @ gaussian(rank, in_features, seed=2)  # (out, in)
    for side in ("right", "left"):
        canonical = gradient.T if side == "right" else gradient
        basis, _ = subspace.decompose(canonical, rank, method)
        assert basis.numerical_rank == rank
        assert energy_float64(canonical, basis.vectors) == pytest.approx(1.0, abs=1e-5)
        gram = (canonical.double() @ canonical.double().T).numpy()
        wrong = torch.from_numpy(np.linalg.eigh(gram)[1][-rank:, :].T.copy())  # what the mistake looks like
        assert subspace.captured_energy(canonical, wrong) < 0.6


@pytest.mark.parametrize("kind", ["random", "low", "tiny", "decaying"])
@pytest.mark.parametrize("shape", [*SHAPES, (160, 300)])
def test_subspace_iteration_captures_what_a_float64_svd_does(kind: str, shape: tuple[int, int]) -> None:
    matrix = spectrum_matrix(*shape, kind, seed=shape[0])
    # A spectrum without decay is the worst case: the columns beside the rank are worth as much as those within.
    tolerance = 0.08 if kind in ("random", "tiny") else 2e-3
    for rank in sorted({1, max(1, min(shape) // 4), min(shape)}):
        basis, used = subspace.decompose(matrix, rank, "iterated", oversampling=32, seed=rank)
        assert used == "iterated" and basis.vectors.dtype == torch.float32
        assert basis.numerical_rank == (min(rank, 3, min(shape)) if kind == "low" else rank)
        assert_orthonormal(basis.vectors)
        captured = energy_float64(matrix, basis.vectors)
        assert captured >= (1 - tolerance) * best_energy(matrix, rank)
        if rank + 32 >= min(shape):  # nothing is left out
            assert captured == pytest.approx(best_energy(matrix, rank), rel=1e-4)


def test_subspace_iteration_depends_on_its_seed_alone() -> None:
    matrix = spectrum_matrix(96, 200, "random", seed=3)
    state = torch.get_rng_state()
    one, two, other = (subspace.iterated_basis(matrix, 16, oversampling=4, seed=seed).vectors for seed in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["exact", "gram", "iterated", "sketch"])
def test_values_are_the_norms_along_the_directions(method: str) -> None:
    for scale in (1.0, 1e-25):
        matrix = spectrum_matrix(48, 70, "decaying", seed=8) * scale
        basis, _ = subspace.decompose(matrix, 9, method)
        expected = (matrix.double().T @ basis.vectors.double()).norm(dim=0)
        assert basis.values.dtype == torch.float64
        assert torch.allclose(basis.values, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("method", ["exact", "gram", "iterated", "sketch"])
def test_zero_gradient_has_no_directions(method: str) -> None:
    basis, _ = subspace.decompose(torch.zeros(16, 24), 4, method)
    assert basis.numerical_rank == 0 and basis.vectors.shape == (16, 0)
    assert subspace.captured_energy(torch.zeros(16, 24), orthonormal(16, 4)) == 0.0


@pytest.mark.parametrize("method", ["exact", "gram", "iterated", "sketch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_becomes_a_basis(method: str, bad: float) -> None:
    gradient = gaussian(16, 24)
    gradient[3, 5] = bad
    with pytest.raises(torch.linalg.LinAlgError):
        subspace.decompose(gradient, 4, method)


def test_a_failing_decomposition_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    gradient = gaussian(16, 24)
    best = best_energy(gradient, 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", fail)
        basis, used = subspace.decompose(gradient, 4, "exact")
        assert used == "gram"
        assert energy_float64(gradient, basis.vectors) == pytest.approx(best, abs=1e-4)
        patch.setattr(torch.linalg, "eigh", fail)
        with pytest.raises(torch.linalg.LinAlgError, match="exact: did not converge; gram: did not converge"):
            subspace.decompose(gradient, 4, "exact")
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    for method in ("gram", "iterated", "sketch"):
        basis, used = subspace.decompose(gradient, 4, method)
        assert used == "exact"
        assert energy_float64(gradient, basis.vectors) == pytest.approx(best, abs=1e-4)
    with pytest.raises(ValueError, match="qr.*exact, gram, iterated, sketch"):
        subspace.decompose(gradient, 4, "qr")


def test_few_tokens_give_a_low_numerical_rank() -> None:
    # dYᵀ X of 5 tokens, formed in float32 as the layer does: rank 5, whatever rank is asked for.
    gradient = gaussian(40, 5, seed=1) @ gaussian(5, 96, seed=2)
    for method in ("exact", "gram"):
        assert subspace.decompose(gradient, 16, method)[0].numerical_rank == 5


def test_half_precision_gradients_are_computed_in_float32() -> None:
    gradient = gaussian(48, 80).bfloat16()
    best = best_energy(gradient.float(), 12)
    for method in ("exact", "gram", "sketch"):
        basis, _ = subspace.decompose(gradient, 12, method)
        assert basis.vectors.dtype == torch.float32
        assert energy_float64(gradient.float(), basis.vectors) == pytest.approx(best, abs=1e-4)


def test_gram_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = gaussian(37, 530)
    monkeypatch.setattr(subspace, "_CHUNK", 37 * 64)
    basis = subspace.gram_basis(gradient, 9)
    assert energy_float64(gradient, basis.vectors) == pytest.approx(best_energy(gradient, 9), abs=1e-5)


# ---- sketches -------------------------------------------------------------------------------------------------------


SKETCHED = [(256, 512, 64), (128, 352, 32), (172, 172, 43), (256, 688, 128)]


@pytest.mark.parametrize("k, length, rank", SKETCHED)
@pytest.mark.parametrize("kind", ["random", "decaying"])
def test_a_sketch_whose_columns_were_iterated_is_nearly_exact(k: int, length: int, rank: int, kind: str) -> None:
    gradient = spectrum_matrix(k, length, kind)
    outer = torch.linalg.qr(gaussian(900, k, seed=3)).Q @ gradient  # any factors of A = innerᵀ outer
    inner = torch.linalg.qr(gaussian(900, k, seed=3)).Q
    start = subspace.test_matrix(length=length, num_columns=min(k, length, rank + 32), seed=1, device="cpu")
    omega = subspace.power_iterate(start, inner, outer, iterations=2)
    assert_orthonormal(omega)
    basis = subspace.sketch_basis(gradient @ omega, rank)
    assert_orthonormal(basis.vectors)
    captured, best = energy_float64(gradient, basis.vectors), best_energy(gradient, rank)
    assert captured >= 0.96 * best
    if kind == "random" and rank + 32 < k:  # where iterations matter
        blind = subspace.sketch_basis(gradient @ start, rank).vectors
        assert captured > energy_float64(gradient, blind) + 0.02


def test_power_iterations_of_rows_that_several_hold_are_those_of_all_rows() -> None:
    """A = Σ innerᵢᵀ outerᵢ: with sums exchanged, each holder gets the Ω of one that holds everything."""
    inner, outer = gaussian(60, 24), gaussian(60, 56, seed=1)
    start = subspace.test_matrix(length=56, num_columns=9, seed=1, device="cpu")
    whole = subspace.power_iterate(start, inner, outer, iterations=1)
    images: list[Tensor] = []
    for rows in (slice(0, 13), slice(13, 60)):  # what each holder hands to the first exchange
        subspace.power_iterate(
            start, inner[rows], outer[rows], iterations=1, total=lambda part: images.append(part) or part
        )
    image, parts = sum(images), []
    for rows in (slice(0, 13), slice(13, 60)):
        subspace.power_iterate(
            start,
            inner[rows],
            outer[rows],
            iterations=1,
            total=lambda part: image,
            total_orthonormal=lambda part: parts.append(part) or part,
        )
    assert torch.allclose(subspace.orthonormal(sum(parts)), whole, atol=1e-4)
    a = inner.double().T @ outer.double()
    direction = np.linalg.qr((a.T @ (a @ start.double())).numpy())[0]
    assert np.allclose(np.abs((direction * whole.double().numpy()).sum(0)), 1.0, atol=1e-5)


def test_a_wide_sketch_is_exact() -> None:
    for k, length in [(24, 56), (56, 24)]:
        gradient = gaussian(k, length)
        omega = subspace.test_matrix(length=length, num_columns=length, seed=0, device="cpu")
        basis = subspace.sketch_basis(gradient @ subspace.orthonormal(omega), 7)
        assert energy_float64(gradient, basis.vectors) == pytest.approx(best_energy(gradient, 7), abs=1e-5)


def test_bf16_accumulation_of_the_sketch_costs_nothing() -> None:
    gradient = spectrum_matrix(128, 352, "decaying")
    start = subspace.test_matrix(length=352, num_columns=64, seed=1, device="cpu")
    omega = subspace.power_iterate(start, torch.eye(128), gradient, iterations=2)
    sketch = gradient @ omega
    full = energy_float64(gradient, subspace.sketch_basis(sketch, 32).vectors)
    half = energy_float64(gradient, subspace.sketch_basis(sketch.bfloat16(), 32).vectors)
    assert half == pytest.approx(full, rel=1e-3)


def test_test_matrix_is_deterministic_and_gaussian() -> None:
    make = subspace.test_matrix
    one = make(length=960, num_columns=240, seed=5, device="cpu")
    torch.manual_seed(1234)  # the global generator has no say
    assert one.shape == (960, 240) and torch.equal(one, make(length=960, num_columns=240, seed=5, device="cpu"))
    assert not torch.equal(one, make(length=960, num_columns=240, seed=6, device="cpu"))
    assert abs(float(one.mean())) < 0.01 and float(one.std()) == pytest.approx(1.0, abs=0.01)


def test_impossible_test_matrices_are_refused() -> None:
    for num_columns in (0, 9):
        with pytest.raises(ValueError, match=f"num_columns={num_columns}.*8"):
            subspace.test_matrix(length=8, num_columns=num_columns, seed=0, device="cpu")


def test_probes_estimate_energies_without_bias() -> None:
    gradient, vectors = spectrum_matrix(40, 90, "decaying"), orthonormal(40, 10, seed=3)
    total, ratios = [], []
    for seed in range(300):
        probes = subspace.probe_matrix(length=90, num_probes=8, seed=seed, device="cpu")
        assert probes.shape == (90, 8)
        total.append(subspace.squared_norm(gradient @ probes) / 8)
        ratios.append(subspace.captured_energy(gradient @ probes, vectors))
    assert np.mean(total) == pytest.approx(subspace.squared_norm(gradient), rel=0.05)
    assert np.mean(ratios) == pytest.approx(energy_float64(gradient, vectors), rel=0.1)


def test_probes_are_independent_of_the_test_matrix_of_the_same_seed() -> None:
    # Shared numbers would make P look better than it is: compare the estimate with the truth on an isotropic matrix.
    gradient = gaussian(64, 64, seed=2)
    bias = []
    for seed in range(40):
        omega = subspace.test_matrix(length=64, num_columns=8, seed=seed, device="cpu")
        vectors = subspace.sketch_basis(gradient @ omega, 8).vectors
        probes = subspace.probe_matrix(length=64, num_probes=8, seed=seed, device="cpu")
        bias.append(subspace.captured_energy(gradient @ probes, vectors) - energy_float64(gradient, vectors))
    assert abs(float(np.mean(bias))) < 0.02


# ---- completing a basis ---------------------------------------------------------------------------------------------


def check_completed(completed: subspace.Completed, given: Tensor, rank: int) -> None:
    assert completed.vectors.shape == (given.shape[0], rank)
    assert completed.vectors.dtype == torch.float32 and completed.vectors.is_contiguous()
    assert_orthonormal(completed.vectors)
    kept = min(given.shape[1], rank)
    assert torch.equal(completed.vectors[:, :kept], given[:, :kept])
    assert kept + completed.num_from_previous + completed.num_random == rank


def test_a_full_basis_is_left_alone() -> None:
    vectors = orthonormal(40, 8)
    completed = subspace.complete_basis(vectors, 8, previous=orthonormal(40, 8, seed=1), seed=0)
    check_completed(completed, vectors, 8)
    assert (completed.num_from_previous, completed.num_random) == (0, 0)
    check_completed(subspace.complete_basis(vectors, 5, previous=None, seed=0), vectors, 5)


def test_missing_columns_come_from_the_previous_basis() -> None:
    vectors, previous = orthonormal(40, 5), orthonormal(40, 8, seed=1)
    completed = subspace.complete_basis(vectors, 8, previous=previous, seed=0)
    check_completed(completed, vectors, 8)
    assert (completed.num_from_previous, completed.num_random) == (3, 0)
    # The new columns lie in span(previous, vectors).
    both = torch.linalg.qr(torch.cat([previous, vectors], dim=1))[0]
    assert float((both.T @ completed.vectors[:, 5:]).square().sum()) == pytest.approx(3.0, abs=1e-4)


def test_what_the_previous_basis_lacks_is_random_and_seeded() -> None:
    vectors = orthonormal(40, 5)
    previous = torch.cat([vectors[:, :4], orthonormal(40, 8, seed=2)[:, :2]], dim=1)  # 2 new directions
    one = subspace.complete_basis(vectors, 10, previous=previous, seed=3)
    check_completed(one, vectors, 10)
    assert (one.num_from_previous, one.num_random) == (2, 3)
    assert torch.equal(one.vectors, subspace.complete_basis(vectors, 10, previous=previous, seed=3).vectors)
    assert not torch.equal(one.vectors, subspace.complete_basis(vectors, 10, previous=previous, seed=4).vectors)


@pytest.mark.parametrize("given, rank, size", [(0, 6, 20), (0, 20, 20), (13, 20, 20), (1, 2, 2), (19, 20, 20)])
def test_random_completion_up_to_full_rank(given: int, rank: int, size: int) -> None:
    vectors = orthonormal(size, size)[:, :given]
    completed = subspace.complete_basis(vectors, rank, previous=None, seed=0)
    check_completed(completed, vectors, rank)
    assert (completed.num_from_previous, completed.num_random) == (0, rank - given)


def test_a_quantized_previous_basis_and_a_dead_one() -> None:
    spec = QuantSpec("nf4")
    vectors, old = orthonormal(64, 6), orthonormal(64, 16, seed=1)
    previous = dequantize(quantize(old, spec), (64, 16), spec)
    completed = subspace.complete_basis(vectors, 16, previous=previous, seed=0)
    check_completed(completed, vectors, 16)
    assert (completed.num_from_previous, completed.num_random) == (10, 0)
    dead = subspace.complete_basis(vectors, 16, previous=torch.zeros(64, 16), seed=0)
    check_completed(dead, vectors, 16)
    assert (dead.num_from_previous, dead.num_random) == (0, 10)
    with pytest.raises(ValueError, match="rank=65.*64.*at most 64"):
        subspace.complete_basis(vectors, 65, previous=None, seed=0)


def test_nothing_consumes_the_global_generator() -> None:
    before = torch.get_rng_state()
    subspace.test_matrix(length=16, num_columns=4, seed=0, device="cpu")
    subspace.probe_matrix(length=16, seed=0, device="cpu")
    subspace.complete_basis(orthonormal(16, 2), 8, previous=None, seed=0)
    for method in ("exact", "gram", "sketch"):
        subspace.decompose(gaussian(16, 24), 4, method)
    assert torch.equal(before, torch.get_rng_state())


# ---- measures and moments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-36, 1e15])
def test_captured_energy_at_any_scale(scale: float) -> None:
    gradient, vectors = gaussian(37, 91) * scale, orthonormal(37, 9)
    expected = energy_float64(gradient, vectors)
    assert subspace.captured_energy(gradient, vectors) == pytest.approx(expected, rel=1e-4)


def test_squared_norm_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(37, 53)
    expected = float((matrix.double().numpy() ** 2).sum())
    for chunk in (1, 100, 1 << 20):
        monkeypatch.setattr(subspace, "_CHUNK", chunk)
        assert subspace.squared_norm(matrix) == pytest.approx(expected, rel=1e-12)
        assert subspace.squared_norm(matrix.T) == pytest.approx(expected, rel=1e-12)
    assert subspace.squared_norm(torch.zeros(0, 4)) == 0.0


@pytest.mark.parametrize("out_features, in_features", [(53, 37), (37, 53)])
def test_moments_are_projected_as_the_paper_table_says(out_features: int, in_features: int) -> None:
    rank = 6
    side = subspace.resolve_side("auto", out_features, in_features)
    small = min(out_features, in_features)
    old, new = orthonormal(small, rank, seed=1), orthonormal(small, rank, seed=2)
    overlap = subspace.overlap(old, new)
    po, pn = old.double().numpy(), new.double().numpy()
    assert np.allclose(overlap.numpy(), po.T @ pn, atol=1e-6)
    shape = (out_features, rank) if side == "right" else (rank, in_features)  # of B, and so of its moments
    first, second = gaussian(*shape, seed=3), gaussian(*shape, seed=4).square()
    m, v = first.double().numpy(), second.double().numpy()
    if side == "right":
        expected = m @ po.T @ pn, v @ (po.T @ pn) ** 2
        actual = subspace.project_moments(first, second, overlap)
    else:
        expected = pn.T @ po @ m, ((pn.T @ po) ** 2) @ v
        projected = subspace.project_moments(first.T, second.T, overlap)
        actual = projected[0].T, projected[1].T
    for a, e in zip(actual, expected, strict=True):
        assert np.allclose(a.numpy(), e, atol=1e-5)
    assert bool((actual[1] >= 0).all())


def test_projection_within_one_span_loses_nothing() -> None:
    old = orthonormal(40, 8)
    new = old @ orthonormal(8, 8, seed=5)
    first, second = gaussian(60, 8, seed=1), gaussian(60, 8, seed=2).square()
    overlap = subspace.overlap(old, new)
    projected, squares = subspace.project_moments(first, second, overlap)
    assert torch.allclose(projected @ new.T, first @ old.T, atol=1e-5)
    assert torch.allclose(squares.sum(1), second.sum(1), rtol=1e-4)
    same = subspace.project_moments(first, second, subspace.overlap(old, old))
    assert torch.allclose(same[0], first, atol=1e-5) and torch.allclose(same[1], second, atol=1e-5)


def test_projection_to_another_rank_and_negative_rounding() -> None:
    overlap = subspace.overlap(orthonormal(40, 8), orthonormal(40, 5, seed=1))
    first, second = subspace.project_moments(gaussian(60, 8).bfloat16(), -torch.ones(60, 8), overlap)
    assert first.shape == second.shape == (60, 5)
    assert first.dtype == torch.float32 and bool((second == 0).all())
