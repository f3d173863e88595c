"""Whole steps of a tiny Llama on one device: gradients against a dense transformers model."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    dense_state,
    effective_weight,
    equal,
    factors,
    llama_config,
    lm_loss,
    make_config,
    make_engine,
    relative,
    restore,
    run,
    save,
    snapshot,
    token_batch,
    train_step,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from loqt_ds import optim as optim_module
from loqt_ds.config import ConfigError, load_config
from loqt_ds.engines.single import SingleEngine
from loqt_ds.method import controller as controller_module
from loqt_ds.method import head, lean
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import build_model, initializer


def dense_twin(engine: SingleEngine) -> LlamaForCausalLM:
    """transformers' own model in float64 with the effective weights (its norms compute in float32)."""
    dense = LlamaForCausalLM(engine.network.config).double()
    dense.load_state_dict({name: t.double() for name, t in dense_state(engine.network).items()})
    return dense.train()


def dense_gradients(engine: SingleEngine, ids: Tensor) -> dict[str, Tensor]:
    dense = dense_twin(engine)
    lm_loss(dense, ids).backward()
    return {name: p.grad for name, p in dense.named_parameters()}


def top_projector(gradient: Tensor, layer: Any) -> Tensor:
    matrix = gradient.T if layer.side == "right" else gradient
    left = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, : layer.rank]
    return left @ left.T


def projector(layer: Any) -> Tensor:
    q = torch.linalg.qr(layer.basis_hat().double())[0]
    return q @ q.T


# ---------------------------------------------------------------- the gradient P comes from


@pytest.mark.parametrize(("num_micro_batches", "layerwise"), [(1, False), (4, False), (1, True)])
def test_p_comes_from_the_dense_gradient_at_the_effective_weight(num_micro_batches, layerwise):
    config = make_config(
        loqt={"subspace": "exact", "quantize_p": "none"},
        optim={"layerwise": layerwise, "lr": 0.05},
        train={"gradient_accumulation_steps": num_micro_batches},
    )
    engine = make_engine(config)
    for step in range(5):
        ids = token_batch(step)
        gradients = dense_gradients(engine, ids)
        _, report = train_step(engine, ids)
        assert (report.reinit is not None) == (step % 2 == 0)
        if report.reinit is None:
            continue
        for layer_report in report.reinit.layers:
            layer = engine.controller.layers[layer_report.name]
            gradient = gradients[f"{layer_report.name}.weight"]
            matrix = gradient.T if layer.side == "right" else gradient
            best = top_projector(gradient, layer)
            captured = float((best @ matrix).norm() ** 2 / matrix.norm() ** 2)
            actual = float((projector(layer) @ matrix).norm() ** 2 / matrix.norm() ** 2)
            assert actual == pytest.approx(captured, abs=1e-4)
            assert layer_report.captured_energy == pytest.approx(captured, abs=1e-4)
            assert relative(projector(layer), best) < 0.02


def test_gradients_and_their_norm_are_those_of_the_dense_model():
    engine = make_engine(make_config(optim={"lr": 0.05}))
    run(engine, 4)
    ids = token_batch(4)
    expected = dense_gradients(engine, ids)
    engine.backward(lm_loss(engine, ids))
    squared = 0.0
    for name, parameter in engine.network.named_parameters():
        if name.endswith(".B"):
            layer = engine.controller.layers[name.removesuffix(".B")]
            dense, p = expected[name.replace(".B", ".weight")], layer.basis_hat().double()
            reference = layer.scale * (dense @ p if layer.side == "right" else p.T @ dense)
        else:
            reference = expected[name]
        assert relative(parameter.grad, reference) < 1e-4, name
        squared += float(reference.square().sum())
    report = engine.step()
    assert report.grad_norm == pytest.approx(math.sqrt(squared), rel=1e-4)


def test_clipping_scales_all_gradients_before_the_update():
    """After the first step Adam's first moment is (1 − β₁) times the gradient that it was given."""
    limit = 0.05
    engine = make_engine(make_config(train={"max_grad_norm": limit}, loqt={"optimizer_state": "keep"}))
    ids = token_batch(0)
    expected = dense_gradients(engine, ids)
    _, report = train_step(engine, ids)
    assert report.grad_norm > limit
    saved = engine.saved_tensors()["optimizer"]
    moments = {n.removesuffix("/exp_avg"): t for n, t in saved.items() if n.endswith("/exp_avg")}
    of_factors = [moments.pop(name) for name in list(moments) if name.endswith(".B")]
    assert len(of_factors) == 7 and not any(t.any() for t in of_factors)  # reset, as they had seen a step without P
    assert len(moments) == 5  # embedding, head, three norms
    for name, moment in moments.items():
        assert relative(moment, 0.1 * expected[name] * limit / report.grad_norm) < 1e-4, name


def test_the_report_tells_step_rates_and_what_was_done():
    engine = make_engine(make_config(optim={"lr": 0.01, "lr_full_rank": 0.001, "warmup_steps": 4}))
    _, report = train_step(engine, token_batch(0))
    assert (report.step, report.applied) == (0, True)
    assert (report.lr, report.lr_full_rank) == pytest.approx((0.0025, 0.00025))
    assert engine.step_index == 1
    summary = report.reinit.summary()
    assert summary["num_layers"] == 7 and summary["num_kept"] == 0
    _, report = train_step(engine, token_batch(1))
    assert report.step == 1 and report.reinit is None


# ---------------------------------------------------------------- step 0


@pytest.mark.parametrize("layerwise", [False, True])
def test_step_zero_trains_only_what_is_trained_in_full_and_then_compensates(layerwise):
    engine = make_engine(make_config(optim={"layerwise": layerwise}))
    model, source = build_model(llama_config(), engine._config.loqt, initializer(0))
    plain = {name: layer.weight_q() for name, layer in engine.controller.layers.items()}
    for layer in engine.controller.layers.values():
        assert not layer.B.any() and not layer.basis_hat().any()
    ids = token_batch(0)
    with torch.no_grad():
        first = lm_loss(model, ids).item()
    loss, report = train_step(engine, ids)
    assert loss == first
    assert not torch.equal(engine.network.model.embed_tokens.weight, model.model.embed_tokens.weight)
    for r in report.reinit.layers:
        layer, original = engine.controller.layers[r.name], source.weight(r.name)
        before, after = relative(plain[r.name], original), relative(effective_weight(layer), original)
        assert after < 0.97 * before
        assert (r.error_before, r.error_after) == pytest.approx((before, after), rel=1e-3)


# ---------------------------------------------------------------- orders of work


@pytest.mark.parametrize("subspace", ["exact", "gram", "sketch"])
def test_accumulation_is_one_large_micro_batch(subspace, tmp_path):
    def engine_of(num: int) -> SingleEngine:
        config = make_config(
            loqt={
                "subspace": subspace,
                "quantize_w": "none",
                "quantize_p": "none",
                "sketch_oversampling": 4,
                "interval": 5,
            },
            train={"gradient_accumulation_steps": num},
        )
        return make_engine(config)

    def compare(one: SingleEngine, four: SingleEngine) -> None:
        for name, layer in one.controller.layers.items():
            other = four.controller.layers[name]
            if subspace != "sketch":  # a sketch takes its columns from the first micro-batch
                assert relative(projector(other), projector(layer)) < 2e-3, name
            assert relative(effective_weight(other), effective_weight(layer)) < 1e-5, name

    one, four = engine_of(1), engine_of(4)
    assert run(four, 1) == pytest.approx(run(one, 1), rel=1e-6)
    compare(one, four)
    # P may rotate within its span, which Adam would tell apart: the curves are compared from one and the same P.
    four = restore(engine_of(4), save(one, tmp_path))
    assert run(four, 5) == pytest.approx(run(one, 5), rel=2e-6)
    assert [step for step in range(one.step_index) if one.controller.schedule.is_due(step)] == [0, 5]
    compare(one, four)


def test_a_sketch_in_bf16_knows_that_it_has_no_more_rank_than_tokens():
    engine = make_engine(make_config(loqt={"subspace": "sketch", "rank": 16}, train={"dtype": "bf16"}))
    _, report = train_step(engine, token_batch(0, rows=1, length=5))
    assert report.reinit is not None
    assert all(layer.num_random >= 16 - 5 for layer in report.reinit.layers)


PRECISIONS = {
    "fp32": ({}, {"dtype": "fp32"}),
    "bf16-masters": ({"master": "fp32"}, {"dtype": "bf16"}),
    "bf16": ({"master": "bf16"}, {"dtype": "bf16"}),
}
EVERYTHING = (
    {"schedule": "cosine_rewarmup", "rewarmup_steps": 2, "weight_decay": 0.1, "lr_full_rank": 0.004},
    {"gradient_accumulation_steps": 3, "max_grad_norm_per_parameter": 0.02},
)
ORDERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gram-keep": ({"subspace": "gram", "optimizer_state": "keep"}, {}, {}),
    "gram-project": ({"subspace": "gram", "optimizer_state": "project"}, *EVERYTHING),
    "sketch-keep": ({"subspace": "sketch", "optimizer_state": "keep"}, *EVERYTHING),
    "sketch-reset": ({"subspace": "sketch", "optimizer_state": "reset"}, {}, {}),
}


@pytest.mark.parametrize(
    ("order", "precision", "name"),
    [
        *itertools.product(["gram-project", "sketch-keep"], PRECISIONS, ["adamw", "adamw8bit"]),
        ("gram-keep", "fp32", "adamw"),
        ("sketch-reset", "bf16", "adamw8bit"),
    ],
)
def test_layerwise_updates_train_the_same(order, precision, name, monkeypatch):
    """Bit for bit, through re-initializations, with a schedule, weight decay, accumulation and clipping by
    parameter."""
    loqt, optim, train = ORDERS[order]

    def trained(layerwise: bool) -> tuple[list[float], list[float], dict[str, Tensor]]:
        engine = make_engine(
            make_config(
                loqt=loqt,
                optim={"name": name, "layerwise": layerwise, "lr": 0.03} | optim | PRECISIONS[precision][0],
                train=train | PRECISIONS[precision][1],
            ),
            model_config=llama_config(intermediate_size=520),  # B of the MLP has 8-bit moments
        )
        steps = [train_step(engine, token_batch(step, rows=3)) for step in range(5)]
        return [loss for loss, _ in steps], [report.grad_norm for _, report in steps], snapshot(engine)

    monkeypatch.setattr(optim_module, "UPDATE_PIECE", 1024)  # several pieces a parameter
    losses, norms, expected = trained(layerwise=False)
    layerwise_losses, layerwise_norms, actual = trained(layerwise=True)
    assert layerwise_losses == losses and layerwise_norms == norms
    assert equal(actual, expected) == []
    if train:
        assert min(norms) > 0.02 * math.sqrt(12)  # clipping had something to do


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["whole", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("tied", [False, True])
def test_layerwise_updates_train_the_same_as_a_run_has_them(tied, checkpointing):
    """With lean activations and the blocked loss, whose backwards read weights again after others were updated."""

    def trained(layerwise: bool) -> tuple[list[float], dict[str, Tensor]]:
        config = make_config(
            optim={"name": "adamw8bit", "master": "bf16", "layerwise": layerwise, "lr": 0.03},
            train={"dtype": "bf16", "gradient_accumulation_steps": 2},
        )
        engine = make_engine(config, model_config=llama_config(num_hidden_layers=2, tie_word_embeddings=tied))
        lean.install(engine.network)
        head.install(engine.network)
        if checkpointing is not None:
            engine.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        losses = []
        for step in range(4):
            for part in token_batch(step).chunk(2):
                inputs, targets = part[:, :-1], part[:, 1:]
                loss = engine(input_ids=inputs, targets=targets, use_cache=False) / targets.numel()
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        return losses, snapshot(engine)

    (losses, expected), (layerwise_losses, actual) = trained(False), trained(True)
    assert layerwise_losses == losses
    assert equal(actual, expected) == []


@pytest.mark.parametrize("layerwise", [False, True])
def test_each_gradient_is_clipped_by_its_own_norm(layerwise):
    """After the first step Adam's first moment is (1 − β₁) times the gradient that it was given."""
    limit = 0.05
    config = make_config(
        train={"max_grad_norm_per_parameter": limit, "gradient_accumulation_steps": 2},
        optim={"layerwise": layerwise},
        loqt={"optimizer_state": "keep"},
    )
    engine = make_engine(config)
    ids = token_batch(0)
    expected = dense_gradients(engine, ids)
    _, report = train_step(engine, ids)
    saved = engine.saved_tensors()["optimizer"]
    moments = {n.removesuffix("/exp_avg"): t for n, t in saved.items() if n.endswith("/exp_avg")}
    moments = {name: moment for name, moment in moments.items() if not name.endswith(".B")}
    norms = {name: float(expected[name].norm()) for name in moments}
    assert min(norms.values()) < limit < max(norms.values())
    for name, moment in moments.items():
        assert relative(moment, 0.1 * expected[name] * min(1.0, limit / norms[name])) < 1e-4, name
    of_factors = [float(expected[f"{name}.weight"].norm()) for name in engine.controller.layers]
    assert report.grad_norm == pytest.approx(math.hypot(*norms.values()), rel=1e-4)  # before clipping; P is still zero
    assert all(of_factors)


@pytest.mark.parametrize("layerwise", [False, True])
def test_gradients_are_kept_between_micro_batches_and_freed_in_the_last(layerwise):
    engine = make_engine(make_config(optim={"layerwise": layerwise}, train={"gradient_accumulation_steps": 3}))
    train_step(engine, token_batch(0, rows=3))
    parameters = dict(engine.network.named_parameters())
    before = snapshot(engine)
    for index, part in enumerate(token_batch(1, rows=3).chunk(3)):
        engine.backward(lm_loss(engine, part))
        kept = [name for name, parameter in parameters.items() if parameter.grad is not None]
        changed = [n for n, parameter in parameters.items() if not torch.equal(parameter, before[f"model/{n}"])]
        inside = layerwise and index == 2
        assert kept == ([] if inside else list(parameters)) and changed == (list(parameters) if inside else [])
        engine.step()
    assert not any(parameter.grad is not None for parameter in parameters.values())


def test_what_only_an_earlier_micro_batch_made_use_of_is_updated_as_well():
    """The last micro-batch passes by the MLP: its gradients are those of the first, and are due in this step."""

    def trained(layerwise: bool) -> tuple[dict[str, Tensor], set[str]]:
        config = make_config(optim={"layerwise": layerwise}, train={"gradient_accumulation_steps": 2})
        engine = make_engine(config)
        run(engine, 1)
        mlp, before = engine.network.model.layers[0].mlp, snapshot(engine)
        forward = mlp.forward
        for step in (1, 2):  # the second ends in a re-initialization
            for part, used in zip(token_batch(step).chunk(2), (forward, torch.zeros_like), strict=True):
                mlp.forward = used
                engine.backward(lm_loss(engine, part))
                report = engine.step()
        mlp.forward = forward
        assert report.reinit is not None and [r.kept for r in report.reinit.layers] == [None] * 7
        assert not any(parameter.grad is not None for parameter in engine.network.parameters())
        run(engine, 1)
        return snapshot(engine), set(equal(before, snapshot(engine)))

    (expected, moved), (actual, _) = trained(False), trained(True)
    assert all(f"model/model.layers.0.mlp.{name}_proj.B" in moved for name in ("gate", "up", "down"))
    assert equal(actual, expected) == []


class Synchronizations(TorchDispatchMode):
    """Counts reads of a number from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_layerwise_update_waits_for_the_device_once():
    config = make_config(
        optim={"name": "adamw8bit", "master": "bf16", "layerwise": True},
        train={"dtype": "bf16", "max_grad_norm_per_parameter": 0.01},
    )
    engine = make_engine(config, model_config=llama_config(intermediate_size=520))
    run(engine, 1)
    loss = lm_loss(engine, token_batch(1))  # no re-initialization in this step
    with Synchronizations() as found:
        engine.backward(loss)
        engine.step()
    assert found.count == len(list(engine.network.parameters()))


def test_layerwise_updates_and_reinitializes_inside_the_backward():
    engine = make_engine(make_config(optim={"layerwise": True}))
    run(engine, 2)
    before = snapshot(engine)
    completed: list[tuple[str, bool]] = []
    original = engine.controller.apply

    def spy(name: str) -> None:
        layer = engine.controller.layers[name]
        old = layer.w_codes.clone()
        original(name)
        completed.append((name, bool((old != layer.w_codes).any())))

    engine.controller.apply = spy
    engine.backward(lm_loss(engine, token_batch(2)))
    assert sorted(completed) == sorted((name, True) for name in engine.controller.layers)
    for name, parameter in engine.network.named_parameters():
        assert parameter.grad is None, name
        assert not torch.equal(parameter, before[f"model/{name}"]), name
    assert engine.step().reinit.summary()["num_layers"] == 7


def test_by_default_nothing_changes_before_the_step():
    engine = make_engine(make_config())
    run(engine, 2)
    before = snapshot(engine)
    engine.backward(lm_loss(engine, token_batch(2)))
    engine._open = False  # look inside
    assert equal(snapshot(engine), before) == []
    engine._open = True
    assert engine.step().reinit.summary()["num_layers"] == 7


@pytest.mark.parametrize("layerwise", [False, True])
def test_with_one_micro_batch_no_two_gradients_are_alive(layerwise, monkeypatch):
    engine = make_engine(make_config(optim={"layerwise": layerwise}))
    most: list[int] = []
    original = Controller.gradient_complete

    def spy(self: Controller, name: str) -> None:
        most.append(len(self._current.gathered))
        original(self, name)
        assert name not in self._current.gathered

    monkeypatch.setattr(Controller, "gradient_complete", spy)
    run(engine, 3)
    assert max(most) == 1 and most.count(1) == 14  # 7 layers, twice


def test_with_four_micro_batches_all_accumulate_until_the_last():
    engine = make_engine(make_config(train={"gradient_accumulation_steps": 4}))
    sizes = []
    for part in token_batch(0).chunk(4):
        engine.backward(lm_loss(engine, part))
        sizes.append(len(engine.controller._current.gathered))
        engine.step()
    assert sizes == [7, 7, 7, 0]


@pytest.mark.parametrize("layerwise", [False, True])
def test_merged_weights_of_two_layers_are_never_alive_together(layerwise, monkeypatch):
    alive: list[weakref.ref] = []
    original = controller_module.compensate

    def spy(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not [r for r in alive if r() is not None]
        alive.append(weakref.ref(weight.untyped_storage()))
        return original(weight, *args, **kwargs)

    monkeypatch.setattr(controller_module, "compensate", spy)
    run(make_engine(make_config(optim={"layerwise": layerwise})), 3)
    assert len(alive) == 14


@pytest.mark.parametrize(
    "kwargs", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["non-reentrant", "reentrant"]
)
@pytest.mark.parametrize("layerwise", [False, True])
def test_activation_checkpointing_changes_no_bit(kwargs, layerwise):
    def train(checkpointing: bool) -> tuple[list[float], dict[str, Tensor]]:
        engine = make_engine(
            make_config(optim={"layerwise": layerwise}), model_config=llama_config(num_hidden_layers=2)
        )
        if checkpointing:
            engine.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        return run(engine, 4), snapshot(engine)

    (losses, expected), (checkpointed_losses, actual) = train(False), train(True)
    assert checkpointed_losses == losses
    assert equal(actual, expected) == []


# ---------------------------------------------------------------- mistakes of ALGORITHM.md


@pytest.mark.parametrize("layerwise", [False, True])
def test_evaluation_anywhere_changes_nothing(layerwise):
    """Mistake 1: an evaluation on a re-initialization step must neither merge nor tap."""

    def train(evaluate: Callable[[SingleEngine], None]) -> tuple[list[float], dict[str, Tensor]]:
        num = 1 if layerwise else 2
        engine = make_engine(make_config(optim={"layerwise": layerwise}, train={"gradient_accumulation_steps": num}))
        losses = []
        for step in range(4):
            evaluate(engine)
            for part in token_batch(step).chunk(num):
                loss = lm_loss(engine, part)
                evaluate(engine)
                engine.backward(loss)
                evaluate(engine)
                engine.step()
                losses.append(loss.item())
            evaluate(engine)
        return losses, snapshot(engine)

    def evaluate(engine: SingleEngine) -> None:
        engine.network.eval()
        with torch.no_grad():
            lm_loss(engine, token_batch(77))
            engine.network.generate(token_batch(78)[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)
        engine.network.train()

    quiet, disturbed = train(lambda _: None), train(evaluate)
    assert disturbed[0] == quiet[0]
    assert equal(disturbed[1], quiet[1]) == []


def zero_gradient_step(engine: SingleEngine) -> None:
    engine.backward(lm_loss(engine, token_batch(50)) * 0.0)
    engine.step()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_after_a_reset_a_zero_gradient_moves_no_factor(name, dtype):
    """Mistake 3. With `keep`, momentum moves it, on purpose."""
    for state in ("reset", "keep"):
        config = make_config(
            loqt={"optimizer_state": state, "interval": 3}, optim={"name": name, "lr": 0.05}, train={"dtype": dtype}
        )
        engine = make_engine(
            config, model_config=llama_config(hidden_size=64, intermediate_size=600, num_key_value_heads=4)
        )
        run(engine, 4)  # re-initializations at 0 and 3
        before = {key: value.clone() for key, value in factors(engine).items()}
        zero_gradient_step(engine)
        moved = [key for key, value in factors(engine).items() if not torch.equal(value, before[key])]
        assert moved == ([] if state == "reset" else list(before))
        shapes = {tuple(layer.B.shape) for layer in engine.controller.layers.values()}
        assert max(a * b for a, b in shapes) >= 4096 > min(a * b for a, b in shapes)  # states in 8 and in 32 bits


@pytest.mark.parametrize("state", ["keep", "reset", "project", "transport"])
def test_biases_stay_in_the_optimizer(state):
    """Mistake 5."""
    config = make_config(loqt={"optimizer_state": state})
    engine = make_engine(config, model_config=llama_config(attention_bias=True, mlp_bias=True))
    for step in range(6):
        before = {n: p.detach().clone() for n, p in engine.network.named_parameters()}
        train_step(engine, token_batch(step))
        # A bias before a softmax over keys has no gradient: k_proj's is zero up to rounding, and still moves by Adam.
        still = [n for n, p in engine.network.named_parameters() if torch.equal(p, before[n])]
        assert [n for n in still if not n.endswith(".B")] == []
        if step:  # B exists only after the first initialization
            assert still == []
    assert sum(n.endswith("bias") for n in before) == 7


def test_frozen_embeddings_still_give_every_layer_its_gradient():
    """Mistake 4."""
    config = make_config(loqt={"subspace": "exact", "quantize_p": "none"})
    for layerwise in (False, True):
        config.optim.layerwise = layerwise
        model, source = build_model(llama_config(), config.loqt, initializer(0))
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].input_layernorm.requires_grad_(False)
        engine = SingleEngine(model, config, original=source.weight)
        for step in range(3):
            ids = token_batch(step)
            gradients = dense_gradients(engine, ids)
            _, report = train_step(engine, ids)
            if report.reinit:
                for r in report.reinit.layers:
                    layer = engine.controller.layers[r.name]
                    assert r.kept is None and r.captured_energy > 0.3
                    assert relative(projector(layer), top_projector(gradients[f"{r.name}.weight"], layer)) < 0.02


def test_layerwise_with_clipping_by_the_norm_of_all_gradients_is_refused():
    """Mistake 8."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.shape=llama_9m", "optim.layerwise=true", "train.max_grad_norm=1.0"])
    for name in ("optim.layerwise", "train.max_grad_norm=1.0", "train.max_grad_norm_per_parameter=1.0"):
        assert name in str(caught.value)


# ---------------------------------------------------------------- gradients that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_that_is_not_finite_is_skipped_and_its_reinitialization_made_up_for(bad, optimizer, dtype, at):
    engine = make_engine(make_config(optim={"name": optimizer}, train={"dtype": dtype}))
    run(engine, at)
    before = snapshot(engine)
    engine.backward(lm_loss(engine, token_batch(at)) * bad)
    report = engine.step()
    assert not report.applied and report.reinit is None and not math.isfinite(report.grad_norm)
    assert report.step == at and engine.step_index == at + 1
    assert equal(snapshot(engine), before) == []
    assert all(p.grad is None for p in engine.network.parameters())
    _, report = train_step(engine, token_batch(at + 1))
    assert report.applied and report.reinit.summary()["num_layers"] == 7
    _, report = train_step(engine, token_batch(at + 3))
    assert report.reinit is not None  # step at + 2, as scheduled


def test_one_bad_micro_batch_spoils_its_step_only():
    engine = make_engine(make_config(train={"gradient_accumulation_steps": 4}))
    run(engine, 1)
    before = snapshot(engine)
    for index, part in enumerate(token_batch(1).chunk(4)):
        loss = lm_loss(engine, part)
        engine.backward(loss * math.nan if index == 1 else loss)
        report = engine.step()
    assert not report.applied and equal(snapshot(engine), before) == []
    assert all(math.isfinite(loss) for loss in run(engine, 3))


@pytest.mark.parametrize("at", [0, 2, 3])
def test_layerwise_skips_what_is_not_finite(at):
    engine = make_engine(make_config(optim={"layerwise": True}))
    run(engine, at)
    before = snapshot(engine)
    engine.backward(lm_loss(engine, token_batch(at)) * math.nan)
    report = engine.step()
    assert not report.applied and report.reinit is None and not math.isfinite(report.grad_norm)
    assert equal(snapshot(engine), before) == []
    _, report = train_step(engine, token_batch(at + 1))
    assert report.applied and report.reinit is not None  # due, or overdue
    assert math.isfinite(run(engine, 1)[0])


@pytest.mark.parametrize("at", [0, 2])
def test_layerwise_skips_only_the_parameters_whose_gradient_is_not_finite(at):
    engine = make_engine(make_config(optim={"layerwise": True}), model_config=llama_config(num_hidden_layers=2))
    run(engine, at)
    before = snapshot(engine)
    # NaN enters between the blocks: what lies behind it (in the order of the backward) is spoilt.
    handle = engine.network.model.layers[0].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda g: g * math.nan) and None
    )
    loss = lm_loss(engine, token_batch(at))
    handle.remove()
    engine.backward(loss)
    report = engine.step()
    assert not report.applied
    changed = {name.removeprefix("model/") for name in equal(before, snapshot(engine)) if name.startswith("model/")}
    assert any(".layers.1." in name for name in changed) and "lm_head.weight" in changed
    assert "model.embed_tokens.weight" not in changed
    kept = {r.name: r.kept for r in report.reinit.layers}
    for name, reason in kept.items():
        if ".layers.1." in name:
            assert reason is None
        elif at:
            assert "not finite" in reason and not any(c.startswith(name) for c in changed)
    assert all(torch.isfinite(p).all() for p in engine.network.parameters())
    assert all(math.isfinite(loss) for loss in run(engine, 3))


def test_a_layer_without_gradient_keeps_its_p():
    """The last block's attention output is cut off: its layers see a zero gradient or none."""
    engine = make_engine(make_config())
    run(engine, 2)
    before = snapshot(engine)
    mlp = engine.network.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: output * 0.0)
    _, report = train_step(engine, token_batch(2))
    handle.remove()
    kept = {r.name.rpartition(".")[2]: r.kept for r in report.reinit.layers}
    assert all("zero" in kept[name] for name in ("gate_proj", "up_proj", "down_proj"))
    assert all(kept[name] is None for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    after = snapshot(engine)
    for name in ("gate_proj", "up_proj", "down_proj"):
        for key in ("w_codes", "w_absmax", "p_codes", "p_absmax"):
            full = f"model/model.layers.0.mlp.{name}.{key}"
            assert torch.equal(before[full], after[full])


# ---------------------------------------------------------------- re-initialization


@pytest.mark.parametrize("layerwise", [False, True])
def test_without_quantization_a_reinitialization_leaves_the_function_alone(layerwise, tmp_path):
    """Mistakes aside, W_q + s B Pᵀ before and after are the same matrix, up to float32."""
    config = make_config(
        loqt={"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0},
        optim={"lr": 0.05, "layerwise": layerwise},
    )
    engine = make_engine(config)
    run(engine, 2)
    never = copy.deepcopy(config)
    never.loqt.interval = 1000
    twin = restore(make_engine(never), save(engine, tmp_path))
    before = {name: layer.basis_hat().clone() for name, layer in engine.controller.layers.items()}
    _, with_reinit = train_step(engine, token_batch(2))
    _, without = train_step(twin, token_batch(2))
    assert with_reinit.reinit is not None and without.reinit is None
    ids = token_batch(9)[:, :-1]
    with torch.no_grad():
        assert relative(engine.network(input_ids=ids).logits, twin.network(input_ids=ids).logits) < 1e-5
    for name, layer in engine.controller.layers.items():
        assert not layer.B.any() and twin.controller.layers[name].B.any()
        assert relative(layer.basis_hat(), before[name]) > 0.1


def test_a_reinitialization_costs_no_random_number():
    engine = make_engine(make_config(loqt={"subspace": "sketch"}))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run(engine, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_never_trains_an_adapter():
    engine = make_engine(make_config(loqt={"schedule": "never"}))
    run(engine, 1)
    before = snapshot(engine)
    run(engine, 8)
    after = snapshot(engine)
    frozen = [n for n in before if n.startswith("model/") and n.rpartition(".")[2].startswith(("w_", "p_"))]
    assert len(frozen) == 28 and all(torch.equal(before[n], after[n]) for n in frozen)
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("_proj.B") and n.startswith("model/"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("state", ["keep", "reset", "project"])
def test_training_learns_through_reinitializations(dtype, state):
    """One batch again and again, nothing but B trained: the adapters are alive after every re-initialization."""
    config = make_config(
        loqt={"interval": 10, "optimizer_state": state},
        optim={"name": "adamw8bit", "lr": 0.01, "lr_full_rank": 1e-9, "schedule": "constant"},
        train={"dtype": dtype, "max_steps": 60},
    )
    engine = make_engine(config)
    losses = [train_step(engine, token_batch(0))[0] for _ in range(41)]
    assert losses[40] < losses[20] - 0.1 < losses[2] - 0.3


def test_factors_are_those_of_the_masters():
    engine = make_engine(make_config(train={"dtype": "bf16"}))
    run(engine, 4)
    for name, factor in factors(engine).items():
        layer = engine.controller.layers[name]
        assert factor.dtype == torch.float32 and factor.shape == (layer.factor_length, layer.rank)
        assert torch.equal(factor.to(torch.bfloat16), layer.canonical(layer.B.detach()))
        assert not torch.equal(factor, layer.factor())
