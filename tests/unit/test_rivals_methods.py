"""tools/rivals_projected.py and rivals_adapters.py: each rival does what its paper says, against references of ours."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_rivals import HIDDEN, LAYERS, batch_of, build, rivals_fixture, shape_fixture, write_shape  # noqa: F401
from torch import Tensor, nn

from loqt_ds.core.quantization import QuantSpec, dequantize, quantize
from loqt_ds.evaluation import evaluate

RANK = 8


def linears(rivals: Any, setup: Any) -> dict[str, nn.Linear]:
    """Of the dense model, by path."""
    found = dict(rivals.dense_model(setup).named_modules())
    return {path: module for path, module in found.items() if type(module) is nn.Linear and "lm_head" not in path}


def dense_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean loss, by stock code."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).backward()
    return {path: parameter.grad for path, parameter in model.named_parameters() if parameter.grad is not None}


def quantized(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(what groups of 256 show with codes of 0 to 2^bits - 1, the step of each): asymmetric, by the extremes."""
    groups = values.reshape(-1, 256).astype(np.float64)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = np.maximum(high - low, 1e-5) / (2**bits - 1)
    zero = np.clip(-np.round(low / step), 0, 2**bits - 1)
    codes = np.clip(np.round(groups / step) + zero, 0, 2**bits - 1)
    return ((codes - zero) * step).reshape(values.shape), np.broadcast_to(step, groups.shape).reshape(values.shape)


def before_update(contender: Any, look: Callable[[], Any]) -> list[Any]:
    """What `look` sees after each backward, before the optimizer changes it."""
    seen, update = [], contender.update

    def spy() -> Any:
        seen.append(look())
        return update()

    contender.update = spy
    return seen


# ---------------------------------------------------------------- Q-GaLore


def test_a_step_of_qgalore(rivals: Any, shape: str) -> None:
    """W - lr s P Adam(P^T G), with P in INT4, on weights in INT8 that are rounded without bias."""
    contender = build(rivals, "qgalore:8", shape, lr=0.05)
    layers = {path: contender.model.get_submodule(path) for path in linears(rivals, contender.setup)}
    dense = rivals.dense_model(contender.setup)
    start = {}
    for path, layer in layers.items():
        shown, _ = quantized(dense.get_submodule(path).weight.detach().numpy(), 8)
        np.testing.assert_allclose(layer.dequantized(torch.float32).numpy(), shown, atol=2e-7)
        dense.get_submodule(path).weight.data.copy_(torch.from_numpy(shown))
        start[path] = shown
    seen = before_update(contender, lambda: {path: layer.weight.float_grad.clone() for path, layer in layers.items()})
    batch = batch_of(3)
    contender.step(batch)
    expected, errors = dense_gradients(dense, batch), []
    for path, layer in layers.items():
        gradient = seen[0][path]
        torch.testing.assert_close(gradient, expected[f"{path}.weight"], rtol=1e-4, atol=1e-6)
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        is_tall = gradient.shape[0] >= gradient.shape[1]
        basis, _ = quantized((vh[:RANK] if is_tall else u[:, :RANK]).numpy(), 4)
        low = gradient.numpy() @ basis.T if is_tall else basis.T @ gradient.numpy()
        first = low / (np.abs(low) + 1e-8)  # of Adam, in its first step
        target = start[path] - 0.05 * 0.25 * (first @ basis if is_tall else basis @ first)
        _, step = quantized(target, 8)
        errors.append(((layer.dequantized(torch.float32).numpy() - target) / step).ravel())
        assert np.abs(errors[-1]).max() < 1.6, "a code beside the exact one; the ends of a group are clipped"
        assert np.abs(target - start[path]).max() > 10 * step.max(), "the update is seen"
    together = np.concatenate(errors)
    assert abs(together.mean()) < 0.01 and np.abs(together).max() > 0.6, "rounded up or down by chance"


def test_qgalore_waits_longer_where_its_projection_stays(rivals: Any, shape: str) -> None:
    contender = build(rivals, "qgalore:8", shape, lr=1e-12, interval=2)
    taken = [contender.step(batch_of(0)) for _ in range(13)]
    assert [number for number, step in enumerate(taken) if step.inside is not None] == [0, 2, 4, 6, 8, 10, 12]
    projectors = [projector for _, projector in contender._projectors()]
    assert len(projectors) == 7 * LAYERS and all(np.abs(p.queue) == pytest.approx(1.0, abs=0.01) for p in projectors)
    alike = [projector.update_proj_gap for projector in projectors if min(projector.queue) > 0]  # no sign has changed
    assert len(alike) > LAYERS and set(alike) == {8}, "five alike in the sixth, and again in the seventh"
    changing = build(rivals, "qgalore:8", shape, lr=1e-2, interval=1)
    for number in range(4):
        changing.step(batch_of(number))
    assert {projector.update_proj_gap for _, projector in changing._projectors()} == {1}


def test_qgalore_refuses_what_its_groups_do_not_divide(rivals: Any, tmp_path: Path) -> None:
    pytest.importorskip("q_galore_torch", reason="the compare extra is not installed")
    shape = write_shape(tmp_path, hidden_size=36, intermediate_size=36, head_dim=10)
    with pytest.raises(ValueError, match="of matrices of 108 numbers only groups of 4 do"):
        build(rivals, "qgalore:3", shape)
    projected = importlib.import_module("rivals_projected")
    assert projected.group_size(96 * 7, 64 * 5) == 32 and projected.group_size(1024, 4096) == 256


# ---------------------------------------------------------------- APOLLO


@pytest.mark.parametrize(("name", "alpha"), [("apollomini", math.sqrt(128)), ("apollo:8", 1.0)])
def test_a_step_of_apollo(rivals: Any, shape: str, name: str, alpha: float) -> None:
    """W - lr alpha G S, where S is the ratio of norms that Adam has made in the projection: of channels, or of all."""
    contender = build(rivals, name, shape, lr=0.03)
    layers = {path: contender.model.get_submodule(path) for path in linears(rivals, contender.setup)}
    start = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    seen = before_update(contender, lambda: {path: layer.weight.grad.clone() for path, layer in layers.items()})
    contender.step(batch_of(1))
    for path, layer in layers.items():
        gradient, low = seen[0][path], contender.optimizer.state[layer.weight]["exp_avg"] / 0.1
        assert min(low.shape) == (1 if name == "apollomini" else RANK)
        adapted = 0.1 * low / (math.sqrt(0.001) * low.abs() + 1e-6) * math.sqrt(0.001) / 0.1
        dims = (0, 1) if name == "apollomini" else (int(gradient.shape[0] >= gradient.shape[1]),)
        ratio = adapted.square().sum(dims, keepdim=True).sqrt() / low.square().sum(dims, keepdim=True).sqrt()
        expected = start[path] - 0.03 * alpha * gradient * ratio
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-3, atol=2e-6)


# ---------------------------------------------------------------- adapters


def product(layer: Any) -> Tensor:
    """B A of PEFT's layer."""
    return layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()


def test_lora_is_frozen_weights_and_adapters(rivals: Any, shape: str) -> None:
    contender = build(rivals, "lora:8", shape, lr=1e-2)
    for number in range(3):
        contender.step(batch_of(number))
    for path, linear in linears(rivals, contender.setup).items():
        layer = contender.model.get_submodule(path)
        assert torch.equal(layer.base_layer.weight, linear.weight), "W is frozen"
        x = torch.randn(5, linear.in_features)
        expected = x @ (linear.weight + 32 / RANK * product(layer)).t()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert product(layer).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loftq_alternates(rivals: Any, shape: str, dtype: str) -> None:
    """Five times W = NF4(W0 - B A), and B A the best of its rank to W0 - W."""
    import bitsandbytes

    contender = build(rivals, "loftq:8", shape, dtype=dtype)
    for path, linear in linears(rivals, contender.setup).items():
        original = linear.weight.detach().float()
        low = torch.zeros_like(original)
        errors = []
        for _ in range(5):
            spec = QuantSpec("nf4")
            shown = dequantize(quantize(original - low, spec), original.shape, spec)
            u, s, vt = np.linalg.svd((original - shown).double().numpy(), full_matrices=False)
            low = torch.from_numpy((u[:, :RANK] * s[:RANK]) @ vt[:RANK]).float()
            errors.append((original - shown - low).norm().item())
        layer = contender.model.get_submodule(path)
        weight = layer.base_layer.weight
        assert weight.dtype == torch.uint8
        frozen = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        precision = 1e-5 if dtype == "fp32" else 0.01
        assert (frozen - shown).norm() < precision * shown.norm()
        assert (product(layer).float() - low).norm() < precision * low.norm()
        assert layer.scaling["default"] == 1.0, "the sum is the one that was fitted"
        assert errors[-1] < 0.97 * errors[0], "further steps help"
        nearest = dequantize(quantize(original, spec), original.shape, spec)
        assert (original - frozen - product(layer).float()).norm() < 0.9 * (original - nearest).norm()


@pytest.mark.parametrize("name", ["qlora:8", "loftq:8"])
def test_an_evaluation_changes_no_training(rivals: Any, shape: str, name: str) -> None:
    """bitsandbytes repacks frozen codes in an evaluation, where the CPU has AVX512-BF16."""
    one, other = (build(rivals, name, shape, lr=1e-2) for _ in range(2))
    for number in range(3):
        evaluate(other.model, [batch_of(9)], torch.device("cpu"))
        assert one.step(batch_of(number)).loss == other.step(batch_of(number)).loss


def test_relora_merges_and_starts_anew(rivals: Any, shape: str) -> None:
    contender = build(rivals, "relora:8", shape, lr=1e-2, interval=20, max_steps=1000)
    layers = {path: contender.model.get_submodule(path) for path in linears(rivals, contender.setup)}
    start = {path: layer.base_layer.weight.clone() for path, layer in layers.items()}

    def look() -> dict[str, Any]:
        moments = {
            (path, factor): [contender.optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq")]
            for path, layer in layers.items()
            for factor in ("lora_A", "lora_B")
            if contender.optimizer.state[weight := getattr(layer, factor)["default"].weight]
        }
        shown = {path: layer.base_layer.weight + 32 / RANK * product(layer) for path, layer in layers.items()}
        a, b = (
            {path: getattr(layer, name)["default"].weight.clone() for path, layer in layers.items()}
            for name in ("lora_A", "lora_B")
        )
        return {"moments": moments, "shown": shown, "A": a, "B": b}

    seen = before_update(contender, look)
    rates, insides = [], []
    for number in range(41):
        if number == 20:
            last = look()
        taken = contender.step(batch_of(number))
        rates.append([group["lr"] for group in contender.optimizer.param_groups])
        insides.append(taken.inside is not None)
    assert [number for number, is_in in enumerate(insides) if is_in] == [20, 40]
    for path in layers:
        torch.testing.assert_close(seen[20]["shown"][path], last["shown"][path], rtol=1e-4, atol=1e-6)
        assert (seen[20]["A"][path] - last["A"][path]).abs().max() > 0.01, "drawn anew"
        assert last["B"][path].abs().max() > 0.01 and not seen[20]["B"][path].any()
        change = (layers[path].base_layer.weight - start[path]).double()
        values = torch.linalg.svdvals(change)
        assert values[2 * RANK - 1] > 1e-5 * values[0] > 10 * values[2 * RANK], "two merges of rank 8"
    for key, before in last["moments"].items():
        size = before[0].numel()
        kept = np.argsort(-before[0].abs().flatten().numpy())[: round(0.01 * size)]
        for old, new in zip(before, seen[20]["moments"][key], strict=True):
            expected = np.zeros(size, np.float32)
            expected[kept] = old.flatten().numpy()[kept]
            np.testing.assert_array_equal(new.flatten().numpy(), expected)
    head = contender.optimizer.state[contender.model.lm_head.weight]
    assert int(head["step"]) == 41 and (head["exp_avg"] != 0).float().mean() > 0.9, "others keep theirs"
    rising = [rates[20 + number][0] for number in range(4)]
    assert rising == pytest.approx([1e-2 * (21 + n) / 100 * part for n, part in enumerate((1 / 3, 2 / 3, 1, 1))])
    assert all(one == pytest.approx(other) for one, other in rates), "the rates of all rise again"


def test_relora_can_start_in_full_rank(rivals: Any, shape: str) -> None:
    options = {"lr": 2e-2, "lr_full_rank": 3e-3, "interval": 4, "max_steps": 50}
    contender = build(rivals, "relora:8+start=3", shape, **options)
    full = build(rivals, "adamw", shape, **options)
    for number in range(3):
        assert contender.step(batch_of(number)).loss == full.step(batch_of(number)).loss
    moment = full.optimizer.state[full.model.lm_head.weight]["exp_avg"].clone()
    assert contender.num_trained() == full.num_trained()
    gradients = before_update(contender, lambda: contender.model.lm_head.weight.grad.clone())
    taken = contender.step(batch_of(3))
    assert taken.loss == pytest.approx(full.step(batch_of(3)).loss, abs=1e-5), "adapters begin as nothing"
    assert taken.inside is not None and contender.num_trained() < full.num_trained()
    head = contender.model.lm_head.weight
    torch.testing.assert_close(contender.optimizer.state[head]["exp_avg"], 0.9 * moment + 0.1 * gradients[0])
    assert int(contender.optimizer.state[head]["step"]) == 4, "what is trained in full goes on"
    merged = [contender.step(batch_of(number)).inside is not None for number in range(4, 12)]
    assert merged == [False, False, False, True, False, False, False, True], "four steps after the adapters, and on"
    path = "model.layers.0.self_attn.q_proj"
    assert contender.model.get_submodule(path).base_layer.weight.requires_grad is False
    assert contender.model.get_submodule(path).lora_A["default"].weight.shape == (RANK, HIDDEN)
