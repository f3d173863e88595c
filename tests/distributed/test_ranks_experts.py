"""Experts on several ranks: each has tokens for other ones, and together they train like one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import VOCAB, make_config
from helpers import train_step as train_single
from ranks import build, held, launch, step_on
from torch import Tensor
from transformers import MixtralConfig

from loqt_ds.config import Config
from loqt_ds.engines.single import SingleEngine
from loqt_ds.method.conversion import build_model, initializer
from loqt_ds.ranks import Ranks

NUM_STEPS, ROWS = 7, 4


def description() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )


def configuration(world_size: int) -> Config:
    """Nothing is quantized, so that nothing can flip."""
    dense = {"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0}
    train = {"micro_batch_size": ROWS // world_size}
    return make_config(loqt={"rank": 7, "interval": 3} | dense, train=train)


def few_tokens(step: int) -> Tensor:
    """(rows, 3): a rank has four tokens, or two, of two experts each, which cannot reach all six of every block
    alike."""
    return torch.randint(0, VOCAB, (ROWS, 3), generator=torch.Generator().manual_seed(70 + step))


def run_steps(ranks: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    engine = build(ranks, configuration(ranks.world_size), description=description(), **options)
    losses, num_kept = [], []
    for step in range(NUM_STEPS):
        loss, report = step_on(engine, few_tokens(step))
        losses.append(loss)
        num_kept += [] if report.reinit is None else [report.reinit.summary()["num_kept"]]
    result = {"losses": losses, "num_kept": num_kept, "held": held(engine)}
    engine.release()
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, {"stage": 1}),
        (2, {"stage": 2}),
        (2, {"fsdp": {}}),
        (2, {"fsdp": {"shard_frozen": True}}),
        (4, {"fsdp": {"shard_frozen": True, "num_replicas": 2}}),
    ],
)
def test_ranks_train_experts_like_one_process(world_size: int, options: dict[str, Any]) -> None:
    config = configuration(1)
    model, source = build_model(description(), config.loqt, initializer(0))
    engine = SingleEngine(model, config, original=source.weight)
    losses, num_kept = [], []
    for step in range(NUM_STEPS):
        loss, report = train_single(engine, few_tokens(step))
        losses.append(loss)
        num_kept += [] if report.reinit is None else [report.reinit.summary()["num_kept"]]
    assert len(num_kept) == 3
    results = launch(world_size, run_steps, options=options)
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-4)
        assert result["num_kept"] == num_kept
        assert result["held"] == results[0]["held"]
