"""What classifiers and regressors are judged by: accuracy, F1, Matthews, Pearson, Spearman, and GLUE's mean of them.

Computed by scikit-learn and scipy (`pip install 'loqt-ds[glue]'`) from the predictions of a whole held-out set, not
averaged over batches. GLUE (Wang et al., arXiv 1804.07461, section 3 and table 1) judges each task by one or two of
them, and by their mean where there are two; MNLI by its accuracy on two held-out sets, of which the mean is taken as
well (`GlueTask.metrics` of `loqt_ds.data.glue` has the table).

Predictions that are all the same have no correlation with anything: it counts as 0, as Matthews' does by definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

PART = "_part"
"""Name in a batch: (b,) int64, to which of several held-out sets a row belongs."""

CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("pearson", "spearman")


def _package(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"scores need {package} ({error}); pip install 'loqt-ds[glue]'") from error


def check_packages(metrics: Sequence[str]) -> None:
    """Raises ValueError, telling what to install, where what computes the metrics is not there."""
    if any(name in CLASSIFICATION for name in metrics):
        _package("sklearn.metrics", "scikit-learn")
    if any(name in REGRESSION for name in metrics):
        _package("scipy.stats", "scipy")


Numbers = NDArray[Any]


def accuracy(targets: Numbers, predicted: Numbers) -> float:
    return float(_package("sklearn.metrics", "scikit-learn").accuracy_score(targets, predicted))


def f1(targets: Numbers, predicted: Numbers, num_labels: int = 2) -> float:
    """Of class 1 where the model has two classes, else the mean of all classes'; 0 for a class that never occurs."""
    score = _package("sklearn.metrics", "scikit-learn").f1_score
    if num_labels == 2:
        return float(score(targets, predicted, average="binary", zero_division=0.0))
    return float(score(targets, predicted, labels=range(num_labels), average="macro", zero_division=0.0))


def matthews(targets: Numbers, predicted: Numbers) -> float:
    return float(_package("sklearn.metrics", "scikit-learn").matthews_corrcoef(targets, predicted))


def _correlation(name: str, targets: Numbers, predicted: Numbers) -> float:
    if len(targets) < 2 or np.ptp(targets) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(getattr(_package("scipy.stats", "scipy"), name)(targets, predicted).statistic)


def pearson(targets: Numbers, predicted: Numbers) -> float:
    return _correlation("pearsonr", targets, predicted)


def spearman(targets: Numbers, predicted: Numbers) -> float:
    return _correlation("spearmanr", targets, predicted)


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


@dataclass
class LabelScorer:
    """Scores of the predictions that a model's outputs are (an `evaluation.Scorer`): the class with the largest logit,
    or the number.

    metrics: names of METRICS. num_labels: classes of the model; 1: it gives a number. parts: names of the held-out
    sets; scores of the first have their plain names, those of others are NAME_PART. glue: of which metrics `glue` is
    the mean, over all parts; none: there is no such score.
    """

    metrics: Sequence[str]
    num_labels: int
    parts: Sequence[str] = ("",)
    glue: Sequence[str] = ()
    _rows: list[tuple[Numbers, Numbers, Numbers]] = field(default_factory=list)

    def add(self, outputs: Any, batch: dict[str, Tensor]) -> None:
        """Takes in logits (b, classes), or (b, 1) of a regression, and the batch's targets (b,)."""
        logits = outputs.logits.detach().float()
        predicted = logits.flatten() if self.num_labels == 1 else logits.argmax(-1)  # to be read: a synchronization
        targets = batch["targets"].numpy()
        part = batch[PART].numpy() if PART in batch else np.zeros(len(targets), dtype=np.int64)
        self._rows.append((predicted.cpu().numpy(), targets, part))

    def state(self) -> list[tuple[Numbers, Numbers, Numbers]]:
        rows, self._rows = self._rows, []
        return rows

    def result(self, states: Sequence[list[tuple[Numbers, Numbers, Numbers]]]) -> dict[str, float]:
        rows = [row for state in states for row in state]
        predicted, targets, part = (np.concatenate([row[place] for row in rows]) for place in range(3))
        scores: dict[str, float] = {}
        for number, name in enumerate(self.parts):
            here = part == number
            if not here.any():  # eval.max_tokens ended before it
                continue
            for metric in self.metrics:
                key = metric if number == 0 else f"{metric}_{name}"
                options = {"num_labels": self.num_labels} if metric == "f1" else {}
                scores[key] = METRICS[metric](targets[here], predicted[here], **options)
        if self.glue:
            of_parts = [scores[key] for key in scores if any(key == m or key.startswith(f"{m}_") for m in self.glue)]
            scores["glue"] = float(np.mean(of_parts))
        return scores
