"""REPORT.md, results.json and a plot of a comparison on GLUE (see glue.py)."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from compare_run import packages, write_whole
from fit import machine
from glue_run import FOLDERS, METHODS, RATE_OF_HEAD

from loqt_ds.data.glue import TASKS

Result = dict[str, Any]
LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA (PEFT)",
    "loqt": "LoQT, merging",
    "nomerge": "LoQT, no merge",
}
NAMES = {"matthews": "Matthews", "accuracy": "accuracy", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman"}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds, times 100."""
    if not values:
        return "–"
    text = f"{100 * mean(values):.{digits}f}"
    return f"{text} ± {100 * stdev(values):.{digits}f}" if len(values) > 1 else text


def of(results: Sequence[Result], task: str, method: str, score: str = "glue") -> list[float]:
    """By seed."""
    chosen = [r for r in results if r["spec"]["task"] == task and r["spec"]["method"] == method]
    return [r["final"][score] for r in sorted(chosen, key=lambda r: r["spec"]["seed"])]


def averages(results: Sequence[Result], tasks: Sequence[str], method: str) -> list[float]:
    """Over the tasks, of each seed that all of them have."""
    columns = [of(results, task, method) for task in tasks]
    complete = min(map(len, columns))
    return [mean(column[seed] for column in columns) for seed in range(complete)]


def present(results: Sequence[Result], key: str, order: Sequence[str]) -> list[str]:
    found = {result["spec"][key] for result in results}
    return [name for name in order if name in found]


def main_table(results: Sequence[Result]) -> list[str]:
    tasks, methods = present(results, "task", list(FOLDERS)), present(results, "method", METHODS)
    lines = ["| | trained parameters | " + " | ".join(FOLDERS[task] for task in tasks) + " | average |"]
    lines.append("|---|---|" + "---|" * (len(tasks) + 1))
    for method in methods:
        trained = max(r["trained_parameters"] for r in results if r["spec"]["method"] == method)
        cells = [spread(of(results, task, method)) for task in tasks]
        lines.append(
            f"| {LABELS[method]} | {trained:,} | {' | '.join(cells)} | {spread(averages(results, tasks, method))} |"
        )
    return lines


def score_table(results: Sequence[Result]) -> list[str]:
    """Each metric alone, where a task has two, and the held-out loss."""
    lines = ["| task | method | " + "scores | held-out loss | loss of who reads nothing | seconds a run |"]
    lines.append("|---|---|---|---|---|---|")
    for task in present(results, "task", list(FOLDERS)):
        for method in present(results, "method", METHODS):
            runs = [r for r in results if r["spec"]["task"] == task and r["spec"]["method"] == method]
            if not runs:
                continue
            scores = ", ".join(f"{NAMES[m]} {spread(of(results, task, method, m))}" for m in TASKS[task].metrics)
            loss = f"{mean(r['final']['loss'] for r in runs):.3f}"
            blind, seconds = f"{runs[0]['blind_loss']:.3f}", f"{mean(r['seconds'] for r in runs):.0f}"
            lines.append(f"| {FOLDERS[task]} | {LABELS[method]} | {scores} | {loss} | {blind} | {seconds} |")
    return lines


def search_table(searched: Sequence[Result]) -> list[str]:
    tasks = present(searched, "task", list(FOLDERS))
    lines = ["| method | rate | " + " | ".join(FOLDERS[task] for task in tasks) + " | average |"]
    lines.append("|---|---|" + "---|" * (len(tasks) + 1))
    for method in present(searched, "method", METHODS):
        for lr in sorted({r["spec"]["lr"] for r in searched if r["spec"]["method"] == method}):
            here = [r for r in searched if r["spec"]["lr"] == lr]
            cells = [spread(of(here, task, method)) for task in tasks]
            lines.append(
                f"| {LABELS[method]} | {lr:.2g} | {' | '.join(cells)} | {spread(averages(here, tasks, method))} |"
            )
    return lines


def pretraining(base: Path) -> str:
    """What is known of the encoder."""
    config = json.loads((base / "config.json").read_text())
    text = f"{config['model_type']}, width {config['hidden_size']}, {config['num_hidden_layers']} layers"
    metrics = base.parent / "metrics.jsonl"
    if metrics.is_file():
        events = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
        evaluations = [event for event in events if event.get("event") == "eval"]
        data: dict[str, Any] = next((event for event in events if event.get("event") == "data"), {})
        if evaluations and data:
            last = evaluations[-1]
            text += (
                f", pretrained here by masked language modelling with LoQT, {last['step']} steps: held-out loss "
                f"{last['loss']:.3f} nats a hidden token (token frequencies alone {data['unigram_loss']:.3f})"
            )
    return text


def draw(results: Sequence[Result], file: Path) -> None:
    """A group of bars a task, a bar a method, a point a seed. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks, methods = present(results, "task", list(FOLDERS)), present(results, "method", METHODS)
    figure, ax = pyplot.subplots(figsize=(2 + 1.6 * len(tasks), 3.6), layout="constrained")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        places = [index + (number - (len(methods) - 1) / 2) * width for index in range(len(tasks))]
        scores = [[100 * score for score in of(results, task, method)] for task in tasks]
        ax.bar(places, [mean(each) if each else 0.0 for each in scores], 0.9 * width, label=LABELS[method], alpha=0.75)
        for place, each in zip(places, scores, strict=True):
            ax.plot([place] * len(each), each, "k.", markersize=3)
    ax.set_xticks(range(len(tasks)), [FOLDERS[task] for task in tasks])
    ax.set_ylabel("GLUE score x 100")
    ax.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def write(results: Sequence[Result], searched: Sequence[Result], base: Path, output: Path) -> Path:
    """Writes the report; the path of REPORT.md."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(
        output / "results.json", {"results": list(results), "searched": list(searched), "base": pretraining(base)}
    )
    plotted = ["", "![scores](scores.png)"]
    try:
        draw(results, output / "scores.png")
    except ImportError as error:
        plotted = ["", f"No plot: {error}."]
    first = results[0]["spec"]
    seeds = sorted({r["spec"]["seed"] for r in results})
    count_noun = "seeds" if len(seeds) > 1 else "seed"
    rates = {r["spec"]["method"]: r["spec"]["lr"] for r in results}
    steps = {r["spec"]["task"]: r["spec"]["steps"] for r in results}
    lines = [
        "# GLUE with a small encoder",
        "",
        f"Written by `tools/glue.py`. The encoder: {pretraining(base)}. It is far smaller, and has read far less, than "
        "what is usually fine-tuned: the table compares methods with each other, not with published numbers.",
        "",
        "GLUE's score of each task (the mean of its metrics) x 100 on its held-out set after the last step, mean ± "
        f"standard deviation over {len(seeds)} {count_noun}. Rank {first['rank']}; LoQT in NF4, alpha 2, merging every "
        f"{first['interval']} steps or never; its first step only finds P, so that B gets one update less. "
        f"Rows of {first['rows']} examples, at most {first['length']} tokens each; "
        "steps: "
        + ", ".join(f"{FOLDERS[task]} {count}" for task, count in steps.items())
        + ". Peak rates: "
        + ", ".join(f"{LABELS[method]} {lr:.2g}" for method, lr in rates.items())
        + f"; of the classifier {RATE_OF_HEAD:.2g} in all.",
        "",
        *main_table(results),
        *plotted,
        "",
        "## Each score",
        "",
        "The loss of who reads nothing is that of the classes' frequencies, or of the mean number, in the training "
        "examples. A Matthews correlation of 0 is that of one answer to everything.",
        "",
        *score_table(results),
    ]
    if searched:
        lines += [
            "",
            "## Search of rates",
            "",
            "On a seed that is not in the table above.",
            "",
            *search_table(searched),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in packages().items())
    where = machine(torch.device("cpu"))
    lines += ["", f"Python {platform.python_version()}; {versions}.", "", f"Machine: `{json.dumps(where)}`.", ""]
    file = output / "REPORT.md"
    file.write_text("\n".join(lines))
    return file
