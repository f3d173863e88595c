"""The eight tasks of GLUE (Wang et al., arXiv 1804.07461): their files, columns, classes and metrics.

Files are those of the benchmark's own archive (`train.tsv`, `dev.tsv`, for MNLI `dev_matched.tsv` and
`dev_mismatched.tsv`); on the Hugging Face hub the data set is `glue`, whose columns have other names. Classes are
numbered as there. What STS-B gives is a number from 0 to 5. Test sets have no labels and are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loqt_ds.data.errors import DataError
from loqt_ds.data.files import COMPRESSIONS

_ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class GlueTask:
    """text_fields, label_field: columns of the files. hub_fields: text columns on the hub, whose label is `label`.
    labels: the classes as the files call them; none: a number is predicted. metrics: what the task is judged by."""

    text_fields: tuple[str, ...]
    label_field: str
    hub_fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    header: bool = True
    parts: tuple[str, ...] = ("",)
    has_short_rows: bool = False

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the held-out files, and, after `validation` for `dev`, of the hub's splits."""
        return tuple(f"dev_{part}" if part else "dev" for part in self.parts)

    def file(self, directory: Path, name: str) -> Path:
        """The task's file `name`, compressed or not. Raises DataError where it is not there."""
        paths = [directory / f"{name}.tsv{ending}" for ending in ("", *COMPRESSIONS)]
        for path in paths:
            if path.is_file():
                return path
        raise DataError(
            f"data.path={directory}: there is no {name}.tsv in it (compressed or not), which data.glue_task reads; "
            f"give the task's directory of the GLUE archive"
        )


_PAIR = ("sentence1", "sentence2")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("3",), "1", ("sentence",), ("0", "1"), ("matthews",), header=False),
    "sst2": GlueTask(("sentence",), "label", ("sentence",), ("0", "1"), ("accuracy",)),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality", _PAIR, ("0", "1"), ("f1", "accuracy")),
    "stsb": GlueTask(_PAIR, "score", _PAIR, (), ("pearson", "spearman")),
    # Its archive has a few rows that a line break has cut in two.
    "qqp": GlueTask(
        ("question1", "question2"),
        "is_duplicate",
        ("question1", "question2"),
        ("0", "1"),
        ("f1", "accuracy"),
        has_short_rows=True,
    ),
    "mnli": GlueTask(
        _PAIR,
        "gold_label",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        parts=("matched", "mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), "label", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask(_PAIR, "label", _PAIR, _ENTAILMENT, ("accuracy",)),
}
