"""Evaluation: every held-out token counts once, on however many ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import VOCAB, as_ranks, llama_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loqt_ds.evaluation import Evaluation, evaluate
from loqt_ds.ranks import ALONE, Ranks


def batches(num_batches: int) -> Iterator[dict[str, Tensor]]:
    """Of two rows, with different numbers of predicted tokens; the last has one row."""
    draw = torch.Generator().manual_seed(0)
    for number in range(num_batches):
        rows = 1 if number == num_batches - 1 else 2
        ids = torch.randint(0, VOCAB, (rows, 9), generator=draw)
        targets = ids[:, 1:].clone()
        targets[:, : number % 5] = -100
        yield {"input_ids": ids[:, :-1], "targets": targets}


def reference(model: nn.Module, num_batches: int) -> tuple[float, int]:
    """Summed in float64 token by token."""
    total, count = 0.0, 0
    for batch in batches(num_batches):
        logits = model(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
        for row, target in zip(logits.flatten(0, 1), batch["targets"].flatten().tolist(), strict=True):
            if target >= 0:
                total, count = total - float(row[target]), count + 1
    return total / count, count


@pytest.mark.parametrize("num_batches", [1, 2, 5, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@torch.no_grad()
def test_the_ranks_share_the_batches(num_batches: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).train()
    loss, count = reference(model.eval(), num_batches)
    model.train()
    num_calls = []

    def member(ranks: Ranks) -> Evaluation:
        calls: list[Any] = []
        result = evaluate(model, batches(num_batches), torch.device("cpu"), ranks=ranks, tick=lambda: calls.append(1))
        num_calls.append(len(calls))
        return result

    results = as_ranks(world_size, member) if world_size > 1 else [member(ALONE)]
    assert len(set(results)) == 1, "the same bits on all ranks"
    assert results[0].num_tokens == count and results[0].loss == pytest.approx(loss, rel=1e-6)
    # As many on each rank, what counts and what does not: models that are sharded are run by all together.
    assert num_calls == [-(-num_batches // world_size)] * world_size
    assert model.training


def test_nothing_to_evaluate_on() -> None:
    model = LlamaForCausalLM(llama_config())
    empty = [{"input_ids": torch.zeros(1, 4, dtype=torch.long), "targets": torch.full((1, 4), -100)}]
    with pytest.raises(ValueError, match="no token to evaluate on"):
        evaluate(model, empty, torch.device("cpu"))
