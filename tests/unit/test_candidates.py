"""tools/candidates.py: each candidate against float64, numpy or a closed form, on layers whose gradient is known."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import effective_weight, make_config, relative
from test_controller import energy, projector, top_projector
from torch import Tensor, nn

from loqt_ds.core.quantization import quantize
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.engines.single import SingleEngine
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import convert, loqt_layers

CPU = torch.device("cpu")
SHAPES = {"right": (53, 40), "left": (40, 53)}  # (out, in): no multiple of 64 values
RANK, TOKENS = 6, 48


@pytest.fixture(scope="module")
def candidates(repository: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("candidates")
    sys.path.remove(str(repository / "tools"))
    del sys.modules["candidates"], sys.modules["candidates_rounding"]


@pytest.fixture(scope="module")
def rounding(candidates: Any) -> Any:
    return sys.modules["candidates_rounding"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Two(nn.Module):
    """A layer of each side; neither sees the other."""

    def __init__(self) -> None:
        super().__init__()
        for number, (side, (out, inside)) in enumerate(SHAPES.items()):
            linear = nn.Linear(inside, out, bias=False)
            with torch.no_grad():
                linear.weight.copy_(0.2 * gaussian(out, inside, seed=number))
            setattr(self, side, linear)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {side: getattr(self, side)(x[side]) for side in SHAPES}


class Run:
    """An engine over `Two`; the loss of a step is Σ y ∘ c, so that G = cᵀ x whatever the weights are."""

    def __init__(self, candidates: Any, wanted: dict[str, str], *, seed: int = 0, **loqt: Any) -> None:
        options = {
            "rank": RANK,
            "interval": 3,
            "subspace": "exact",
            "quantize_p": "none",
            "optimizer_state": "keep",
        } | loqt
        self.config = make_config(loqt=options, train={"seed": seed})
        model = Two()
        originals = convert(model, self.config.loqt)
        self.engine = SingleEngine(model, self.config, original=originals.__getitem__)
        self.layers = loqt_layers(model)
        candidates.install(self.engine, wanted)
        self.seen: list[tuple[str, dict[str, Any]]] = []  # what the methods that are watched were given and gave

    @property
    def controller(self) -> Any:
        return self.engine.controller

    def watch(self, method: str, note: Any) -> None:
        """Appends note(*arguments, result) to `seen` after each call of a method of the controller."""
        original = getattr(self.controller, method)

        def watched(*arguments: Any) -> Any:
            before = note(*arguments, None)
            result = original(*arguments)
            self.seen.append((method, before | {"result": result}))
            return result

        setattr(self.controller, method, watched)

    @staticmethod
    def data(step: int, side: str) -> tuple[Tensor, Tensor]:
        """x (T, in) and c (T, out), of columns of uneven size."""
        out, inside = SHAPES[side]
        spread = torch.linspace(0.3, 3, inside), torch.linspace(2, 0.5, out)
        number = 10 * step + (side == "left")
        return gaussian(TOKENS, inside, seed=1000 + number) * spread[0], gaussian(TOKENS, out, seed=number) * spread[1]

    def gradient(self, *steps: int, side: str) -> np.ndarray:
        """A (k, l) of the sum over some steps, in float64."""
        total = sum(c.double().T @ x.double() for x, c in (self.data(step, side) for step in steps))
        return (total.T if side == "right" else total).numpy()

    def step(self, data: dict[str, tuple[Tensor, Tensor]] | None = None) -> Any:
        step = self.engine.step_index
        data = {side: self.data(step, side) for side in SHAPES} if data is None else data
        y = self.engine(x={side: x for side, (x, _) in data.items()})
        self.engine.backward(sum((y[side] * c).sum() for side, (_, c) in data.items()))
        report = self.engine.step()
        assert report is not None and report.applied
        return report.reinit

    def steps(self, count: int) -> Any:
        """The last re-initialization of so many steps."""
        reports = [self.step() for _ in range(count)]
        return [report for report in reports if report is not None][-1:]

    def weights(self) -> dict[str, Tensor]:
        return {side: effective_weight(layer) for side, layer in self.layers.items()}


def blocks_of(matrix: Tensor, size: int) -> np.ndarray:
    flat = matrix.double().numpy().reshape(-1)
    return np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


# ---------------------------------------------------------------- in an engine: W


def test_without_candidates_nothing_changes(candidates: Any) -> None:
    runs = [Run(candidates, {}), Run(candidates, {})]
    plain = runs[1].engine
    plain.controller = Controller(
        plain.controller.layers,
        plain.controller.options,
        plain.controller.store,
        original=plain.controller._original,
        seed=plain.controller._seed,
    )
    for run in runs:
        run.steps(8)
    one, other = (run.engine.network.state_dict() for run in runs)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-6), ("nf4", 0.2)])
@pytest.mark.parametrize("loqt", [{}, {"quantize_w": "int4", "compensation_steps": 0, "double_quant": "w"}])
def test_what_is_lost_comes_back_at_the_next_merge(
    candidates: Any, kind: str, tolerance: float, loqt: dict[str, Any]
) -> None:
    run = Run(candidates, {"error_feedback": kind}, **loqt)

    def note(name: str, weight: Tensor, *_: Any) -> dict[str, Any]:
        return {"name": name, "weight": weight.double(), "merged": effective_weight(run.layers[name])}

    run.watch("_compensate", note)
    after: dict[str, Tensor] = {}
    for step in range(7):
        run.step()
        if step % 3:
            continue
        for _, seen in run.seen:
            name, weight = seen["name"], seen["weight"]
            if name in after:  # what was added is what the last one had lost
                assert relative(weight - seen["merged"], after[name]) < tolerance
            after[name] = weight - run.weights()[name]
            assert relative(after[name], 0 * weight + 1e-9) > 1  # something is lost
        assert {seen["name"] for _, seen in run.seen} == set(SHAPES)
        run.seen.clear()
    values = sum(out * inside for out, inside in SHAPES.values())
    assert run.controller.num_bytes() == pytest.approx(
        4 * values if kind == "fp32" else (0.5 + 4 / 64) * values, abs=32
    )


@pytest.mark.parametrize("side", SHAPES)
def test_small_updates_reach_the_codes_with_error_feedback_only(candidates: Any, side: str) -> None:
    """The same update again and again, each a tenth of what moves a code, under a P that cannot hold it."""
    distance = {}
    for wanted in ({}, {"error_feedback": "fp32"}):
        run = Run(candidates, wanted, compensation_steps=0)
        run.step()
        layer, controller, start = run.layers[side], run.controller, run.weights()[side]
        p = torch.nn.functional.pad(torch.ones(layer.basis_shape[0], 1), (0, RANK - 1))
        factor = torch.nn.functional.pad(0.01 * gaussian(layer.factor_length, 1).sign(), (0, RANK - 1))
        for _ in range(25):
            layer.set_p(quantize(p, layer.spec_p))
            result = controller._compensate(
                side, controller._merged(side, layer.canonical(factor)), torch.zeros_like(p)
            )
            layer.set_w(result.packed)
        product = factor.double() @ p.double().T if side == "right" else p.double() @ factor.double().T
        distance[bool(wanted)] = relative(layer.weight_q().double() - start, 25 * layer.scale * product)
    assert distance[True] < 0.5 < 0.9 < distance[False]


def test_the_last_rounding_is_seeded_by_seed_step_and_layer(candidates: Any) -> None:
    runs = [Run(candidates, {"stochastic": "1"}, seed=seed) for seed in (0, 0, 1)]
    runs[0].watch("_layer_seed", lambda name, _: {"name": name})
    for run in runs:
        run.steps(4)
    assert len({seen["result"] for _, seen in runs[0].seen if seen["name"].endswith("/rounding")}) == 4
    states = [run.engine.network.state_dict() for run in runs]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["right.w_codes"], states[2]["right.w_codes"])
    plain = Run(candidates, {})
    before, after = (run.steps(4)[0].summary() for run in (plain, Run(candidates, {"stochastic": "1"})))
    assert after["error_after"] > 1.2 * before["error_after"]


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_values_of_other_blocks_are_kept_dense(candidates: Any, rounding: Any, size: int) -> None:
    run = Run(candidates, {"blocksize": str(size)}, quantize_w="none", compensation_steps=0)
    original = run.weights()
    assert run.steps(1)[0].summary()["error_after"] > 0.05
    table = rounding.levels("nf4", CPU).double().numpy()
    for side, layer in run.layers.items():
        blocks = blocks_of(original[side], size)
        fractions = blocks / np.abs(blocks).max(1, keepdims=True)
        nearest = table[np.abs(fractions[:, :, None] - table).argmin(2)] * np.abs(blocks).max(1, keepdims=True)
        np.testing.assert_allclose(blocks_of(layer.weight_q(), size), nearest, rtol=1e-5, atol=1e-7)


def test_a_weight_that_was_never_rounded_is_not_kept(candidates: Any) -> None:
    run = Run(candidates, {"blocksize": "32", "factor": "keep"}, quantize_w="none")
    assert run.steps(1)[0].summary()["error_after"] > 0.02
    for layer in run.layers.values():
        blocks = blocks_of(layer.weight_q(), 32)
        assert max(len(set(block)) for block in np.round(blocks / np.abs(blocks).max(1, keepdims=True), 4)) <= 16


# ---------------------------------------------------------------- in an engine: importance


@pytest.mark.parametrize("loqt", [{}, {"subspace": "sketch"}])
def test_importance_by_mean_squares_of_the_gradient(candidates: Any, loqt: dict[str, Any]) -> None:
    run = Run(candidates, {"fisher": "g"}, **loqt)
    run.watch("_measured", lambda name, *_: {"name": name})
    run.step()
    assert len(run.seen) == 2
    for _, seen in run.seen:
        side, found = seen["name"], seen["result"]
        squares = run.gradient(0, side=side) ** 2  # (k, l)
        short, long = (found.columns, found.rows) if side == "right" else (found.rows, found.columns)
        expected = squares.mean(1) / squares.mean()
        if loqt:  # estimated from eight probes
            assert np.corrcoef(short.numpy(), expected)[0, 1] > 0.5
            assert torch.equal(long, torch.ones_like(long))
        else:
            np.testing.assert_allclose(short.numpy(), expected + 1e-3, rtol=1e-4)
            np.testing.assert_allclose(long.numpy(), squares.mean(0) / squares.mean() + 1e-3, rtol=1e-4)


def test_importance_by_tokens(candidates: Any) -> None:
    run = Run(candidates, {"fisher": "x"})
    run.watch("_measured", lambda name, *_: {"name": name})
    run.steps(4)
    assert [seen["name"] for _, seen in run.seen] == 2 * [seen["name"] for _, seen in run.seen[:2]]
    for number, (_, seen) in enumerate(run.seen):
        x, c = run.data(3 * (number // 2), seen["name"])
        for found, source in ((seen["result"].rows, c), (seen["result"].columns, x)):
            squares = source.double().square().mean(0)
            np.testing.assert_allclose(found.double(), squares / squares.mean() + 1e-3, rtol=1e-4)


def test_importance_by_the_second_moment(candidates: Any) -> None:
    run = Run(candidates, {"fisher": "b"})

    def note(name: str, _: Any) -> dict[str, Any]:
        known = run.controller.store.has_moments(name)
        moment = run.controller.store.moment(name, 1).double().clone() if known else None
        return {"name": name, "moment": moment}

    run.watch("_importance_by_moment", note)
    run.steps(4)
    first, later = run.seen[:2], run.seen[2:]
    assert len(later) == 2 and all(seen["result"] is None for _, seen in first)
    for _, seen in later:
        right, found = seen["name"] == "right", seen["result"]
        squares = seen["moment"].mean(1 if right else 0)
        np.testing.assert_allclose(
            (found.rows if right else found.columns).double(), squares / squares.mean() + 1e-3, 1e-4
        )
        other = found.columns if right else found.rows
        assert torch.equal(other, torch.ones_like(other))


# ---------------------------------------------------------------- in an engine: P


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_p_of_several_steps_gradients(candidates: Any, method: str) -> None:
    run = Run(candidates, {"denoise": "2"}, subspace=method)
    for step, steps in ((0, [0]), (3, [2, 3]), (6, [5, 6])):
        while run.engine.step_index <= step:
            report = run.step()
        for side, layer in run.layers.items():
            matrix = run.gradient(*steps, side=side)
            best = energy(matrix, top_projector(matrix, RANK))
            assert energy(matrix, projector(layer)) == pytest.approx(best, rel=1e-4 if method == "exact" else 0.03)
        by_name = {layer.name: layer.captured_energy for layer in report.layers}
        if method == "exact":
            assert by_name["right"] == pytest.approx(
                energy(run.gradient(*steps, side="right"), projector(run.layers["right"])), rel=1e-4
            )
        assert all(layer.tap is None for layer in run.layers.values())


def test_a_skipped_step_is_left_out_of_the_sum(candidates: Any) -> None:
    run = Run(candidates, {"denoise": "3"})
    run.steps(4)
    for step in (4, 5):
        data = {side: run.data(step, side) for side in SHAPES}
        if step == 4:
            data["left"][1][0, 0] = torch.inf
            run.engine.backward(
                sum((y * data[s][1]).sum() for s, y in run.engine(x={s: d[0] for s, d in data.items()}).items())
            )
            assert not run.engine.step().applied
        else:
            run.step()
    run.step()
    for side, layer in run.layers.items():
        matrix = run.gradient(5, 6, side=side)
        assert energy(matrix, projector(layer)) == pytest.approx(energy(matrix, top_projector(matrix, RANK)), rel=1e-4)


@pytest.mark.parametrize("kind", ["gauss", "moment"])
def test_columns_of_a_sketch(candidates: Any, kind: str) -> None:
    run = Run(candidates, {"sketch": kind}, subspace="sketch", sketch_oversampling=5)

    def note(name: str, layer: Any, *_: Any) -> dict[str, Any]:
        known = run.controller.store.has_moments(name)
        moment = run.controller.store.moment(name, 0).double() if known else None
        return {
            "layer": layer,
            "moment": None if moment is None else layer.canonical(moment).clone(),
            "step": run.engine.step_index,
        }

    run.watch("_omega", note)
    reports = run.steps(4)
    assert len(run.seen) == 4
    for _, seen in run.seen:
        omega, length = seen["result"].double(), seen["layer"].factor_length
        assert omega.shape == (length, RANK + 5)
        if kind == "gauss":
            assert 0.7 < float(omega.std()) < 1.3 and float(omega.norm(dim=0).max()) > 3
        elif seen["step"]:
            assert relative(omega.T @ omega, torch.eye(RANK + 5)) < 1e-5
            moment = seen["moment"]
            assert moment is not None and float(moment.norm()) > 0
            assert relative(omega @ (omega.T @ moment), moment) < 1e-5
    assert 0.3 < reports[0].summary()["captured_energy"] < 1


def test_a_moment_that_knows_the_gradient_finds_its_subspace(candidates: Any) -> None:
    """A of exact rank r, M = AᵀV of any V: the span of A Ω is A's."""
    run = Run(candidates, {"sketch": "moment"}, subspace="sketch", sketch_oversampling=1)
    run.steps(3)
    data = {}
    for side, (out, inside) in SHAPES.items():
        x, c = gaussian(TOKENS, inside), gaussian(TOKENS, RANK) @ gaussian(RANK, out)
        inner, outer = (x, c) if side == "right" else (c, x)
        data[side] = x, c
        layer = run.layers[side]
        moment = outer.T @ inner @ gaussian(layer.basis_shape[0], RANK, seed=4)  # (l, r)
        second = torch.ones(layer.B.shape)
        run.controller.store.set_moments(side, layer.canonical(moment), second)
    report = run.step(data)
    assert report.summary()["captured_energy"] > 0.999


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_p_that_still_does_is_kept(candidates: Any, fresh: bool, method: str) -> None:
    """The same gradient again: P captures what the best would. One in other directions: it does not."""
    run = Run(candidates, {"criterion": "0.95"}, schedule="exponential", growth=9.0, subspace=method)
    data = {}
    for side, (out, inside) in SHAPES.items():
        data[side] = gaussian(TOKENS, inside), gaussian(TOKENS, RANK) @ gaussian(RANK, out)
        if side == "right":  # P is of x
            data[side] = gaussian(TOKENS, RANK) @ gaussian(RANK, inside), gaussian(TOKENS, out)
    for _ in range(3):
        run.step(data)
    before = run.engine.network.state_dict()
    frozen = {key: value.clone() for key, value in before.items() if key.endswith(("_codes", "_absmax", "_dense"))}
    report = run.step() if fresh else run.step(data)  # every `interval` steps, whatever the schedule says
    assert report is not None and report.summary()["num_kept"] == (0 if fresh else 2)
    after = run.engine.network.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in frozen.items()) == fresh
    assert all(("captures" in layer.kept) != fresh for layer in report.layers if layer.kept or not fresh)


def test_what_p_captures_is_compared_with_the_best(candidates: Any) -> None:
    run = Run(candidates, {})
    run.steps(3)
    parts = {}
    for side, layer in run.layers.items():
        matrix = run.gradient(3, side=side)
        parts[side] = energy(matrix, projector(layer)) / energy(matrix, top_projector(matrix, RANK))
    assert abs(parts["right"] - parts["left"]) > 0.01 and max(parts.values()) < 1
    limit = sum(parts.values()) / 2
    run = Run(candidates, {"criterion": str(limit)})
    report = run.steps(4)[0]
    assert {layer.name: layer.kept is not None for layer in report.layers} == {
        s: part >= limit for s, part in parts.items()
    }


def test_aligning_turns_p_within_its_span(candidates: Any) -> None:
    aligned, plain = Run(candidates, {"align": "1"}), Run(candidates, {})
    for run in (aligned, plain):
        run.steps(3)
    old = {side: layer.basis_hat().double().clone() for side, layer in aligned.layers.items()}
    for run in (aligned, plain):
        run.step()
    for side, layer in aligned.layers.items():
        new, other = layer.basis_hat().double(), plain.layers[side].basis_hat().double()
        assert np.linalg.norm(projector(layer) - projector(plain.layers[side])) < 1e-4
        middle = new.T @ old[side]  # symmetric and positive where no turn of P comes closer
        assert relative(middle.T, middle) < 1e-4 and float(torch.linalg.eigvalsh(middle).min()) > -1e-6
        assert float((new - old[side]).norm()) < 0.97 * float((other - old[side]).norm())


def test_sampled_directions_are_singular_vectors_and_strong_ones_come_more_often(candidates: Any) -> None:
    run = Run(candidates, {"basis": "sample"})
    run.step()
    for side, layer in run.layers.items():
        matrix = run.gradient(0, side=side)
        left, values, _ = np.linalg.svd(matrix, full_matrices=False)
        chosen = np.abs(left.T @ layer.basis_hat().double().numpy())  # (k, r)
        np.testing.assert_allclose(chosen.max(0), 1, atol=1e-3)
        assert len(set(chosen.argmax(0))) == RANK
        assert energy(matrix, projector(layer)) < 0.98 * energy(matrix, top_projector(matrix, RANK))
    gathered = sys.modules["candidates"].Gathered(torch.from_numpy(matrix).float(), None, False, TOKENS)
    counts = np.zeros(len(values))
    for seed in range(300):
        basis, _ = run.controller._decompose(run.layers["left"], gathered, seed)
        counts[np.abs(left.T @ basis.vectors.double().numpy()).argmax(0)] += 1
    assert counts.sum() == 300 * RANK
    draws = np.random.default_rng(0)
    expected = np.zeros(len(values))
    for _ in range(3000):
        expected[draws.choice(len(values), RANK, replace=False, p=values / values.sum())] += 0.1
    # inclusions of 300 draws deviate by √(300 / 4) at most
    assert np.abs(counts - expected).max() < 4.5 * 75**0.5
    assert counts[:5].mean() > 1.3 * counts[-15:-5].mean() > 0


def test_fewer_directions_than_the_rank_are_all_taken(candidates: Any) -> None:
    run = Run(candidates, {"basis": "sample"})
    data = {side: (gaussian(4, inside), gaussian(4, out)) for side, (out, inside) in SHAPES.items()}
    report = run.step(data)
    assert all(layer.num_random == RANK - 4 and layer.captured_energy > 0.999 for layer in report.layers)


def test_a_random_subspace_does_not_look_at_the_gradient(candidates: Any) -> None:
    one, other = Run(candidates, {"basis": "random"}), Run(candidates, {"basis": "random"})
    report = one.step()
    other.step({side: (gaussian(9, inside), gaussian(9, out)) for side, (out, inside) in SHAPES.items()})
    for side, layer in one.layers.items():
        p = layer.basis_hat()
        assert torch.equal(p, other.layers[side].basis_hat())
        assert relative(p.T @ p, torch.eye(RANK)) < 1e-5
        told = next(entry.captured_energy for entry in report.layers if entry.name == side)
        assert told == pytest.approx(energy(one.gradient(0, side=side), projector(layer)), rel=1e-4)


# ---------------------------------------------------------------- in an engine: moments


def test_the_second_moment_stays(candidates: Any) -> None:
    run = Run(candidates, {"momentum": "second"})

    def note(layer: Any, first: Tensor, second: Tensor, *_: Any) -> dict[str, Any]:
        side = next(name for name, other in run.layers.items() if other is layer)
        assert float(first.abs().max()) > 0
        return {"side": side, "second": second.double().clone()}

    run.watch("_carry_moments", note)
    run.steps(4)
    assert len(run.seen) == 2  # the first re-initialization has nothing to carry
    for _, seen in run.seen:
        layer, store = run.layers[seen["side"]], run.controller.store
        first, second = (layer.canonical(store.moment(seen["side"], index)) for index in (0, 1))
        assert torch.equal(second.double(), seen["second"]) and float(second.max()) > 0
        assert float(first.abs().max()) == 0


# ---------------------------------------------------------------- together, saved, refused

TOGETHER = {
    "error_feedback": "nf4",
    "stochastic": "1",
    "fisher": "x",
    "absmax": "search",
    "denoise": "2",
    "criterion": "0.99",
    "momentum": "second",
    "factor": "keep",
    "align": "1",
}


@pytest.mark.parametrize(
    ("wanted", "loqt"),
    [(TOGETHER, {}), ({"sketch": "moment", "denoise": "3", "error_feedback": "fp32"}, {"subspace": "sketch"})],
)
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_goes_on_from_its_state(candidates: Any, wanted: dict[str, str], loqt: dict[str, Any], stop: int) -> None:
    """Also between the steps whose gradients are summed. The rest of the engine's state has tests of its own."""
    through, stopped = Run(candidates, wanted, **loqt), Run(candidates, wanted, **loqt)
    through.steps(8)
    stopped.steps(stop)
    kept, state = io.BytesIO(), stopped.controller.state_dict()
    stopped.step()  # what comes later does not change it
    torch.save(state, kept)
    fresh = Run(candidates, wanted, **loqt)
    fresh.steps(stop)
    plain = fresh.controller
    fresh.engine.controller = Controller(plain.layers, plain.options, plain.store, original=None, seed=plain._seed)
    fresh.engine.controller = candidates.CandidateController(fresh.engine.controller, plain.wanted)
    kept.seek(0)
    fresh.controller.load_state_dict(torch.load(kept, weights_only=True))
    fresh.steps(8 - stop)
    one, other = (run.engine.network.state_dict() for run in (through, fresh))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_state_without_candidates_is_refused(candidates: Any) -> None:
    run = Run(candidates, {"error_feedback": "fp32"})
    with pytest.raises(ValueError, match="without candidates"):
        run.controller.load_state_dict({"initialized": [], "overdue": False})


@pytest.mark.parametrize(
    ("wanted", "loqt", "message"),
    [
        ({"magic": "1"}, {}, "no candidate.magic.*error_feedback=nf4|fp32.*basis=sample"),
        ({"error_feedback": "int8"}, {}, "error_feedback='int8'.*nf4 or fp32"),
        ({"stochastic": "0"}, {}, "stochastic='0'.*use 1"),
        ({"denoise": "1"}, {}, "denoise='1'.*2 or more"),
        ({"criterion": "1.5"}, {}, "criterion='1.5'.*up to 1"),
        ({"criterion": "nan"}, {}, "criterion='nan'.*up to 1"),
        ({"sketch": "gauss", "basis": "random"}, {}, "sketch.*basis=random"),
        ({"denoise": "2", "basis": "random"}, {}, "denoise.*basis=random"),
        ({"criterion": "0.5", "basis": "sample"}, {}, "criterion.*basis=sample"),
        ({"absmax": "search"}, {"quantize_w": "none"}, "absmax=search.*quantize_w is none"),
        ({"blocksize": "32"}, {}, "blocksize=32 takes loqt.quantize_w=none, not nf4"),
        ({"fisher": "g"}, {"compensation_steps": 0}, "fisher=g.*compensation_steps is 0"),
        ({"criterion": "0.5"}, {"schedule": "never"}, "criterion=0.5.*schedule is never"),
        ({"sketch": "gauss"}, {}, "sketch=gauss takes loqt.subspace=sketch"),
        ({"basis": "sample"}, {"subspace": "sketch"}, "basis=sample takes whole gradients"),
        ({"momentum": "second"}, {"optimizer_state": "reset"}, "momentum=second.*reset; use keep"),
    ],
)
def test_what_would_do_nothing_is_refused(
    candidates: Any, wanted: dict[str, str], loqt: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Run(candidates, wanted, **loqt)
    if not loqt and "takes" not in message:  # what needs no engine to be known
        with pytest.raises(ValueError, match=message):
            candidates.check(wanted)


def test_denoise_wants_to_know_what_comes(candidates: Any) -> None:
    class Whenever(ReinitSchedule):
        def is_due(self, step: int) -> bool:
            return step == 3

    run = Run(candidates, {})
    run.controller.schedule = Whenever("static", 3)
    with pytest.raises(ValueError, match=r"denoise=2 takes a schedule that is known ahead"):
        candidates.install(run.engine, {"denoise": "2"})
    candidates.install(run.engine, {"denoise": "2", "criterion": "0.5"})  # which brings a schedule


def test_candidates_come_before_the_first_step(candidates: Any) -> None:
    run = Run(candidates, {})
    run.step()
    with pytest.raises(ValueError, match="before the first step, not after 1"):
        candidates.install(run.engine, {"align": "1"})


def test_every_value_that_is_offered_is_taken(candidates: Any) -> None:
    numbers = {"denoise": "3", "criterion": "0.5"}
    for name, values in candidates.VALUES.items():
        for value in [numbers[name]] if name in numbers else values:
            assert candidates.check({name: value}).names == [name]
            assert name in candidates.__doc__
