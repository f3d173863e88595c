"""The controller with a store of its own: what G, P, W, B and the moments become, against float64 and numpy."""

from __future__ import annotations

import json
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from helpers import as_ranks, effective_weight, relative
from torch import Tensor, nn

from loqt_ds.config import LoQTConfig
from loqt_ds.core.quantization import dequantize, quantize
from loqt_ds.method import controller as controller_module
from loqt_ds.method.controller import Controller, ReinitReport, assign_owners
from loqt_ds.method.conversion import convert, loqt_layers
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.ranks import ALONE, Ranks
from loqt_ds.trainer import describe_reinit

RANK = 6


class Store:
    """B in the layers themselves; moments in a dictionary."""

    def __init__(self, layers: dict[str, LoQTLinear]) -> None:
        self.layers = layers
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def read(self, name: str, owner: int = 0) -> Tensor:
        return self.layers[name].B.detach().float()

    def write(self, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.layers[name].B.copy_(value)

    def has_moments(self, name: str) -> bool:
        return name in self.kept

    def moment(self, name: str, index: int, owner: int = 0) -> Tensor:
        return self.kept[name][index]

    def set_moments(self, name: str, first: Tensor, second: Tensor) -> None:
        assert first.shape == second.shape == self.layers[name].B.shape
        self.kept[name] = first.clone(), second.clone()

    def reset_moments(self, name: str) -> None:
        self.kept.pop(name, None)


class Fixture:
    """Two layers of opposite sides, neither dividing by 64: 0 is (53, 40), right; 2 is (40, 53), left."""

    def __init__(self, *, with_original: bool = True, seed: int = 0, ranks: Ranks = ALONE, **options: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        self.model = nn.Sequential(nn.Linear(40, 53), nn.Tanh(), nn.Linear(53, 40))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        self.options = LoQTConfig(
            **({"rank": RANK, "schedule": "static", "interval": 2, "subspace": "exact"} | options)
        )
        self.originals = convert(self.model, self.options)
        self.layers = loqt_layers(self.model)
        self.store = Store(self.layers)
        self.controller = Controller(
            self.layers,
            self.options,
            self.store,
            original=self.originals.__getitem__ if with_original else None,
            seed=seed,
            ranks=ranks,
        )

    def inputs(self, step: int, num_tokens: int = 64) -> Tensor:
        return torch.randn(num_tokens, 40, generator=torch.Generator().manual_seed(100 + step))

    def loss(self, x: Tensor) -> Tensor:
        return (self.model(x) - x.flip(0)).square().mean()

    def dense_gradients(self, xs: list[Tensor]) -> dict[str, np.ndarray]:
        """∂ mean loss / ∂W at the current effective weights, by autograd on a dense float64 model."""
        weights, dense = {}, []
        for name, module in self.model.named_children():
            if isinstance(module, LoQTLinear):
                weights[name] = effective_weight(module).requires_grad_()
                dense.append((weights[name], module.bias.detach().double()))
        total: Tensor | float = 0.0
        for x in xs:
            x = x.double()
            y = nn.functional.linear(torch.tanh(nn.functional.linear(x, *dense[0])), *dense[1])
            total = total + (y - x.flip(0)).square().mean() / len(xs)
        total.backward()
        return {name: weight.grad.numpy() for name, weight in weights.items()}

    def step(
        self,
        step: int,
        *,
        xs: list[Tensor] | None = None,
        applied: bool = True,
        update: float = 0.0,
        scale: float = 1.0,
    ) -> ReinitReport | None:
        """One step as an engine takes it; the update moves B by `update` times noise."""
        xs = [self.inputs(step)] if xs is None else xs
        self.controller.begin_step(step)
        for x in xs:
            (self.loss(x) * scale / len(xs)).backward()
        for name, layer in self.layers.items():
            self.controller.gradient_complete(name)
            layer.B.grad = None
        if applied and update:
            self.move(update, step)
        return self.controller.end_step(applied)

    def move(self, size: float, seed: int = 0) -> None:
        with torch.no_grad():
            for layer in self.layers.values():
                noise = torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(seed))
                layer.B.add_(size * noise)

    def bytes(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def fill_moments(self) -> None:
        for name, layer in self.layers.items():
            generator = torch.Generator().manual_seed(len(name))
            first = torch.randn(layer.B.shape, generator=generator)
            self.store.kept[name] = first, torch.rand(layer.B.shape, generator=generator)


def canonical(layer: LoQTLinear, gradient: np.ndarray) -> np.ndarray:
    return gradient.T if layer.side == "right" else gradient


def top_projector(matrix: np.ndarray, rank: int) -> np.ndarray:
    left = np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    return left @ left.T


def projector(layer: LoQTLinear) -> np.ndarray:
    q = np.linalg.qr(layer.basis_hat().double().numpy())[0]
    return q @ q.T


def energy(matrix: np.ndarray, projection: np.ndarray) -> float:
    return float(np.linalg.norm(projection @ matrix) ** 2 / np.linalg.norm(matrix) ** 2)


def same(one: dict[str, Tensor], other: dict[str, Tensor], *, but: str = "\0") -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items() if but not in key)


# ---------------------------------------------------------------- P


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_p_spans_the_top_of_the_dense_gradient_at_the_effective_weight(method, num_micro_batches):
    f = Fixture(subspace=method, quantize_p="none")
    f.step(0)
    f.move(0.3)  # far from W_q: the gradient at W_q alone would be another
    for step in (2, 4):
        xs = [f.inputs(10 * step + i, num_tokens=31) for i in range(num_micro_batches)]
        gradients = f.dense_gradients(xs)
        report = f.step(step, xs=xs, update=0.1)
        for layer_report in report.layers:
            layer = f.layers[layer_report.name]
            matrix = canonical(layer, gradients[layer_report.name])
            best = top_projector(matrix, RANK)
            assert np.linalg.norm(projector(layer) - best) < 1e-3
            assert layer_report.method == method
            assert layer_report.captured_energy == pytest.approx(energy(matrix, best), abs=1e-4)


def test_p_is_stored_quantized():
    exact, quantized = Fixture(quantize_p="none"), Fixture(quantize_p="int4")
    exact.step(0)
    quantized.step(0)
    for name, layer in quantized.layers.items():
        packed = quantize(exact.layers[name].basis_hat(), layer.spec_p)
        assert all(torch.equal(packed[key], stored) for key, stored in layer.packed_p().items())


def test_a_sketch_captures_what_svd_captures():
    """The first and a later one: neither leans on moments, which say nothing here."""
    f = Fixture(subspace="sketch", sketch_oversampling=2, quantize_p="none")
    f.fill_moments()
    for step in (0, 2):
        gradients = f.dense_gradients([f.inputs(step)])
        report = {r.name: r for r in f.step(step).layers}
        for name, layer in f.layers.items():
            matrix = canonical(layer, gradients[name])
            # A flat spectrum: without the iteration it is 0.7 of the best; a random basis has 0.2 of it.
            captured = energy(matrix, projector(layer))
            assert captured > 0.96 * energy(matrix, top_projector(matrix, RANK))
            assert report[name].method == "sketch"
            # Eight Gaussian probes of a ratio: good to about ten per cent.
            assert report[name].captured_energy == pytest.approx(captured, rel=0.3)


def test_a_sketch_sums_all_micro_batches_in_columns_found_on_the_first():
    f = Fixture(subspace="sketch", sketch_oversampling=2, quantize_p="none")
    xs = [f.inputs(20, 100), f.inputs(20, 100) + 0.1 * f.inputs(21, 100)]
    gradients = f.dense_gradients(xs)
    f.step(0, xs=xs)
    for name, layer in f.layers.items():
        matrix = canonical(layer, gradients[name])
        assert energy(matrix, projector(layer)) > 0.9 * energy(matrix, top_projector(matrix, RANK))


def test_a_sketch_is_linear_in_the_micro_batches(monkeypatch):
    monkeypatch.setattr(controller_module, "POWER_ITERATIONS", 0)  # which turn the columns to the first micro-batch

    def bases(num: int) -> dict[str, Tensor]:
        f = Fixture(subspace="sketch", quantize_p="none", sketch_oversampling=4)
        # The loss is a mean over rows without coupling between them, so that halves average to the whole.
        f.loss = lambda x: f.model(x).square().mean()
        f.step(0)
        f.fill_moments()
        f.step(2, xs=list(f.inputs(0, 60).chunk(num)))
        return {name: torch.from_numpy(projector(layer)) for name, layer in f.layers.items()}

    whole, parts = bases(1), bases(4)
    for name, expected in whole.items():
        assert relative(parts[name], expected) < 1e-3


def test_auto_chooses_by_the_smaller_side_and_the_rank(monkeypatch):
    f = Fixture(subspace="auto")
    assert {f.controller.method(layer) for layer in f.layers.values()} == {"gram"}
    monkeypatch.setattr(controller_module, "AUTO_GRAM_LIMIT", 39)
    assert {f.controller.method(layer) for layer in f.layers.values()} == {"iterated"}
    monkeypatch.setattr(controller_module, "AUTO_ITERATED_SHARE", (RANK - 1) / 40)
    assert {f.controller.method(layer) for layer in f.layers.values()} == {"gram"}
    monkeypatch.setattr(controller_module, "AUTO_WHOLE_LIMIT", 39)
    assert {f.controller.method(layer) for layer in f.layers.values()} == {"sketch"}


@pytest.mark.parametrize("method", ["exact", "gram", "iterated", "sketch"])
def test_fewer_tokens_than_the_rank(method):
    """Missing columns come at random the first time, from the old P afterwards, and are counted."""
    f = Fixture(subspace=method, quantize_p="none")
    few = [f.inputs(1, num_tokens=4)]
    first = f.step(0, xs=few)
    old = {name: layer.basis_hat().double() for name, layer in f.layers.items()}
    assert all((r.num_from_previous, r.num_random) == (0, RANK - 4) for r in first.layers)
    f.fill_moments()
    second = f.step(2, xs=[f.inputs(2, num_tokens=4)])
    assert all((r.num_from_previous, r.num_random) == (RANK - 4, 0) for r in second.layers)
    for name, layer in f.layers.items():
        p = layer.basis_hat().double()
        assert relative(p.T @ p, torch.eye(RANK)) < 1e-5
        # Two of its columns lie in the span of the old P and the four others.
        known = torch.linalg.qr(torch.cat([p[:, :4], old[name]], dim=1)).Q
        assert relative(known @ (known.T @ p), p) < 1e-4
    assert first.summary()["num_random"] == 2 * (RANK - 4)


# ---------------------------------------------------------------- W and B


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("iterations", [1, 5])
def test_the_first_initialization_compensates_the_very_first_quantization(kind, iterations):
    f = Fixture(quantize_w=kind, compensation_steps=iterations)
    report = f.step(0)
    for r in report.layers:
        layer, original = f.layers[r.name], f.originals[r.name].double()
        plain = dequantize(quantize(original.float(), layer.spec_w), layer.weight_shape, layer.spec_w)
        assert r.error_before == pytest.approx(relative(plain, original), rel=1e-4)
        assert r.error_after == pytest.approx(relative(effective_weight(layer), original), rel=1e-4)
        assert r.error_after < 0.97 * r.error_before
        # B is the least-squares solution for what is left, P̂ and W_q being given.
        residual = canonical(layer, (original - layer.weight_q().double()).numpy()).T  # (l, k)
        p_hat = layer.basis_hat().double().numpy()
        expected = np.linalg.lstsq(p_hat, residual.T, rcond=None)[0].T / layer.scale
        assert relative(layer.factor(), torch.from_numpy(expected)) < 1e-4


def test_without_the_original_the_first_initialization_has_nothing_to_compensate():
    f = Fixture(with_original=False)
    before = {name: layer.weight_q() for name, layer in f.layers.items()}
    report = f.step(0)
    assert all(r.error_after < 1e-6 for r in report.layers)
    assert all(relative(f.layers[name].effective_weight(), weight) < 1e-6 for name, weight in before.items())


@pytest.mark.parametrize("state", ["keep", "reset", "project", "transport"])
def test_later_initializations_start_from_the_merged_weight_after_the_update(state):
    f = Fixture(optimizer_state=state)
    f.step(0)
    f.move(0.05)
    merged: dict[str, Tensor] = {}
    f.controller.begin_step(2)
    f.loss(f.inputs(2)).backward()
    f.move(0.05, seed=1)  # the update
    for name, layer in f.layers.items():
        merged[name] = effective_weight(layer)
    report = f.controller.end_step(True)
    for r in report.layers:
        layer = f.layers[r.name]
        plain = dequantize(quantize(merged[r.name].float(), layer.spec_w), layer.weight_shape, layer.spec_w)
        assert r.error_before == pytest.approx(relative(plain, merged[r.name]), rel=1e-3)
        assert r.error_after == pytest.approx(relative(effective_weight(layer), merged[r.name]), rel=1e-3)
        assert 0 < r.error_after < r.error_before


def test_without_quantization_nothing_is_lost_and_b_starts_at_zero():
    f = Fixture(quantize_w="none", quantize_p="nf4")
    for step in (0, 2, 4):
        f.move(0.2 if step else 0.0, seed=step)
        before = {name: effective_weight(layer) for name, layer in f.layers.items()}
        x = f.inputs(30)
        with torch.no_grad():
            expected = f.model(x)
        f.step(step)
        for name, layer in f.layers.items():
            assert not layer.B.any()
            assert relative(layer.weight_q(), before[name]) < 1e-6
        with torch.no_grad():
            assert relative(f.model(x), expected) < 1e-6


def test_no_compensation_means_plain_quantization_of_the_merged_weight():
    f = Fixture(compensation_steps=0)
    f.step(0)
    f.move(0.1)
    merged = {name: layer.effective_weight() for name, layer in f.layers.items()}
    f.step(2)
    for name, layer in f.layers.items():
        packed = quantize(merged[name], layer.spec_w)
        assert all(torch.equal(packed[key], stored) for key, stored in layer.packed_w().items())
        assert not layer.B.any()


def test_the_same_gradient_gives_the_same_bytes_and_draws_no_global_number():
    for options in ({"subspace": "sketch"}, {"subspace": "gram"}, {"subspace": "exact", "rank": 40}):
        results = []
        for global_seed in (1, 2):
            f = Fixture(**options)
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            f.step(0, xs=[f.inputs(0, num_tokens=20)])
            f.fill_moments()
            f.step(2)
            assert torch.equal(before, torch.get_rng_state())
            results.append(f.bytes())
        assert same(*results)


def test_the_seed_matters_where_chance_does():
    one, other = Fixture(subspace="sketch", seed=1), Fixture(subspace="sketch", seed=2)
    one.step(0)
    other.step(0)
    assert not same(one.bytes(), other.bytes())


# ---------------------------------------------------------------- moments


def moments_after(state: str) -> tuple[Fixture, dict[str, Any], dict[str, Tensor]]:
    f = Fixture(optimizer_state=state)
    f.step(0)
    f.fill_moments()
    old = {name: layer.basis_hat().double() for name, layer in f.layers.items()}
    before = {name: (m.clone(), v.clone()) for name, (m, v) in f.store.kept.items()}
    f.step(2, update=0.1)
    return f, before, old


def test_keep_keeps_the_moments():
    f, before, _ = moments_after("keep")
    for name, (first, second) in before.items():
        assert torch.equal(f.store.kept[name][0], first) and torch.equal(f.store.kept[name][1], second)


def test_reset_makes_them_those_of_a_new_parameter():
    f, _, _ = moments_after("reset")
    assert f.store.kept == {}


@pytest.mark.parametrize("state", ["project", "transport"])
def test_moments_are_carried_to_the_new_basis(state):
    f, before, old = moments_after(state)
    for name, (first, second) in before.items():
        layer = f.layers[name]
        new = layer.basis_hat().double()
        between = old[name].T @ new
        if layer.side == "right":
            expected = first.double() @ between, second.double() @ between**2
        else:
            expected = between.T @ first.double(), (between.T) ** 2 @ second.double()
        if state == "transport":
            expected = expected[0], second
            assert torch.equal(f.store.kept[name][1], second)
        assert relative(f.store.kept[name][0], expected[0]) < 1e-5
        assert relative(f.store.kept[name][1], expected[1]) < 1e-5
        assert bool((f.store.kept[name][1] >= 0).all())
        assert relative(f.store.kept[name][0], first) > 0.1  # the bases differ


@pytest.mark.parametrize("state", ["keep", "reset", "project", "transport"])
def test_the_first_initialization_always_resets(state):
    """What the optimizer gathered before there was a P belongs to nothing."""
    f = Fixture(optimizer_state=state)
    f.fill_moments()
    f.step(0)
    assert f.store.kept == {}


# ---------------------------------------------------------------- when, and when not


def test_layers_are_tapped_in_due_steps_only():
    f = Fixture(interval=3)
    for step in range(8):
        f.controller.begin_step(step)
        due = step in (0, 3, 6)
        assert f.controller.active == due
        assert all((layer.tap is not None) == due for layer in f.layers.values())
        f.loss(f.inputs(step)).backward()
        report = f.controller.end_step(True)
        assert (report is not None) == due and not f.controller.active
        assert all(layer.tap is None for layer in f.layers.values())


def test_never_initializes_once():
    f = Fixture(schedule="never")
    assert f.step(0) is not None
    frozen = f.bytes()
    for step in range(1, 20):
        assert f.step(step, update=0.1) is None
    assert same(frozen, f.bytes(), but=".B")
    assert not torch.equal(frozen["0.B"], f.bytes()["0.B"])


def test_a_skipped_update_leaves_everything_and_stays_due():
    f = Fixture()
    f.step(0)
    f.move(0.1)
    before = f.bytes()
    assert f.step(2, applied=False) is None
    assert same(before, f.bytes())
    assert f.step(3, applied=False) is None  # step 3 is not in the schedule: it is overdue
    assert f.controller.state_dict()["overdue"] is True
    report = f.step(4)
    assert report is not None and report.step == 4 and report.summary()["num_layers"] == 2
    assert not torch.equal(before["0.p_codes"], f.bytes()["0.p_codes"])
    assert f.step(5) is None and f.controller.state_dict()["overdue"] is False


def test_a_skipped_first_step_is_made_up_for_with_the_original_weight():
    f = Fixture()
    f.step(0, applied=False)
    assert not any(layer.basis_hat().any() for layer in f.layers.values())
    report = f.step(1)
    for r in report.layers:
        assert r.error_after == pytest.approx(
            relative(effective_weight(f.layers[r.name]), f.originals[r.name]), rel=1e-4
        )
        assert r.error_after < r.error_before


def poison(f: Fixture, name: str, value: float) -> None:
    """One backward of a due step in which the gradient of one layer is multiplied by `value`."""
    layer = f.layers[name]
    inner = layer.tap
    layer.tap = lambda dy, x: inner(dy * value, x)


@pytest.mark.parametrize(("value", "reason"), [(0.0, "zero"), (math.inf, "not finite"), (math.nan, "not finite")])
@pytest.mark.parametrize("method", ["exact", "gram", "sketch"])
def test_a_layer_with_a_useless_gradient_keeps_its_p(value, reason, method):
    f = Fixture(subspace=method)
    f.step(0)
    f.move(0.1)
    before = f.bytes()
    f.controller.begin_step(2)
    poison(f, "2", value)
    f.loss(f.inputs(2)).backward()
    report = f.controller.end_step(True)
    kept = {r.name: r.kept for r in report.layers}
    assert kept["0"] is None and reason in kept["2"]
    after = f.bytes()
    for key in before:
        changed = key.startswith("0.") and not key.endswith("bias")
        assert torch.equal(before[key], after[key]) != changed, key
    summary = report.summary()
    assert (summary["num_layers"], summary["num_kept"]) == (1, 1)
    json.dumps(report.record()["layers"][0], allow_nan=False)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_first_useless_gradient_starts_from_a_random_basis(value):
    f = Fixture(quantize_p="none")
    f.controller.begin_step(0)
    poison(f, "2", value)
    f.loss(f.inputs(0)).backward()
    whole = f.controller.end_step(True)
    report = {r.name: r for r in whole.layers}
    assert report["2"].kept is None and report["2"].method.startswith("random") and report["2"].num_random == RANK
    assert whole.summary()["num_started_at_random"] == 1 and whole.summary()["num_layers"] == 2
    assert "1 layers without a gradient start from a random P" in describe_reinit(whole.summary())
    p = f.layers["2"].basis_hat()
    assert relative(p.T @ p, torch.eye(RANK)) < 1e-5
    assert report["0"].method == "exact" and report["0"].num_random == 0


def test_a_layer_that_no_gradient_reaches_keeps_its_p():
    f = Fixture()
    f.step(0)
    before = f.bytes()
    f.controller.begin_step(2)
    f.layers["0"](f.inputs(2)).square().mean().backward()
    report = {r.name: r for r in f.controller.end_step(True).layers}
    assert "no gradient" in report["2"].kept and report["0"].kept is None
    assert same({k: v for k, v in before.items() if k.startswith("2.")}, f.bytes())


def test_a_failed_decomposition_keeps_p_and_the_run_goes_on(monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    for method in ("exact", "gram", "sketch"):
        f = Fixture(subspace=method)
        f.step(0)
        before = f.bytes()
        with monkeypatch.context() as patch:
            for function in ("svd", "eigh"):
                patch.setattr(torch.linalg, function, fails)
            if method != "sketch":
                report = f.step(2)
            else:  # its columns need a QR, which must work: only that of the sketch itself fails
                patch.setattr(controller_module, "decompose", fails)
                report = f.step(2)
        assert all("decomposition failed" in r.kept for r in report.layers)
        assert same(before, f.bytes())
        assert f.step(4).summary()["num_kept"] == 0


def test_svd_failing_falls_back_to_the_next_method(monkeypatch):
    f = Fixture(subspace="exact", quantize_p="none")
    f.step(0)
    gradients = f.dense_gradients([f.inputs(2)])

    def fails(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", fails)
        report = f.step(2)
    for r in report.layers:
        assert r.kept is None and r.method == "gram"
        matrix = canonical(f.layers[r.name], gradients[r.name])
        assert np.linalg.norm(projector(f.layers[r.name]) - top_projector(matrix, RANK)) < 1e-3


# ---------------------------------------------------------------- memory and state


def test_a_gradient_is_let_go_when_its_p_is_there():
    f = Fixture()
    f.controller.begin_step(0)
    f.loss(f.inputs(0)).backward()
    totals = {name: weakref.ref(a.total) for name, a in f.controller._current.gathered.items()}
    assert len(totals) == 2
    f.controller.gradient_complete("2")
    assert totals["2"]() is None and totals["0"]() is not None
    f.controller.end_step(True)
    assert totals["0"]() is None


def test_a_sketching_tap_never_holds_the_gradient():
    f = Fixture(subspace="sketch", sketch_oversampling=2)
    f.step(0)
    f.fill_moments()
    f.controller.begin_step(2)
    for index in range(2):
        f.loss(f.inputs(index)).backward()
    for name, gathered in f.controller._current.gathered.items():
        layer = f.layers[name]
        assert gathered.sketch().shape == (layer.basis_shape[0], RANK + 2)
        assert gathered.probed().shape == (layer.basis_shape[0], 8)
        assert gathered.columns.shape == (layer.factor_length, RANK + 2 + 8)
    f.controller.end_step(True)


def test_merged_weights_of_two_layers_are_never_alive_together(monkeypatch):
    alive: list[weakref.ref] = []
    original = controller_module.compensate

    def spy(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not [r for r in alive if r() is not None]
        alive.append(weakref.ref(weight.untyped_storage()))
        return original(weight, *args, **kwargs)

    monkeypatch.setattr(controller_module, "compensate", spy)
    f = Fixture()
    f.originals = {}
    f.controller._original = lambda name: torch.randn(f.layers[name].weight_shape)
    f.step(0)
    f.step(2)
    assert len(alive) == 4


def test_state_is_json_and_comes_back():
    one, two = Fixture(), Fixture()
    one.step(0)
    one.step(2, applied=False)
    state = json.loads(json.dumps(one.controller.state_dict()))
    two.model.load_state_dict(one.model.state_dict())
    two.controller.load_state_dict(state)
    assert two.controller.state_dict() == one.controller.state_dict()
    for f in (one, two):
        assert f.step(3) is not None  # overdue, and not a first initialization any more
    assert same(one.bytes(), two.bytes())


# ---------------------------------------------------------------- owners and rounds


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_layer_has_an_owner_and_loads_differ_by_the_largest_cost_at_most(seed, world_size):
    draw = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(int(draw.integers(1, 40)))]
    # A few sizes that repeat, as in a model, or all different.
    sizes = [3.0, 50.0, 400.0] if seed % 2 else list(draw.uniform(1, 1000, len(names)))
    costs = {name: float(draw.choice(sizes)) for name in names}
    owners = assign_owners(costs, world_size)
    assert owners.keys() == costs.keys() and set(owners.values()) <= set(range(world_size))
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(world_size)]
    assert max(loads) - min(loads) <= max(costs.values()) * (1 + 1e-12)
    assert assign_owners(dict(costs), world_size) == owners, "all ranks agree"


def test_many_cheap_layers_make_up_for_a_costly_one():
    owners = assign_owners({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 4.0}, 2)
    assert [rank for name, rank in owners.items() if name != "e"] == [1 - owners["e"]] * 4


class Alone(Ranks):
    """One of several ranks, as far as the plan of work is concerned."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("subspace", ["gram", "sketch"])
def test_rounds_hold_every_layer_once_and_an_owner_at_most_once_each(world_size, subspace):
    shapes = [(40, 53), (53, 40), (16, 16), (70, 20), (33, 90), (90, 33), (20, 20)]
    model = nn.ModuleList([nn.Linear(*shape) for shape in shapes])
    options = LoQTConfig(rank=RANK, subspace=subspace)
    convert(model, options)
    layers = loqt_layers(model)
    plans = []
    for rank in range(world_size):
        ranks = Alone(rank, world_size)
        plans.append(Controller(layers, options, Store(layers), original=None, seed=0, ranks=ranks))
    rounds, owners = plans[0]._rounds, plans[0].owners
    assert all(plan._rounds == rounds and plan.owners == owners for plan in plans), "all ranks make the same plan"
    assert sorted(name for names in rounds for name in names) == sorted(layers)
    for names in rounds:
        assert len({owners[name] for name in names}) == len(names)
    assert len(rounds) == max(list(owners.values()).count(rank) for rank in range(world_size))
    assert len(set(owners.values())) == min(world_size, len(layers))
    # Each rank goes through its layers from the costliest to the cheapest, so that costly ones meet.
    costs = {name: plans[0]._cost(layer) for name, layer in layers.items()}
    for rank in range(world_size):
        mine = [costs[name] for names in rounds for name in names if owners[name] == rank]
        assert mine == sorted(mine, reverse=True)


def test_a_larger_layer_costs_more():
    f = Fixture()
    model = nn.ModuleList([nn.Linear(40, 53), nn.Linear(80, 106)])
    convert(model, f.options)
    small, large = loqt_layers(model).values()
    for subspace in ("exact", "gram", "sketch"):
        f.controller.options.subspace = subspace
        assert 0 < 2 * f.controller._cost(small) < f.controller._cost(large)


@pytest.mark.parametrize("state", ["keep", "reset", "project", "transport"])
@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_parts_of_the_batch_make_what_one_makes_of_all(world_size, method, state):
    """W and P bit for bit on all ranks; P and B those of one process that saw every row."""
    size = 24 * world_size

    def steps(f: Fixture, part: slice, share: float) -> list[dict[str, Any]]:
        def loss(x: Tensor) -> Tensor:  # rows do not meet, so that sums over parts are sums over rows
            return (f.model(x) - torch.ones(40)).square().mean()

        f.loss = loss
        records = []
        for step in (0, 2, 4):
            if step:
                f.move(0.05, seed=step)
            if step == 2:
                f.fill_moments()
            report = f.step(step, xs=[f.inputs(step, size)[part]], scale=share)
            records.append(report.record())
        return records

    alone = Fixture(subspace=method, quantize_p="none", quantize_w="none", optimizer_state=state)
    expected = steps(alone, slice(None), 1.0)

    def train(ranks: Ranks) -> tuple[Fixture, list[dict[str, Any]]]:
        f = Fixture(subspace=method, quantize_p="none", quantize_w="none", optimizer_state=state, ranks=ranks)
        part = slice(24 * ranks.rank, 24 * (ranks.rank + 1))
        return f, steps(f, part, 1 / world_size)

    results = as_ranks(world_size, train)
    first = results[0][0]
    for f, _ in results:
        assert same(f.bytes(), first.bytes())
        for name, layer in f.layers.items():
            assert np.linalg.norm(projector(layer) - projector(alone.layers[name])) < 1e-3
            assert relative(layer.effective_weight(), alone.layers[name].effective_weight()) < 1e-4
            assert (name in f.store.kept) == (name in alone.store.kept)
            if name in f.store.kept:
                for index in (0, 1):
                    assert torch.equal(f.store.kept[name][index], first.store.kept[name][index])
    for _, records in results:
        for record, wanted in zip(records, expected, strict=True):
            for layer, other in zip(record["layers"], wanted["layers"], strict=True):
                assert layer["name"] == other["name"] and layer["kept"] is None
                assert layer["captured_energy"] == pytest.approx(other["captured_energy"], rel=1e-3)
