"""Training and validation loss of runs over tokens, re-initializations marked, as a PNG.

    python tools/plot_run.py runs/default-0001 --output curve.png

Several runs go into one picture. A directory needs a metrics.jsonl; the loss of token frequencies alone is drawn where
it is known: from --unigram-loss, from the metrics, or computed again from the data that config.yaml names.
Needs matplotlib: pip install -e '.[plot]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SMOOTHING = 0.8  # of the exponential mean that is drawn over the losses of single steps


@dataclass
class Curves:
    """What metrics.jsonl says of one run; a step that was logged twice (before and after a resume) counts once."""

    name: str
    train: dict[int, float] = field(default_factory=dict)  # step -> loss
    tokens: dict[int, float] = field(default_factory=lambda: {0: 0.0})  # step -> tokens so far
    validation: dict[int, float] = field(default_factory=dict)
    reinit: set[int] = field(default_factory=set)
    unigram_loss: float | None = None

    def tokens_at(self, steps: Sequence[int]) -> np.ndarray:
        """Tokens at each step; between logged steps by interpolation."""
        known = sorted(self.tokens)
        return np.interp(steps, known, [self.tokens[step] for step in known])


def read_curves(directory: Path) -> Curves:
    """Reads directory/metrics.jsonl. Raises ValueError if it is missing or holds no training step."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a run")
    curves = Curves(directory.name)
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # the run is being written, or was killed in the middle of its last line
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from error
        step = int(record.get("step", 0))
        if record.get("unigram_loss") is not None:
            curves.unigram_loss = float(record["unigram_loss"])
        match record.get("event"):
            case None:
                curves.train[step], curves.tokens[step] = float(record["loss"]), float(record["tokens"])
            case "eval":
                curves.validation[step] = float(record["loss"])
            case "reinit":
                curves.reinit.add(step)
    if not curves.train:
        raise ValueError(f"{path} holds no training step yet")
    return curves


def unigram_loss(directory: Path) -> float | None:
    """Loss of the validation tokens under the training tokens' frequencies, computed from the run's own data."""
    from loqt_ds.config import load_config
    from loqt_ds.data import build_data, load_or_train_tokenizer

    def quiet(_: str) -> None:
        return

    try:
        config = load_config(directory / "config.yaml")
        return float(build_data(config, load_or_train_tokenizer(config, quiet), say=quiet).summary["unigram_loss"])
    except (ValueError, OSError) as error:
        print(f"{directory}: no line for token frequencies, its data cannot be read: {error}", file=sys.stderr)
        return None


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean without the pull of its start; steps whose loss is not finite are passed over."""
    total, weight, result = 0.0, 0.0, np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if np.isfinite(value):
            total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        if weight:
            result[index] = total / weight
    return result


def draw(runs: Sequence[Curves], output: Path, *, title: str | None) -> None:
    """One picture of all runs."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plot_run needs matplotlib; install it with pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    largest = max(max(run.tokens.values()) for run in runs)
    unit, unit_name = next(((u, n) for u, n in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if largest >= u),
                           (1.0, ""))  # fmt: skip
    for number, run in enumerate(runs):
        color, prefix = f"C{number}", f"{run.name}: " if len(runs) > 1 else ""
        steps = sorted(run.train)
        x, losses = run.tokens_at(steps) / unit, np.array([run.train[step] for step in steps])
        axes.plot(x, losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(x, smooth(losses), color=color, linewidth=1.6, label=f"{prefix}training (mean of about 5 steps)")
        if run.validation:
            held_out = sorted(run.validation)
            where = run.tokens_at(held_out) / unit
            values = [run.validation[step] for step in held_out]
            label = f"{prefix}validation, last {values[-1]:.3f}"
            axes.plot(where, values, "o--", color="black" if len(runs) == 1 else color, markersize=5, label=label)
        for index, place in enumerate(run.tokens_at(sorted(run.reinit)) / unit):
            label = f"re-initializations ({len(run.reinit)})"
            axes.axvline(place, color="0.75", linewidth=0.9, zorder=0, label=None if number or index else label)
    known = [run.unigram_loss for run in runs if run.unigram_loss is not None]
    if known:
        axes.axhline(known[0], color="C3", linestyle=":", label=f"token frequencies alone, {known[0]:.3f}")
        if any(abs(a - b) > 1e-6 for a, b in pairwise(known)):
            print("the runs were evaluated on different data: the line is the first one's", file=sys.stderr)
    axes.set_xlabel(f"training tokens, {unit_name}".rstrip(", "))
    axes.set_ylabel("loss, nats per predicted token")
    axes.set_title(title or ", ".join(run.name for run in runs))
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.01)
    axes.legend(frameon=True, framealpha=0.9, loc="upper right")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.png")
    parser.add_argument("--title")
    parser.add_argument("--unigram-loss", type=float, help="nats per token; default: from the run")
    options = parser.parse_args(arguments)
    try:
        runs = [read_curves(directory) for directory in options.runs]
        for directory, run in zip(options.runs, runs, strict=True):
            if options.unigram_loss is not None:
                run.unigram_loss = options.unigram_loss
            elif run.unigram_loss is None:
                run.unigram_loss = unigram_loss(directory)
        draw(runs, options.output, title=options.title)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
