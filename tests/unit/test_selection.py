"""The best evaluation, and when there is nothing to wait for."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from helpers import VOCAB, as_ranks, llama_config
from transformers import LlamaForCausalLM

from loqt_ds.evaluation import Evaluation, Evaluator, evaluate
from loqt_ds.finish import describe_frequencies
from loqt_ds.ranks import ALONE
from loqt_ds.selection import Selection


def evaluations(num: int, seed: int = 0) -> list[Evaluation]:
    """With ties, and now and then a loss that is not finite."""
    draw = random.Random(seed)
    losses = [draw.choice([math.nan, math.inf, *(n / 4 for n in range(1, 9))]) for _ in range(num)]
    return [Evaluation(loss, 10, {"exact_match": draw.randint(0, 3) / 3}) for loss in losses]


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_is_found_and_survives_a_stop(metric: str, seed: int) -> None:
    given = evaluations(12, seed)
    sound = [(e, step) for step, e in enumerate(given, start=1) if math.isfinite(e.loss)]
    key = {"loss": lambda e: (-e.loss,), "exact_match": lambda e: (e.scores["exact_match"], -e.loss)}[metric]
    best, best_step = max(sound, key=lambda pair: (key(pair[0]), -pair[1]))
    selection = Selection(metric, patience=3)
    for step, evaluation in enumerate(given, start=1):
        gone_on = Selection(metric, patience=3)
        gone_on.load_state_dict(json.loads(json.dumps(selection.state_dict())))
        assert gone_on.add(evaluation, step) == selection.add(evaluation, step)
        assert (gone_on.best, gone_on.best_step) == (selection.best, selection.best_step)
        assert gone_on.is_over == selection.is_over == (selection.num_since >= 3)
        selection = gone_on
    assert (selection.best, selection.best_step) == (best, best_step)
    assert selection.num_since == len(given) - best_step


def test_patience_and_other_metrics() -> None:
    selection = Selection("exact_match")
    assert all(not selection.is_over for e in evaluations(9) if selection.add(e, 1) or True)
    other = Selection("loss", patience=1)
    assert other.load_state_dict(selection.state_dict()) == ["eval.metric was exact_match and is loss"]
    assert other.best is None and other.num_since == 0, "it followed something else"
    with pytest.raises(ValueError, match=r"eval.metric=f1 is no score of this task; there are: loss, exact_match"):
        Selection("f1").add(evaluations(1, 3)[0], 1)


def test_values_of_other_questions_are_not_compared() -> None:
    asked = Selection("loss", question={"max_tokens": 100, "max_examples": None})
    asked.add(Evaluation(1.0, 100), 5)
    state = json.loads(json.dumps(asked.state_dict()))
    same, more = (Selection("loss", question={"max_tokens": n, "max_examples": None}) for n in (100, None))
    assert same.load_state_dict(state) == [] and same.best_step == 5
    assert more.load_state_dict(state) == ["eval.max_tokens was 100 and is None"]
    assert more.best is None and more.num_since == 0 and more.add(Evaluation(2.0, 900), 6)


def test_what_is_reached_without_seeing_an_input_is_named_by_task() -> None:
    """A squared error may be any size; a perplexity is of tokens only."""
    assert describe_frequencies(2500.0, "regression") == "the mean of the training numbers alone: loss 2500.0000"
    assert describe_frequencies(0.6931, "classification") == "class frequencies alone: loss 0.6931"
    for task in ("causal_lm", "masked_lm"):
        expected = f"token frequencies alone: loss 2.0000, perplexity {math.exp(2):.2f}"
        assert describe_frequencies(2.0, task) == expected


class Counter:
    """A scorer: how often the most probable next token is the right one."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []

    def add(self, outputs: Any, batch: dict[str, torch.Tensor]) -> None:
        targets = batch["targets"]
        assert "_part" in batch and targets.device.type == "cpu"
        right = (outputs.logits.argmax(-1).cpu() == targets) & (targets != -100)
        self.pairs.append((int(right.sum()), int((targets != -100).sum())))

    def state(self) -> Any:
        pairs, self.pairs = self.pairs, []
        return pairs

    def result(self, states: Any) -> dict[str, float]:
        return {"accuracy": sum(r for s in states for r, _ in s) / sum(n for s in states for _, n in s)}


def test_scores_stand_beside_the_same_loss_on_all_ranks() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config())
    draw, batches = torch.Generator().manual_seed(1), []
    for number in range(5):
        ids = torch.randint(0, VOCAB, (2, 7 + number), generator=draw)
        batches.append({"input_ids": ids[:, :-1], "targets": ids[:, 1:].clone(), "_part": torch.zeros(2)})
        batches[-1]["targets"][:, :number] = -100
    plain = evaluate(model, batches, torch.device("cpu"))

    class Held:
        def batches(self, rows: int, max_tokens: int | None) -> Any:
            assert (rows, max_tokens) == (2, None)
            return iter(batches)

    held_out: Any = Held()
    evaluator = Evaluator(
        held_out, 2, torch.device("cpu"), scorer=Counter, answers=lambda model, ranks, tick: {"exact_match": 0.5}
    )
    alone = evaluator(model)
    assert alone.loss == pytest.approx(plain.loss, rel=1e-6) and alone.num_tokens == plain.num_tokens
    assert 0 <= alone.scores["accuracy"] < 1 and alone.metric("exact_match") == 0.5
    assert alone.record() == plain.record() | {"loss": alone.loss, "perplexity": alone.perplexity} | alone.scores
    for each in as_ranks(2, lambda ranks: evaluator(model, ranks=ranks)):
        assert each.scores == alone.scores and each.loss == pytest.approx(alone.loss, rel=1e-6)
    assert ALONE.world_size == 1
