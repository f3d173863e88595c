"""Which evaluation was the best so far, and when there is nothing to wait for any more."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from loqt_ds.evaluation import Evaluation

LESS_IS_BETTER = ("loss",)


class Selection:
    """Follows one metric from evaluation to evaluation.

    Args:
        metric: "loss" or a score.
        patience: evaluations without a better value after which training may stop; None: never.
        question: what else says which number an evaluation gives (how much is evaluated), as JSON types; values of
            other questions are not compared.
    """

    def __init__(
        self, metric: str = "loss", *, patience: int | None = None, question: dict[str, Any] | None = None
    ) -> None:
        self.metric, self._patience = metric, patience
        self._question = question or {}
        self.best: Evaluation | None = None
        self.best_step: int | None = None
        self.num_since = 0
        """Evaluations since the best one."""

    def add(self, evaluation: Evaluation, step: int) -> bool:
        """Whether this evaluation is the best so far: of equal values that with less loss, of equal losses the first;
        NaN never. Raises ValueError if it does not have the metric."""
        rank = self._rank(evaluation)
        is_better = all(map(math.isfinite, rank)) and (self.best is None or rank > self._rank(self.best))
        if is_better:
            self.best, self.best_step, self.num_since = evaluation, step, 0
        else:
            self.num_since += 1
        return is_better

    def _rank(self, evaluation: Evaluation) -> tuple[float, float]:
        """Greater is better."""
        value = evaluation.metric(self.metric)
        return (-value if self.metric in LESS_IS_BETTER else value), -evaluation.loss

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self.num_since >= self._patience

    def describe_best(self) -> str:
        """In a few words, for people."""
        if self.best is None:
            return f"no finite {self.metric} so far"
        return f"best {self.metric} {self.best.metric(self.metric):.4f} at step {self.best_step}"

    def state_dict(self) -> dict[str, Any]:
        """JSON types."""
        best = None if self.best is None else asdict(self.best)
        return {
            "metric": self.metric,
            "question": self._question,
            "best": best,
            "best_step": self.best_step,
            "num_since": self.num_since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Goes on from `state`; from nothing where that followed another metric, or another question. Returns in what
        they differ, for people; empty where they do not."""
        asked = {"metric": state["metric"]} | state.get("question", self._question)
        now = {"metric": self.metric} | self._question
        changed = [
            f"eval.{name} was {asked.get(name)} and is {now.get(name)}"
            for name in sorted(asked.keys() | now.keys())
            if asked.get(name) != now.get(name)
        ]
        if changed:
            return changed
        self.best = None if state["best"] is None else Evaluation(**state["best"])
        self.best_step, self.num_since = state["best_step"], int(state["num_since"])
        return []
