"""tools/candidates_rounding.py: other roundings and compensations against float64, numpy and the product's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative
from torch import Tensor

from loqt_ds.core import compensation
from loqt_ds.core.quantization import QuantSpec, dequantize, quantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rounding(repository: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("candidates_rounding")
    sys.path.remove(str(repository / "tools"))
    del sys.modules["candidates_rounding"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("shape", [(7, 29), (53, 40), (3, 128)])
def test_rounding_is_the_products(rounding: Any, kind: str, shape: tuple[int, int]) -> None:
    matrix, spec = gaussian(*shape), QuantSpec(kind)
    values = rounding.Grid(kind).nearest(matrix)
    assert torch.equal(values, dequantize(quantize(matrix, spec), shape, spec))


def blocks_of(matrix: Tensor, size: int) -> np.ndarray:
    flat = matrix.double().numpy().reshape(-1)
    return np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def nearest_errors(blocks: np.ndarray, scales: np.ndarray, table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Smallest weighted squared error of each block (n, b), any level for any value."""
    distance = np.abs(blocks[:, :, None] - scales[:, None, None] * table).min(2)
    return (weights * distance**2).sum(1)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_scale_is_the_best_of_eight(rounding: Any, kind: str, size: int, weighted: bool) -> None:
    matrix = gaussian(37, 45, seed=size)
    rows, columns = torch.rand(37) ** 2 + 0.01, torch.rand(45) ** 2 + 0.01
    importance = rounding.Importance.of(rows, columns, (37, 45)) if weighted else None
    weights = blocks_of(torch.ones(37, 45) if importance is None else importance.whole(), size)
    table, blocks = rounding.levels(kind, CPU).double().numpy(), blocks_of(matrix, size)
    absmax = np.abs(blocks).max(1)
    every = [nearest_errors(blocks, absmax * part, table, weights) for part in np.linspace(0.8, 1.0, 8)]
    values = rounding.Grid(kind, size, True).nearest(matrix, importance)
    found = (weights * (blocks_of(values, size) - blocks) ** 2).sum(1)
    np.testing.assert_allclose(found, np.min(every, axis=0), rtol=1e-4, atol=1e-9)
    assert found.sum() < 0.98 * every[-1].sum()
    if size == 64:  # and the product's own bytes can hold it
        spec = QuantSpec(kind)
        assert torch.equal(dequantize(quantize(values, spec), (37, 45), spec), values)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(rounding: Any, kind: str) -> None:
    matrix, grid, spec = gaussian(13, 21), rounding.Grid(kind), QuantSpec(kind)
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([grid.stochastic(matrix, generator) for _ in range(600)]).double()
    table, blocks = rounding.levels(kind, CPU).double().numpy(), blocks_of(matrix, 64)
    points = np.abs(blocks).max(1)[:, None, None] * table  # (n, 1, levels)
    below = np.where(points <= blocks[:, :, None] + 1e-7, points, -np.inf).max(2).reshape(-1)[: matrix.numel()]
    above = np.where(points >= blocks[:, :, None] - 1e-7, points, np.inf).min(2).reshape(-1)[: matrix.numel()]
    flat = draws.view(600, -1).numpy()
    distance = np.minimum(np.abs(flat - below), np.abs(flat - above))
    assert distance.max() < 1e-6
    # The deviation of a mean of 600 draws is at most half a gap / √600; five of them.
    assert (np.abs(flat.mean(0) - matrix.double().view(-1).numpy()) <= 5 * (above - below) / 2 / 600**0.5 + 1e-6).all()
    one = draws[0].float()
    assert torch.equal(dequantize(quantize(one, spec), (13, 21), spec), one)
    same = [grid.stochastic(matrix, torch.Generator().manual_seed(8)) for _ in range(2)]
    assert torch.equal(*same)


# ---------------------------------------------------------------- compensation


def importance_of(rounding: Any, shape: tuple[int, int], seed: int = 0) -> Any:
    rows, columns = gaussian(shape[0], seed=seed).square(), gaussian(shape[1], seed=seed + 1).square()
    return rounding.Importance.of(rows, columns, shape)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", [(23, 17), (17, 23), (19, 19)])
def test_weighted_least_squares_is_numpys(rounding: Any, side: str, shape: tuple[int, int]) -> None:
    """The whole problem as one: a column of the design for each entry of B, a row for each entry of the weight."""
    rank, scale = 4, 0.3
    error, importance = gaussian(*shape, seed=2), importance_of(rounding, shape, seed=5)
    basis = gaussian(shape[1] if side == "right" else shape[0], rank, seed=3)
    p, root = basis.double().numpy(), importance.whole().double().sqrt().numpy()
    if side == "right":  # vec of B Pᵀ, row by row
        design = np.kron(np.eye(shape[0]), p)
        length = shape[0]
    else:  # vec of P Fᵀ, F (l, r)
        design = np.kron(p, np.eye(shape[1]))
        length = shape[1]
    solution = np.linalg.lstsq(scale * root.reshape(-1, 1) * design, (root * error.double().numpy()).reshape(-1))[0]
    expected = solution.reshape(length, rank) if side == "right" else solution.reshape(rank, length).T
    found = rounding.LowRank(basis, side, scale).solve(error, importance)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_without_candidates_it_is_the_products_compensation(rounding: Any, side: str, iterations: int) -> None:
    weight, basis = gaussian(72, 90), torch.linalg.qr(gaussian(90 if side == "right" else 72, 20))[0]
    spec = QuantSpec("nf4")
    options: dict[str, Any] = {"side": side, "scale": 0.4, "iterations": iterations, "spec": spec}
    expected = compensation.compensate(weight, basis, **options)
    path = rounding.LowRank(basis, side, 0.4)
    found = rounding.compensate(weight, path, iterations=iterations, grid=rounding.Grid("nf4"))
    assert found.kept_iteration == expected.kept_iteration
    assert found.error_before == pytest.approx(expected.error_before, rel=1e-5)
    assert found.error_after == pytest.approx(expected.error_after, rel=1e-3)
    assert relative(found.values, dequantize(expected.packed, (72, 90), spec)) < 0.02
    assert found.factor.shape == expected.factor.shape


@pytest.mark.parametrize("side", ["right", "left"])
def test_weights_lower_the_weighted_error_and_not_the_plain_one(rounding: Any, side: str) -> None:
    shape, scale, grid = (72, 90), 0.4, rounding.Grid("nf4")
    weight, importance = gaussian(*shape), importance_of(rounding, shape)
    basis = torch.linalg.qr(gaussian(90 if side == "right" else 72, 20))[0]
    path, errors = rounding.LowRank(basis, side, scale), {}
    for name, given in (("plain", None), ("weighted", importance)):
        found = rounding.compensate(weight, path, iterations=3, grid=grid, importance=given)
        product = found.factor @ basis.T if side == "right" else basis @ found.factor.T
        error = (weight - found.values - scale * product).double()
        assert found.error_after == pytest.approx(float(error.norm() / weight.norm()), rel=1e-4)
        errors[name] = float(error.square().mul(importance.whole()).sum()), float(error.square().sum())
    assert errors["weighted"][0] < 0.97 * errors["plain"][0]
    assert errors["weighted"][1] > errors["plain"][1]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("iterations", [0, 2])
def test_stochastic_compensation_gives_the_weight_on_average(rounding: Any, side: str, iterations: int) -> None:
    weight, basis = gaussian(25, 31), torch.linalg.qr(gaussian(31 if side == "right" else 25, 5))[0]
    path, generator = rounding.LowRank(basis, side, 0.5), torch.Generator().manual_seed(1)
    grid, total, count = rounding.Grid("nf4"), torch.zeros(25, 31, dtype=torch.float64), 300
    factors = 0
    for _ in range(count):
        found = rounding.compensate(weight, path, iterations=iterations, grid=grid, generator=generator)
        product = found.factor @ basis.T if side == "right" else basis @ found.factor.T
        total += found.values.double() + 0.5 * product
        factors = factors + found.factor.double() / count
    one = relative(found.values.double() + 0.5 * product, weight)
    assert one > 0.08 and relative(total / count, weight) < 1.5 * one / count**0.5
    nearest = rounding.compensate(weight, path, iterations=iterations, grid=grid)
    assert one > nearest.error_after  # the price
    if iterations:  # what the kept factor leaves of the weight is rounded, and not the weight
        assert relative(factors, nearest.factor) < 0.3


@pytest.mark.parametrize("side", ["right", "left"])
def test_codes_that_are_there_are_kept_where_the_factor_does_the_rest(rounding: Any, side: str) -> None:
    grid, scale = rounding.Grid("nf4"), 0.5
    current = grid.nearest(gaussian(52, 33))
    basis = torch.linalg.qr(gaussian(33 if side == "right" else 52, 5))[0]
    factor = 0.2 * gaussian(52 if side == "right" else 33, 5)
    weight = current + scale * (factor @ basis.T if side == "right" else basis @ factor.T)
    path = rounding.LowRank(basis, side, scale)
    kept = rounding.compensate(weight, path, iterations=2, grid=grid, current=current)
    assert torch.equal(kept.values, current) and kept.error_after < 1e-6
    assert relative(kept.factor, factor) < 1e-4
    # Without, the scales of blocks move, and codes with them.
    assert rounding.compensate(weight, path, iterations=2, grid=grid).error_after > 1e-3


# ---------------------------------------------------------------- importance


def test_nothing_measured_counts_all_alike(rounding: Any) -> None:
    for odd in (None, torch.zeros(5), torch.full((5,), torch.inf), torch.full((5,), torch.nan)):
        found = rounding.Importance.of(odd, torch.arange(3.0), (5, 3))
        assert torch.equal(found.rows, torch.ones(5))
        assert found.whole().shape == (5, 3) and float(found.columns.min()) > 0
