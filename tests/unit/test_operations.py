"""Counted operations against torch's own counter on real steps; bytes against sizes of real tensors."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from loqt_ds.config import Config, load_config
from loqt_ds.core.compensation import compensate
from loqt_ds.core.quantization import QuantSpec
from loqt_ds.method import head, lean
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import convert, loqt_layers
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.operations import PARTS, compensate_work, optimizer_work, reinit_work, step_work, tap_work, total

aten = torch.ops.aten


def in_place(_: Any, one: Any, other: Any, **__: Any) -> int:
    return 2 * one[0] * one[1] * other[1]


def flash(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flash_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


class NoTracker(AbstractContextManager[None]):
    """In place of torch's, which notes what belongs to which module and cannot see a gradient taken in a backward."""

    parents = frozenset({"Global"})

    def __exit__(self, *_: object) -> None:
        pass


def counter() -> FlopCounterMode:
    """Knows two more products: in place, and attention on a CPU (all pairs, as torch counts it on a GPU)."""
    more = {
        aten.addmm_: in_place,
        aten._scaled_dot_product_flash_attention_for_cpu: flash,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
    }
    mode = FlopCounterMode(display=False, custom_mapping=more)
    mode.mod_tracker = NoTracker()  # type: ignore[assignment]
    return mode


def counted(model: Any, config: Config, **inputs: Any) -> int:
    """Of a forward and a backward, rotary embeddings apart."""
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    ids = torch.randint(0, 97, (rows, length))
    with counter() as flops:
        model(input_ids=ids, targets=ids, use_cache=False, **inputs).backward()
    with counter() as rotary:
        model.model.rotary_emb(torch.zeros(1), torch.arange(length).unsqueeze(0))
    return flops.get_total_flops() - rotary.get_total_flops()


@pytest.fixture
def shape(tmp_path: Path) -> str:
    content = {
        **{"model_type": "llama", "vocab_size": 97, "max_position_embeddings": 64, "tie_word_embeddings": False},
        **{"hidden_size": 48, "intermediate_size": 116, "num_hidden_layers": 2, "num_attention_heads": 6},
        "num_key_value_heads": 2,
    }
    (tmp_path / "shape.json").write_text(json.dumps(content))
    return str(tmp_path / "shape.json")


def configured(shape: str, *overrides: str) -> Config:
    base = [f"model.shape={shape}", "loqt.rank=12", "data.sequence_length=31", "train.micro_batch_size=3"]
    return load_config(None, [*base, "train.device=cpu", "train.dtype=fp32", *overrides])


def stock(config: Config, shape: str) -> nn.Module:
    options = json.loads(Path(shape).read_text())
    attention = config.model.attention
    return LlamaForCausalLM(LlamaConfig(**options, attn_implementation=attention, use_cache=False))


def trainable(config: Config, shape: str) -> nn.Module:
    model = stock(config, shape)
    convert(model, config.loqt)
    if config.train.lean_activations is not False:
        lean.install(model)
    head.install(model)
    if config.train.activation_checkpointing:
        for block in model.model.layers:  # type: ignore[union-attr, operator]
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return model


@pytest.mark.parametrize("product", ["factored", "merged", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("loqt.rank=16", "loqt.side=left", "train.micro_batch_size=1"),
        ("loqt.side=right", "train.lean_activations=false", "data.sequence_length=13"),
        ("train.activation_checkpointing=true",),
        ("train.dtype=bf16", "loqt.quantize_p=none"),
    ],
    ids=" ".join,
)
def test_operations_of_a_step(shape: str, product: str, options: tuple[str, ...]) -> None:
    config = configured(shape, "model.attention=eager", f"loqt.product={product}", *options)
    model = trainable(config, shape)
    if config.train.dtype == "bf16":
        model.bfloat16()
    # Of two micro-batches, as the counts are per step.
    config.train.gradient_accumulation_steps = 2
    parts = step_work(config)
    assert total(parts.values()).operations == 2 * counted(model, config)
    assert list(parts) == list(PARTS) and all(w.operations >= 0 and w.num_bytes > 0 for w in parts.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_operations_of_a_step_in_full_rank(shape: str, attention: str) -> None:
    config = configured(shape, f"model.attention={attention}", f"data.mask_documents={attention == 'sdpa'}")
    model = stock(config, shape)
    head.install(model)
    mask = torch.ones(3, 1, 31, 31, dtype=torch.bool)  # one that is given is not known to be causal
    mask = mask if attention == "sdpa" else torch.zeros(3, 1, 31, 31)
    works = step_work(config, full_rank=True).values()
    assert total(works).operations == counted(model, config, attention_mask=mask)


def test_a_causal_mask_leaves_half_of_the_pairs(shape: str) -> None:
    masked, causal = (
        step_work(configured(shape, f"data.mask_documents={given}"))["attention"].operations for given in (True, False)
    )
    assert causal * 2 * 31 == masked * 32


def test_a_head_beyond_the_kept_logits_makes_them_twice(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(shape, "model.attention=eager")
    few = step_work(config)["head"].operations
    for name in ("loqt_ds.core.cross_entropy", "loqt_ds.operations"):
        monkeypatch.setattr(f"{name}.KEPT_ELEMENTS", 93 * 97 - 1)
    parts = step_work(config)
    assert parts["head"].operations * 6 == few * 8
    assert total(parts.values()).operations == counted(trainable(config, shape), config)


def test_the_design_s_formula(shape: str) -> None:
    """4 m n + 4 r (m + n) + 2 r max(m, n) for each token, of which products are 4 m n; 6 m n in full rank."""
    config = configured(shape, "loqt.product=factored")
    parts, full = step_work(config), step_work(config, full_rank=True)
    sizes = 2 * ([(48, 48)] * 2 + [(16, 48)] * 2 + [(116, 48)] * 2 + [(48, 116)])
    tokens = 3 * 31
    assert parts["products"].operations == tokens * sum(4 * m * n for m, n in sizes)
    assert parts["low_rank"].operations == tokens * sum(4 * 12 * (m + n) + 2 * 12 * max(m, n) for m, n in sizes)
    assert full["products"].operations == tokens * sum(6 * m * n for m, n in sizes)
    assert full["low_rank"].operations == full["dequantization"].num_bytes == 0
    merged = step_work(configured(shape, "loqt.product=merged"))["low_rank"].operations
    assert merged == sum(tokens * 2 * 12 * (m + n) + 4 * m * n * 12 for m, n in sizes)


@pytest.mark.parametrize("subspace", ["gram", "sketch"])
def test_operations_of_a_tapped_micro_batch(shape: str, subspace: str) -> None:
    """From the second micro-batch on: the first chooses the columns of a sketch, too."""
    config = configured(shape, "model.attention=eager", f"loqt.subspace={subspace}")
    model = trainable(config, shape)
    layers = loqt_layers(model)
    controller = Controller(layers, config.loqt, None, original=None, seed=0)  # type: ignore[arg-type]
    ordinary = counted(model, config)
    controller.begin_step(0)
    first = counted(model, config) - ordinary
    second = counted(model, config) - ordinary
    taps = [tap_work(layer, config, 3 * 31, 4).operations for layer in layers.values()]
    assert second == sum(taps)
    assert first == reinit_work(config)["tap"].operations


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_operations_of_a_compensation(side: str, iterations: int) -> None:
    spec = QuantSpec("nf4")
    layer = LoQTLinear(70, 53, rank=9, side=side, scale=0.5, spec_w=spec, spec_p=spec)
    weight, basis = torch.randn(53, 70), torch.linalg.qr(torch.randn(layer.basis_shape))[0]
    with counter() as flops:
        compensate(weight, basis, side=side, scale=0.5, iterations=iterations, spec=spec)
    assert flops.get_total_flops() == compensate_work(layer, iterations).operations


def test_bytes_of_dequantization_and_of_the_update(shape: str) -> None:
    config = configured(shape, "loqt.product=factored")
    model = trainable(config, shape)
    expected = 0
    for layer in loqt_layers(model).values():
        expected += sum(b.numel() for b in layer.buffers()) + 4 * (layer.weight_q().numel() + layer.basis_hat().numel())
    assert step_work(config)["dequantization"].num_bytes == 2 * expected  # forward and backward
    adam = configured(shape, "optim.name=adamw")
    # The gradient twice (once for its norm), value and two moments read and written.
    assert optimizer_work(adam, [(1000, torch.float32)]).num_bytes == 1000 * 4 * (2 + 6)
    assert optimizer_work(adam, [(1000, torch.bfloat16)]).num_bytes == 1000 * (2 * 2 + 2 + 4 * 2 + 4 * 4)
    trained = sum(p.numel() for p in model.parameters())
    assert step_work(adam)["optimizer"].num_bytes == trained * 4 * 8


def test_a_re_initialization_of_every_kind(shape: str) -> None:
    for subspace in ("exact", "gram", "sketch"):
        parts = reinit_work(configured(shape, f"loqt.subspace={subspace}", "loqt.compensation_steps=3"))
        assert all(work.num_bytes > 0 for work in parts.values()), subspace
    first = reinit_work(configured(shape), first=True)
    assert first["merge"].num_bytes == 0 and first["compensate"] == reinit_work(configured(shape))["compensate"]
    sizes = 2 * ([(48, 48)] * 2 + [(16, 48)] * 2 + [(116, 48)] * 2 + [(48, 116)])
    assert parts["merge"].operations == sum(2 * m * n * 12 for m, n in sizes)
