"""What does an option do to the loss? Its values side by side, on the same data, over several seeds.

    python tools/compare_option.py loqt.optimizer_state keep project reset --data ../shared/data --work /tmp/state
    python tools/compare_option.py optim.master fp32 bf16 train.dtype=bf16 --data ../shared/data --work /tmp/master

For every seed all values train on the same data in the same order from the same weights with the same schedule; only
the option differs. The first value is what the others are held against. Words with `=` are overrides of all runs. Runs
go to --work, and those that are there already are not repeated; numbers and a plot go to
benchmarks/results/<last part of the option's name>.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
NUM_STEPS_AROUND = 5  # the jump at a re-initialization: mean loss of that many steps after it less that before it

# The 9M shape on Wikipedia text that is never seen twice, with ten initializations.
OPTIONS = """
    model.shape=llama_9m model.vocab_size=auto loqt.rank=32 loqt.alpha=0.5 loqt.interval=25 loqt.growth=1.2
    data.tokenizer_vocab_size=4096 data.sequence_length=256 optim.name=adamw8bit optim.lr=0.01
    optim.lr_full_rank=0.003 train.max_steps=250 train.micro_batch_size=8 train.max_grad_norm=1.0 eval.every=0
    eval.max_tokens=131072 eval.num_samples=0 checkpoint.every=1000000 checkpoint.keep=1 export.format=none
    logging.tensorboard=false logging.progress=none
"""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no run."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def train(directory: Path, options: Sequence[str]) -> None:
    """One run in a process of its own, unless it has ended before."""
    if any(line.get("event") == "eval" for line in read_metrics(directory)):
        return
    # an empty recipe: everything that matters is on the command line
    recipe = directory.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text("name: compare_option\n")
    command = [sys.executable, "-m", "loqt_ds.train", "--config", str(recipe), f"output_dir={directory}", *options]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {finished.returncode}: {finished.stderr[-2000:]}")
    print(f"{directory.name} done", flush=True)


def measure(directory: Path) -> dict[str, float]:
    """Held-out loss at the end, mean training loss of the last 25 steps, and the mean jump at re-initializations."""
    lines = read_metrics(directory)
    losses = {line["step"]: float(line["loss"]) for line in lines if "event" not in line}
    # the first one only gives B its first P
    reinit = [line["step"] for line in lines if line.get("event") == "reinit"][1:]
    jumps = []
    for step in reinit:  # the update of `step` was made with the old P; step + 1 is the first with the new one
        before = [losses[s] for s in range(step - NUM_STEPS_AROUND + 1, step + 1)]
        after = [losses[s] for s in range(step + 1, step + 1 + NUM_STEPS_AROUND) if s in losses]
        if len(after) == NUM_STEPS_AROUND:
            jumps.append(statistics.mean(after) - statistics.mean(before))
    return {
        "validation_loss": next(float(line["loss"]) for line in reversed(lines) if line.get("event") == "eval"),
        "training_loss_last_25": statistics.mean([losses[step] for step in sorted(losses)[-25:]]),
        "mean_jump": statistics.mean(jumps),
        "num_reinits": len(reinit) + 1,
    }


def summarize(runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each value, and of its difference from the first at equal seed."""
    summary: dict[str, Any] = {}
    first = next(iter(runs.values()))
    for value, by_seed in runs.items():
        losses = [by_seed[seed]["validation_loss"] for seed in sorted(by_seed)]
        against = [by_seed[seed]["validation_loss"] - first[seed]["validation_loss"] for seed in sorted(by_seed)]
        summary[value] = {
            "validation_loss_mean": statistics.mean(losses),
            "validation_loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
            "minus_first_mean": statistics.mean(against),
            "minus_first_std": statistics.stdev(against) if len(against) > 1 else 0.0,
            "mean_jump": statistics.mean([run["mean_jump"] for run in by_seed.values()]),
            "training_loss_last_25": statistics.mean([run["training_loss_last_25"] for run in by_seed.values()]),
        }
    return summary


def plot(work: Path, values: Sequence[str], seeds: Sequence[int], output: Path) -> None:
    """Training loss of each value less that of the first, mean over seeds: the differences are small beside the
    curves."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    curves = {}
    for value in values:
        of_seeds = [read_metrics(work / f"{value}-{seed}") for seed in seeds]
        curves[value] = np.mean([[float(x["loss"]) for x in run if "event" not in x] for run in of_seeds], axis=0)
    first, *others = values
    steps = np.arange(1, len(curves[first]) + 1)
    window = np.ones(7) / 7
    for value in others:
        difference = np.convolve(curves[value] - curves[first], window, mode="valid")
        axes.plot(steps[3:-3], difference, label=f"{value} − {first} (mean of 7 steps, {len(seeds)} seeds)")
    for line in of_seeds[0]:
        if line.get("event") == "reinit":
            axes.axvline(line["step"], color="0.8", linewidth=0.9, zorder=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step (grey: re-initializations)", ylabel="difference of training loss, nats per token")
    axes.legend()
    figure.savefig(output, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option", help="such as loqt.optimizer_state")
    parser.add_argument("words", nargs="+", metavar="value", help="its values; words with = are overrides of all runs")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="where the runs go")
    parser.add_argument("--output", type=Path, help="where the results go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    options = parser.parse_intermixed_args(arguments)
    values = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if len(values) < 2:
        parser.error(f"{options.option}: give two values or more, got {' '.join(values) or 'none'}")
    wiki = options.data.resolve() / "en/enwiki2014"
    shared = [
        *OPTIONS.split(),
        f"data.path={wiki}/enwiki2014_train_00.jsonl.gz",
        f"data.validation_path={wiki}/enwiki2014_valid.jsonl.gz",
        *overrides,
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(
                train,
                options.work.resolve() / f"{value}-{seed}",
                [*shared, f"{options.option}={value}", f"train.seed={seed}"],
            )
            for seed in options.seeds
            for value in values
        ]
        for run in runs:
            run.result()
    measured = {v: {str(seed): measure(options.work / f"{v}-{seed}") for seed in options.seeds} for v in values}
    summary = summarize(measured)
    output = options.output or RESULTS / options.option.rpartition(".")[2]
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "option": options.option,
        "options": [*OPTIONS.split(), *overrides],
        "summary": summary,
        "runs": measured,
    }
    (output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(options.work, values, options.seeds, output / "plot.png")
    print(f"| {options.option} | held-out loss (± over seeds) | less {values[0]}'s, same seed | jump at a merge |")
    print("|---|---|---|---|")
    for value, row in summary.items():
        print(
            f"| {value} | {row['validation_loss_mean']:.4f} ± {row['validation_loss_std']:.4f} | "
            f"{row['minus_first_mean']:+.4f} ± {row['minus_first_std']:.4f} | {row['mean_jump']:+.4f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
