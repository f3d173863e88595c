"""tools/rivals.py: every contender trains as it says, and counts what it holds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = (
    64,
    128,
    2,
    131,
)  # widths of whole blocks: bitsandbytes' CPU kernel errs on others
MATRICES = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
OTHERS = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch", "qlora": "peft"}


@pytest.fixture(scope="module")
def rivals(repository: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("rivals")
    sys.path.remove(str(repository / "tools"))
    del sys.modules["rivals"]


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    content = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    content |= {"intermediate_size": INTERMEDIATE, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    file = tmp_path_factory.mktemp("shape") / "tiny.json"
    file.write_text(json.dumps(content | {"max_position_embeddings": 64, "tie_word_embeddings": False}))
    return str(file)


def batch_of(seed: int, rows: int = 3, length: int = 17) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}


def build(rivals: Any, name: str, shape: str, **options: Any) -> Any:
    package = PACKAGES.get(name.partition(":")[0])
    if package is not None:
        pytest.importorskip(package, reason="the compare extra is not installed")
    return rivals.build(name, rivals.Setup(shape, rows=3, length=17, **options))


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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["adamw", "adamw8bit", "galore:8", "apollo:8", "qlora:8", "loqt:8", "loqt8bit:8", "loqtcard:8"]
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
    elif name in ("qlora:8", "loqt:8"):
        assert found["weights"] < e * (MATRICES / 2 + 2 * OTHERS)
        assert taken[-1].gradients < e * (MATRICES / 2 + OTHERS)
    elif name == "loqtcard:8":
        assert taken[-1].gradients == 0, "updated and freed inside the backward"


@pytest.mark.parametrize("name", ["galore:8", "apollo:8"])
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


@pytest.mark.parametrize("name", ["galore:8", "apollo:8"])
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


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_rival_that_is_not_installed_says_what_to_install(
    rivals: Any, shape: str, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(rivals.MissingPackage, match=r"not installed.*pip install -e '\.\[compare\]'"):
        rivals.build(f"{name}:8", rivals.Setup(shape, length=17))


def test_text_is_shifted_by_one_and_differs_from_step_to_step(rivals: Any) -> None:
    one, two = (rivals.text_batch(3, 11, number) for number in (0, 1))
    assert one["input_ids"].shape == one["targets"].shape == (3, 11)
    assert torch.equal(one["input_ids"].flatten()[1:], one["targets"].flatten()[:-1])
    assert torch.equal(one["targets"].flatten()[-1], two["input_ids"].flatten()[0])
    large = rivals.text_batch(64, 4096, 7)["input_ids"]
    assert large.max() < 256 and len(large.unique()) > 50
