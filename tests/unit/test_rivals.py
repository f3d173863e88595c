"""tools/rivals.py: every contender trains as it says, and counts what it holds."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from small_rivals import (
    ADAPTERS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    MATRICES,
    OTHERS,
    PACKAGES,
    VOCABULARY,
    batch_of,
    build,
    rivals_fixture,  # noqa: F401
    shape_fixture,  # noqa: F401
)
from torch import Tensor, nn

from loqt_ds.evaluation import evaluate

OURS = ("loqt:8", "loqt8bit:8", "loqtnq:8", "loqtcard:8")
PROJECTED = ("galore:8", "qgalore:8", "apollo:8", "apollomini")
ADAPTED = ("lora:8", "qlora:8", "loftq:8", "relora:8")


def test_full_rank_is_stock_training(rivals: Any, shape: str) -> None:
    contender = build(rivals, "adamw", shape, lr=1e-3)
    stock = rivals.dense_model(contender.setup).train()
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-3, weight_decay=0.0)
    for number in range(4):
        batch = batch_of(number)
        logits = stock(input_ids=batch["input_ids"], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert contender.step(batch).loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "fp32") for name in ("adamw", "adamw8bit", *PROJECTED, *ADAPTED, *OURS)),
        *((name, "bf16") for name in ("adamw", "galore:8", "qgalore:8", "qlora:8", "loqtcard:8")),
    ],
)
def test_all_learn_the_same_batch(rivals: Any, shape: str, name: str, dtype: str) -> None:
    contender = build(rivals, name, shape, dtype=dtype, lr=3e-3)
    batch = batch_of(0)
    embedding = contender.model.get_input_embeddings().weight.detach().clone()
    taken = [contender.step(batch, refresh=number == 3) for number in range(8)]
    assert taken[0].loss == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=0.3)
    assert taken[-1].loss < taken[0].loss - 0.3
    assert all(set(step.seconds) == {"forward", "backward", "update"} and step.total > 0 for step in taken)
    assert not torch.equal(contender.model.get_input_embeddings().weight, embedding), "embeddings are trained by all"
    found, e = contender.num_bytes(), 4 if dtype == "fp32" else 2
    if name == "adamw":
        assert found["weights"] == pytest.approx(e * (MATRICES + OTHERS), rel=0.001)
        assert taken[-1].gradients == e * (MATRICES + OTHERS)
        assert found["states"] == pytest.approx(2 * e * (MATRICES + OTHERS), rel=0.01)
    elif name == "galore:8":  # an eighth of the moments, and the projections
        projections = 8 * HIDDEN * 7 * LAYERS
        assert found["states"] == e * (2 * (MATRICES * 8 // HIDDEN + OTHERS) + projections)
    elif name in ("qlora:8", "loftq:8", "loqt:8"):
        assert found["weights"] < e * (MATRICES / 2 + 2 * OTHERS)
        assert taken[-1].gradients < e * (MATRICES / 2 + OTHERS)
    elif name == "loqtcard:8":
        assert taken[-1].gradients == 0, "updated and freed inside the backward"
    if name == "qgalore:8":  # a byte for each weight, and a scale and a zero point for each 256
        assert found["weights"] == pytest.approx(MATRICES * (1 + 2 * e / 256) + e * OTHERS, rel=0.002)
    if name in ADAPTED:
        assert contender.num_trained() == OTHERS + 8 * ADAPTERS
    elif name not in OURS:
        assert contender.num_trained() == MATRICES + OTHERS and taken[-1].gradients == e * (MATRICES + OTHERS)


def with_masters(rivals: Any, name: str, shape: str, **options: Any) -> list[Any]:
    """In float32, and in bf16."""
    kinds: list[dict[str, Any]] = [{}, {"dtype": "bf16", "masters": True}]
    return [build(rivals, name, shape, **kind, **options) for kind in kinds]


@pytest.mark.parametrize(
    "name", ["adamw", "adamw8bit", "galore:8", "qgalore:8", "apollomini", "lora:8", "qlora:8", "relora:8", "loqt8bit:8"]
)
def test_with_masters_bf16_is_a_matter_of_products(rivals: Any, shape: str, name: str) -> None:
    """Ten steps stay near those in float32."""
    wide, low = with_masters(rivals, name, shape, lr=3e-3, interval=4)
    batch = batch_of(0)
    losses = [(wide.step(batch).loss, low.step(batch).loss) for _ in range(10)]
    assert 0 < max(abs(one - other) for one, other in losses) < 0.012 and losses[-1][0] < losses[0][0] - 1
    with low.computing():
        found = evaluate(low.model, [batch], torch.device("cpu")).loss
    assert found == pytest.approx(low.step(batch).loss, abs=1e-5), "an evaluation computes as a step does"
    if name != "loqt8bit:8":
        tensors = [t for entry in low.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        assert {t.dtype for t in tensors} <= {torch.float32, torch.uint8}
        assert all(p.dtype == torch.float32 for p in low.model.parameters() if p.requires_grad)
        frozen = {p.dtype for p in low.model.parameters() if p.is_floating_point() and not p.requires_grad}
        assert frozen <= ({torch.float32} if name == "relora:8" else {torch.bfloat16})


@pytest.mark.parametrize("name", ["adamw", "galore:8", "qlora:8", "loqt8bit:8"])
def test_with_masters_small_updates_are_not_lost(rivals: Any, shape: str, name: str) -> None:
    contenders = with_masters(rivals, name, shape, lr=1e-6, lr_full_rank=1e-5)

    def head(contender: Any) -> Tensor:
        masters = contender.engine.masters() if hasattr(contender, "engine") else {}
        return masters.get("lm_head.weight", contender.model.lm_head.weight).detach().float().clone()

    starts = [head(contender) for contender in contenders]
    for contender in contenders:
        contender.step(batch_of(0))
        contender.step(batch_of(1))
    expected, moved = (head(contender) - start for contender, start in zip(contenders, starts, strict=True))
    assert (moved - expected).norm() < 0.15 * expected.norm()


def test_all_start_from_the_same_weights(rivals: Any, shape: str) -> None:
    losses = {name: build(rivals, name, shape, seed=5).step(batch_of(0)).loss for name in ("adamw", *PROJECTED[2:])}
    losses |= {name: build(rivals, name, shape, seed=5).step(batch_of(0)).loss for name in ("lora:8", "loqtnq:8")}
    assert max(losses.values()) - min(losses.values()) < 1e-5, losses
    assert abs(build(rivals, "adamw", shape, seed=6).step(batch_of(0)).loss - losses["adamw"]) > 1e-3
    # The same draw of W, and the same rounding to NF4, double quantization of the scales but for.
    quantized = [build(rivals, name, shape, seed=5).step(batch_of(0)).loss for name in ("qlora:8", "loqt:8")]
    assert quantized[0] == pytest.approx(quantized[1], abs=3e-4)
    assert abs(quantized[1] - losses["adamw"]) > 1e-3


@pytest.mark.parametrize("name", ["adamw8bit", "qgalore:8", "apollomini", "relora:8"])
@pytest.mark.parametrize("still", ["matrices", "others"])
def test_the_rest_of_the_model_has_its_own_rate(rivals: Any, shape: str, name: str, still: str) -> None:
    """What has a rate of almost nothing does not move."""
    rates = {"lr": 1e-15, "lr_full_rank": 1e-2} if still == "matrices" else {"lr": 1e-2, "lr_full_rank": 1e-15}
    contender = build(rivals, name, shape, **rates)

    def look() -> tuple[list[Tensor], list[Tensor]]:
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for path, parameter in contender.model.named_parameters():
            is_other = any(part in path for part in ("embed", "norm", "lm_head"))
            value = parameter.data
            if value.dtype == torch.uint8 and hasattr(parameter, "scales"):
                value = contender.model.get_submodule(path.removesuffix(".weight")).dequantized(torch.float32)
            parts[is_other].append(value.clone())
        return parts

    before = look()
    for number in range(2):
        contender.step(batch_of(number))
    moved = [
        max((a.float() - b.float()).abs().max().item() for a, b in zip(*two, strict=True))
        for two in zip(before, look(), strict=True)
    ]
    quiet, loud = moved if still == "matrices" else moved[::-1]
    assert loud > 1e-3
    assert quiet < (2e-3 if name == "qgalore:8" and still == "matrices" else 1e-9), "INT8 is rounded by chance"


def test_the_rate_follows_the_cosine(rivals: Any, shape: str) -> None:
    contender = build(rivals, "galore:8", shape, lr=0.2, lr_full_rank=0.1, max_steps=20)
    seen = []
    for number in range(20):
        contender.step(batch_of(number))
        seen.append([group["lr"] for group in contender.optimizer.param_groups])
    falling = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 18)) for k in range(18)]
    for (others, matrices), factor in zip(seen, [0.5, 1.0, *falling], strict=True):
        assert (others, matrices) == pytest.approx((0.1 * factor, 0.2 * factor))


@pytest.mark.parametrize("name", ["adamw", "qgalore:8", "lora:8"])
def test_gradients_are_clipped_together(rivals: Any, shape: str, name: str) -> None:
    contender = build(rivals, name, shape, max_grad_norm=0.01)
    seen: list[float] = []
    update = contender.update

    def spy() -> Any:
        gradients = [getattr(p, "float_grad", p.grad) for p in contender.trained()]
        seen.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        return update()

    contender.update = spy
    for number in range(2):
        contender.step(batch_of(number))
    assert seen == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.mark.parametrize("name", PROJECTED)
def test_projections_are_renewed_when_asked(rivals: Any, shape: str, name: str) -> None:
    contender = build(rivals, name, shape)
    assert not list(contender._projectors())
    contender.step(batch_of(0))
    projectors = dict(contender._projectors())
    assert len(projectors) == 7 * LAYERS and all(min(p.shape) == HIDDEN for p in projectors)

    def bases() -> list[Tensor]:
        return [projector.ortho_matrix.clone() for projector in projectors.values()]

    first = bases()
    contender.step(batch_of(1))
    assert all(torch.equal(a, b) for a, b in zip(first, bases(), strict=True))
    contender.step(batch_of(2), refresh=True)
    assert not any(torch.equal(a, b) for a, b in zip(first, bases(), strict=True))
    second = bases()
    contender.step(batch_of(3))
    assert all(torch.equal(a, b) for a, b in zip(second, bases(), strict=True))


@pytest.mark.parametrize("name", PROJECTED)
def test_a_large_model_has_projections_from_the_start(rivals: Any, shape: str, name: str) -> None:
    contender = build(rivals, name, shape, is_large=True)
    before = {id(p): projector.ortho_matrix for p, projector in contender._projectors()}
    assert len(before) == 7 * LAYERS
    losses = [contender.step(batch_of(0)).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    taken = contender.step(batch_of(0), refresh=True)
    assert taken.refresh > 0
    assert all(before[id(p)] is projector.ortho_matrix for p, projector in contender._projectors())


def test_qlora_is_its_frozen_weights_and_adapters(rivals: Any, shape: str) -> None:
    import bitsandbytes

    contender = build(rivals, "qlora:8", shape)
    layer = contender.model.model.layers[1].mlp.down_proj
    codes = layer.base_layer.weight.detach().clone()
    for number in range(3):
        contender.step(batch_of(number))
    assert torch.equal(layer.base_layer.weight, codes), "W is frozen"
    frozen = bitsandbytes.functional.dequantize_4bit(layer.base_layer.weight.t(), layer.base_layer.weight.quant_state)
    frozen = frozen if frozen.shape == (HIDDEN, INTERMEDIATE) else frozen.t()
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    assert b.abs().max() > 0, "adapters are trained"
    x = torch.randn(5, INTERMEDIATE)
    torch.testing.assert_close(layer(x), x @ (frozen + 32 / 8 * b @ a).t(), rtol=1e-4, atol=1e-5)
    original = rivals.dense_model(contender.setup).model.layers[1].mlp.down_proj.weight
    assert (frozen - original).abs().max() < 0.2 * original.abs().max(), "the weights of the others, rounded"


def test_loqt_reinitializes_in_the_first_step_and_when_asked(rivals: Any, shape: str) -> None:
    contender = build(rivals, "loqt:8", shape)
    name, layer = next(iter(contender.engine.controller.layers.items()))

    def packed() -> list[Tensor]:
        return [tensor.clone() for tensor in (*layer.packed_w().values(), *layer.packed_p().values())]

    changes = []
    for number in range(5):
        before = packed()
        contender.step(batch_of(number), refresh=number == 3)
        changes.append(any(not torch.equal(a, b) for a, b in zip(before, packed(), strict=True)))
    assert changes == [True, False, False, True, False], name


def test_an_interval_is_kept_without_being_asked(rivals: Any, shape: str) -> None:
    contender = build(rivals, "loqt:8", shape, interval=2)
    layer = next(iter(contender.engine.controller.layers.values()))
    changes = []
    for number in range(5):
        before = [tensor.clone() for tensor in layer.packed_p().values()]
        contender.step(batch_of(number))
        changes.append(any(not torch.equal(a, b) for a, b in zip(before, layer.packed_p().values(), strict=True)))
    assert changes == [True, False, True, False, True]


def test_options_of_a_run_follow_the_name(rivals: Any, shape: str) -> None:
    contender = build(rivals, "loqt:8+loqt.product=factored+loqt.alpha=0.25", shape)
    layers = contender.engine.controller.layers.values()
    assert {(layer.product, layer.scale, layer.rank) for layer in layers} == {("factored", 0.25, 8)}


def test_a_shape_can_have_other_layers(rivals: Any, shape: str) -> None:
    setup = rivals.Setup(shape, length=17, num_layers=5)
    description = setup.description()
    assert description.num_hidden_layers == 5 and description.hidden_size == HIDDEN
    assert len(rivals.build("adamw", setup).model.model.layers) == 5


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("galore", "needs a rank, such as galore:128"),
        ("apollomini:4", "takes no rank"),
        ("lora:x", "give a positive number"),
        ("lora:8+start=3", "takes no options of a run"),
        ("relora:8+stop=3", "one option is start=STEPS"),
        ("relora:8+start=soon", "one option is start=STEPS"),
        ("loqt:8+candidate.stochastic", r"write candidate\.stochastic=VALUE"),
        ("galor:8", "there is no method 'galor'"),
    ],
)
def test_a_name_that_says_nothing_is_refused(rivals: Any, name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        rivals.parse(name)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("galore:65", {}, r"the rank is 65, but model\.layers\.0.*; give at most 64"),
        ("lora:65", {}, r"the rank is 65, but model\.layers\.0.*; give at most 64"),
        ("loqt:65", {}, r"loqt\.rank=65 is larger than the smaller side \(64\)"),
        ("loqt:8+loqt.rank=66", {}, r"loqt\.rank=66 is larger"),
        ("loqt:8+loqt.alfa=1", {}, "loqt.alfa"),
        ("relora:8+start=20", {"max_steps": 20}, "of 20 steps none is left for ReLoRA after 20"),
        ("qgalore:3", {"num_layers": 1}, None),
        ("loqt:8+candidate.magic=1", {}, "there is no candidate.magic"),
        ("loqt:8+candidate.sketch=gauss", {"interval": 4}, r"takes loqt\.subspace=sketch"),
        ("loqtnq:8+candidate.stochastic=1", {"interval": 4}, r"loqt\.quantize_w is none"),
        ("loqt:8+candidate.denoise=3", {}, "takes a schedule that is known ahead"),
        ("loqt:8+candidate.blocksize=32+loqt.quantize_w=none", {"dtype": "bf16"}, "takes a run in float32"),
        ("loqt:8+candidate.denoise=3", {"interval": 4}, None),
        ("loqt:8+candidate.sketch=gauss+loqt.subspace=sketch", {"dtype": "bf16", "device": "cuda"}, None),
        ("relora:8+start=19", {"max_steps": 20}, None),
        ("galore:64", {}, None),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(
    rivals: Any, shape: str, name: str, options: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (*PACKAGES.values(), "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)  # not asked for
    setup = rivals.Setup(shape, rows=3, length=17, **options)
    if why is None:
        rivals.check(name, setup)
        return
    for refused in (rivals.check, rivals.build):
        with pytest.raises(ValueError, match=why):
            refused(name, setup)


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_rival_that_is_not_installed_says_what_to_install(
    rivals: Any, shape: str, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(rivals.MissingPackage, match=r"not installed.*pip install -e '\.\[compare\]'"):
        rivals.build(name if name == "apollomini" else f"{name}:8", rivals.Setup(shape, length=17))


def test_text_is_shifted_by_one_and_differs_from_step_to_step(rivals: Any) -> None:
    one, two = (rivals.text_batch(3, 11, number) for number in (0, 1))
    assert one["input_ids"].shape == one["targets"].shape == (3, 11)
    assert torch.equal(one["input_ids"].flatten()[1:], one["targets"].flatten()[:-1])
    assert torch.equal(one["targets"].flatten()[-1], two["input_ids"].flatten()[0])
    large = rivals.text_batch(64, 4096, 7)["input_ids"]
    assert large.max() < 256 and len(large.unique()) > 50
