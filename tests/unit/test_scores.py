"""Scores of whole held-out sets, compared with their definitions written out in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loqt_ds.data.glue import TASKS
from loqt_ds.scores import METRICS, PART, LabelScorer


def counted(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Of two classes, from the four counts."""
    tp, tn = ((targets == 1) & (predicted == 1)).sum(), ((targets == 0) & (predicted == 0)).sum()
    fp, fn = ((targets == 0) & (predicted == 1)).sum(), ((targets == 1) & (predicted == 0)).sum()
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    return {
        "accuracy": (tp + tn) / len(targets),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "matthews": (tp * tn - fp * fn) / root,
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Mean places, from 1, of values among all; equal ones share theirs."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def linear(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize("seed", range(3))
def test_two_classes_by_their_counts(seed: int) -> None:
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, 2, 101)
    predicted = np.where(draw.random(101) < 0.3, 1 - targets, targets)
    for name, value in counted(targets, predicted).items():
        assert METRICS[name](targets, predicted) == pytest.approx(value, rel=1e-12), name


def test_correlations_by_their_definitions() -> None:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 6, 57).astype(np.float64)  # with many equal ones
    predicted = targets + draw.standard_normal(57)
    assert METRICS["pearson"](targets, predicted) == pytest.approx(linear(targets, predicted), rel=1e-12)
    assert METRICS["spearman"](targets, predicted) == pytest.approx(linear(ranks(targets), ranks(predicted)), rel=1e-12)


def test_three_classes_take_the_mean_of_their_f1() -> None:
    targets, predicted = np.array([0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 1, 1, 2, 0, 2])
    each = [counted((targets == c).astype(int), (predicted == c).astype(int))["f1"] for c in range(3)]
    assert METRICS["f1"](targets, predicted, num_labels=3) == pytest.approx(np.mean(each))


def test_f1_is_of_the_models_classes_whatever_is_predicted() -> None:
    logits, targets = torch.eye(3)[[0, 1, 1, 0]], torch.tensor([0, 1, 0, 0])  # the third class does not occur
    of_zero, of_one = 2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1)
    found = scored([LabelScorer(("f1",), 3)], logits, targets, torch.zeros(4, dtype=torch.int64))
    assert found["f1"] == pytest.approx((of_zero + of_one + 0) / 3)
    found = scored([LabelScorer(("f1",), 2)], logits[:, :2], targets, torch.zeros(4, dtype=torch.int64))
    assert found["f1"] == pytest.approx(of_one)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_constant_predictions_have_no_correlation(name: str) -> None:
    assert METRICS[name](np.array([0.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0])) == 0.0


def scored(scorers: list[LabelScorer], logits: torch.Tensor, targets: torch.Tensor, part: torch.Tensor) -> dict:
    """The rows in batches of 4, dealt out to several ranks."""
    for number, start in enumerate(range(0, len(targets), 4)):
        rows = slice(start, start + 4)
        batch = {"targets": targets[rows], PART: part[rows]}
        scorers[number % len(scorers)].add(SimpleNamespace(logits=logits[rows]), batch)
    return scorers[0].result([scorer.state() for scorer in scorers])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_scores_are_of_all_rows_of_all_ranks(world_size: int) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(37, 2), torch.randint(0, 2, (37,))
    scorers = [LabelScorer(("accuracy", "f1"), 2, glue=TASKS["mrpc"].metrics) for _ in range(world_size)]
    found = scored(scorers, logits, targets, torch.zeros(37, dtype=torch.int64))
    expected = counted(targets.numpy(), logits.argmax(-1).numpy())
    assert found["f1"] == pytest.approx(expected["f1"]) and found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["glue"] == pytest.approx((expected["f1"] + expected["accuracy"]) / 2)
    assert scorers[0].state() == []


def test_two_held_out_sets_have_their_own_scores() -> None:
    task = TASKS["mnli"]
    torch.manual_seed(1)
    logits, targets, part = torch.randn(41, 3), torch.randint(0, 3, (41,)), torch.randint(0, 2, (41,))
    found = scored([LabelScorer(("accuracy",), 3, parts=task.parts, glue=task.metrics)], logits, targets, part)
    right = logits.argmax(-1) == targets
    assert found["accuracy"] == pytest.approx(right[part == 0].double().mean().item())
    assert found["accuracy_mismatched"] == pytest.approx(right[part == 1].double().mean().item())
    assert found["glue"] == pytest.approx((found["accuracy"] + found["accuracy_mismatched"]) / 2)


def test_numbers_are_scored_as_they_are() -> None:
    torch.manual_seed(2)
    predicted, targets = torch.randn(23, 1, dtype=torch.bfloat16), torch.rand(23) * 5
    scorer = LabelScorer(("pearson", "spearman"), 1, glue=("pearson", "spearman"))
    found = scored([scorer], predicted, targets, torch.zeros(23, dtype=torch.int64))
    assert found["pearson"] == pytest.approx(
        linear(targets.double().numpy(), predicted[:, 0].double().numpy()), abs=1e-6
    )
