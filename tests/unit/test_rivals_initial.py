"""tools/rivals_initial.py: LQ-LoRA's and ApiQ's initializations, against their papers' formulas in float64; and what
goes on from a checkpoint, with adapters alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from small_rivals import (
    ADAPTERS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    batch_of,
    rivals_fixture,  # noqa: F401
    shape_fixture,  # noqa: F401
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

RANK = 4


@pytest.fixture(scope="module", name="initial")
def initial_fixture(rivals: Any) -> Any:
    """The module, of the same import as `rivals`; ApiQ in fewer epochs, to take less time."""
    module = importlib.import_module("rivals_initial")
    module.EPOCHS = 4
    return module


@pytest.fixture(scope="module", name="start")
def start_fixture(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are large enough for rounding them to be felt."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig.from_json_file(shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 4.0)
    folder = tmp_path_factory.mktemp("start")
    model.save_pretrained(folder)
    return folder


def setup_of(rivals: Any, start: Path, shape: str, **options: Any) -> Any:
    calibration = tuple(batch_of(seed) for seed in (50, 51))
    return rivals.Setup(shape, rows=3, length=17, start=str(start), calibration=calibration, **options)


def nf4(weight: Tensor) -> Tensor:
    """bitsandbytes' own rounding, of one long row."""
    import bitsandbytes.functional as F

    codes, state = F.quantize_4bit(weight.float().reshape(1, -1), blocksize=64, quant_type="nf4")
    return F.dequantize_4bit(codes, state).view_as(weight)


# ---------------------------------------------------------------- LQ-LoRA


@pytest.mark.parametrize("shape_of_matrix", [(33, 70), (70, 33), (20, 20)])
def test_the_weighted_svd_is_the_best_there_is(initial: Any, shape_of_matrix: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(sum(shape_of_matrix))
    matrix = torch.randn(shape_of_matrix, generator=draw)
    rows = torch.rand(shape_of_matrix[0], generator=draw) + 0.05
    columns = torch.rand(shape_of_matrix[1], generator=draw) ** 3 + 0.05
    left, right = initial.weighted_svd(matrix, initial.Importance(rows, columns), 5)
    assert left.shape == (shape_of_matrix[0], 5) and right.shape == (5, shape_of_matrix[1])
    scale = rows.double().sqrt()[:, None] * columns.double().sqrt()
    rest = scale * (matrix.double() - left.double() @ right.double())
    # Eckart and Young: what is left are the other singular values
    others = torch.linalg.svdvals(scale * matrix.double())[5:]
    assert float(rest.norm()) == pytest.approx(float(others.norm()), rel=1e-5)
    # ... and it is not the best of the unweighted error
    u, sizes, v = torch.linalg.svd(matrix.double())
    plain = u[:, :5] * sizes[:5] @ v[:5]
    assert float((scale * (matrix - plain)).norm()) > float(rest.norm()) * 1.02


def test_the_alternation_is_algorithm_1(initial: Any) -> None:
    draw = torch.Generator().manual_seed(7)
    weight = torch.randn(48, 64, generator=draw)
    rows, columns = torch.rand(48, generator=draw) + 0.1, torch.rand(64, generator=draw) + 0.1
    shown, a, b = initial.alternate(weight, initial.Importance(rows, columns), RANK)
    scale = rows.double().sqrt()[:, None] * columns.double().sqrt()
    errors, expected, quantized = [], [], torch.zeros_like(weight)
    while len(errors) < 2 or errors[-1] < errors[-2]:
        u, sizes, v = torch.linalg.svd(scale * (weight.double() - quantized.double()), full_matrices=False)
        product = (u[:, :RANK] * sizes[:RANK] @ v[:RANK] / scale).float()
        quantized = nf4(weight - product)
        errors.append(float((scale * (weight.double() - quantized - product)).norm()))
        expected.append((quantized, product))
    kept = errors.index(min(errors))
    assert kept == len(errors) - 2 > 0, "it ends when the error rises, after some steps"
    found = float((scale * (weight.double() - shown - b.double() @ a.double())).norm())
    assert found == pytest.approx(errors[kept], rel=1e-3)
    assert float((b @ a - expected[kept][1]).norm() / expected[kept][1].norm()) < 0.05
    assert torch.equal(nf4(shown), shown), "what is rounded again is the same"
    assert found < float((scale * (weight - nf4(weight))).norm())


def test_fisher_information_is_of_single_rows(rivals: Any, initial: Any, start: Path, shape: str) -> None:
    setup = setup_of(rivals, start, shape)
    model = rivals.dense_model(setup)
    initial.head.install(model)
    found = initial.fisher(model, initial.linears_of(model), setup)
    stock = LlamaForCausalLM.from_pretrained(start)
    path = "model.layers.1.mlp.down_proj"
    weight = stock.get_submodule(path).weight
    squares = torch.zeros_like(weight, dtype=torch.float64)
    for batch in setup.calibration:
        for ids, targets in zip(batch["input_ids"], batch["targets"], strict=True):
            loss = nn.functional.cross_entropy(stock(input_ids=ids[None]).logits[0], targets)
            squares += torch.autograd.grad(loss, weight)[0].double() ** 2
    rows, columns = squares.mean(1), squares.mean(0)
    assert torch.allclose(found[path].rows.double(), rows / rows.mean() + 1e-3, rtol=1e-3)
    assert torch.allclose(found[path].columns.double(), columns / columns.mean() + 1e-3, rtol=1e-3)


# ---------------------------------------------------------------- ApiQ


@pytest.mark.parametrize("shape_of_matrix", [(33, 70), (48, 64)])
def test_unclipped_it_is_nf4(initial: Any, shape_of_matrix: tuple[int, int]) -> None:
    weight = torch.randn(shape_of_matrix, generator=torch.Generator().manual_seed(1))
    clipped = initial.Clipped.of(weight)
    clipped.theta = torch.full_like(clipped.theta, 40.0)
    assert torch.allclose(clipped.values(), nf4(weight), atol=1e-6)


def test_clipped_values_are_codes_and_scales(initial: Any) -> None:
    """Rounded again, as bitsandbytes does when they are stored, they are the same; the scale's gradient is that of the
    clipped part and of the rounding."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    clipped = initial.Clipped.of(weight)
    theta = torch.randn(clipped.theta.shape, generator=torch.Generator().manual_seed(3)) + 1.0
    clipped.theta = theta.requires_grad_()
    values = clipped.values()
    assert torch.allclose(nf4(values.detach()), values, atol=1e-6)
    along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    (values * along).sum().backward()
    blocks, ways = weight.double().view(-1, 64), along.double().view(-1, 64)
    part, most = theta.detach().double().sigmoid(), blocks.abs().amax(1, keepdim=True)
    fractions = blocks / (part * most)
    rounded = values.detach().double().view(-1, 64) / (part * most)
    # d(s r)/ds, the rounding passed on: r where clipped, r - f elsewhere
    slope = torch.where(fractions.abs() > 1, rounded, rounded - fractions)
    expected = (ways * slope).sum(1, keepdim=True) * most * part * (1 - part)
    assert torch.allclose(clipped.theta.grad.double(), expected, rtol=1e-3, atol=1e-4)


def test_calibration_makes_up_for_errors_before_it(initial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that come too small are what A and B can do most about; of the same inputs, the error is smaller than
    that of rounding alone."""
    monkeypatch.setattr(initial, "EPOCHS", 20)
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(40, 64, generator=draw) * 0.2
    mix = torch.randn(RANK, 64, generator=draw)
    inputs = [torch.randn(30, RANK, generator=draw) @ mix + 0.1 * torch.randn(30, 64, generator=draw) for _ in range(8)]
    for factor in (1.0, 0.9):
        torch.manual_seed(0)
        seen = [x * factor for x in inputs]
        shown, a, b = initial.calibrate(weight, inputs, seen, RANK)

        def error(matrix: Tensor, seen: list[Tensor] = seen) -> float:
            pairs = zip(seen, inputs, strict=True)
            return sum(float((x @ matrix.t() - y @ weight.t()).double().square().sum()) for x, y in pairs)

        assert error(shown + b @ a) < 0.7 * error(nf4(weight))
        assert torch.allclose(nf4(shown), shown, atol=1e-6)


# ---------------------------------------------------------------- all that goes on from a checkpoint


def test_all_start_from_the_checkpoint_and_train_adapters_alone(
    rivals: Any, initial: Any, start: Path, shape: str
) -> None:
    pytest.importorskip("peft", reason="the compare extra is not installed")
    stock, batch = LlamaForCausalLM.from_pretrained(start), batch_of(9)
    logits = stock(input_ids=batch["input_ids"]).logits.flatten(0, 1)
    dense = nn.functional.cross_entropy(logits, batch["targets"].flatten()).item()
    once = f"loqt:{RANK}+loqt.schedule=never"
    names = (f"lora:{RANK}", f"qlora:{RANK}", f"loftq:{RANK}", f"lqlora:{RANK}", f"apiq:{RANK}", once)
    losses = {}
    for name in names:
        setup = setup_of(rivals, start, shape, lr=1e-2, full_rank=False, interval=40)
        contender = rivals.build(name, setup)
        frozen = {path: p.detach().clone() for path, p in contender.model.named_parameters() if "lora_" not in path}
        losses[name] = [contender.step(batch).loss for _ in range(5)]
        for path, before in frozen.items():
            if not path.endswith(".B"):
                assert torch.equal(contender.model.get_parameter(path), before), (name, path)
        of_larger_sides = LAYERS * (4 * HIDDEN + 3 * INTERMEDIATE)
        assert contender.num_trained() == RANK * (of_larger_sides if name == once else ADAPTERS)
        # LoQT's first step finds P and B, and trains nothing
        assert losses[name][-1] < losses[name][name == once] - 0.02, name
    assert losses[f"lora:{RANK}"][0] == pytest.approx(dense, abs=1e-4)
    assert abs(losses[f"qlora:{RANK}"][0] - dense) > 1e-3, "rounding is felt"


@pytest.mark.parametrize("name", ["lqlora", "apiq"])
def test_the_adapters_are_what_was_found(rivals: Any, initial: Any, start: Path, shape: str, name: str) -> None:
    pytest.importorskip("peft", reason="the compare extra is not installed")
    setup = setup_of(rivals, start, shape)
    contender = rivals.build(f"{name}:{RANK}", setup)
    stock = LlamaForCausalLM.from_pretrained(start)
    layer = contender.model.get_submodule("model.layers.0.mlp.up_proj")
    weight = stock.get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    a, b = (getattr(layer, f"lora_{factor}")["default"].weight.detach() for factor in "AB")
    x = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(1))
    found, shown = layer(x).detach(), layer.base_layer(x).detach()
    assert torch.allclose(found, shown + x @ a.t() @ b.t(), atol=1e-4), "no scale beside them"
    if name == "lqlora":
        assert float((found - x @ weight.t()).norm()) < float((x @ (nf4(weight) - weight).t()).norm())
    state = contender.state()
    taken = contender.step(batch_of(1)).loss
    other = rivals.build(f"{name}:{RANK}", setup)
    other.restore(state)
    assert other.step(batch_of(1)).loss == taken


def test_data_is_asked_for(rivals: Any, start: Path, shape: str) -> None:
    pytest.importorskip("peft", reason="the compare extra is not installed")
    setup = rivals.Setup(shape, rows=3, length=17, start=str(start))
    with pytest.raises(ValueError, match="calibration"):
        rivals.build(f"apiq:{RANK}", setup)
    with pytest.raises(ValueError, match="num_layers"):
        rivals.Setup(shape, start=str(start), num_layers=1)
