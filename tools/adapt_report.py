"""Tables and plots of what `tools/adapt.py` has trained: REPORT.md and results.json."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from adapt_suites import label
from compare_lines import DASH, MB, Line, lines, plus_minus, table, trouble
from compare_report import finite, machines, package_line, packages, search_tables
from compare_suites import Plan, Result, settled

NO_TRAINING = "no training"
DENSE = "LoRA (dense base)"  # what differences are to


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def at(curve: Sequence[Sequence[Any]], tokens: float) -> float:
    """The loss of a curve at the last evaluation up to so many tokens; NaN where that is not finite."""
    found = [loss for seen, loss in curve if seen <= tokens][-1]
    return math.nan if found is None else float(found)


def halfway(result: Result) -> float:
    """Tokens, half of what a run was to see."""
    spec = result["spec"]
    return float(spec["rows"] * spec["length"] * spec["steps"] / 2)


def initialized(result: Result) -> float:
    """Held-out loss when the initialization was done: LoQT's is in its first step."""
    spec = result["spec"]
    after = spec["rows"] * spec["length"] if spec["method"].startswith("loqt") else 0
    return at(result["curve"], after)


def means(line: Line, get: Any, digits: int = 2, sign: str = "") -> str:
    """Over the seeds that trained to the end."""
    return plus_minus(list(line.values(get).values()), digits, sign)


def cost_cells(line: Line) -> list[str]:
    """Parameters that are trained, bytes, seconds, rates."""
    some = line.measured
    if not some:
        return [DASH] * 4
    spec, sizes = some[0]["spec"], some[0]["bytes"]
    rates = f"{spec['lr']:g}" + (f", {spec['lr_full_rank']:g}" if spec["full_rank"] else "")
    told = " / ".join(f"{sizes[name] / MB:,.1f}" for name in ("weights", "gradients", "states"))
    return [f"{some[0]['trained_parameters']:,}", told, f"{mean(run['seconds'] for run in some):,.0f}", rates]


COST_HEAD = ("trained parameters", "weights / gradients / states, MB", "seconds", "rates", "remarks")


# ---------------------------------------------------------------- continued pretraining


def continued_table(found: Sequence[Line], suite: str, of_model: Result) -> list[str]:
    """Perplexities of both languages; the base, untrained, first."""
    head = ("method", "Icelandic: before", "initialized", "halfway", "after", "English: after", "/ no training")
    before, forgot = of_model["also_final"]["perplexity"], of_model["final"]["perplexity"]
    body = [[NO_TRAINING, f"{before:.2f}", DASH, DASH, f"{before:.2f}", f"{forgot:.2f}", "1.00", *[DASH] * 4, ""]]
    for line in found:
        cells = [
            means(line, lambda run: perplexity(at(run["curve"], 0))),
            means(line, lambda run: perplexity(initialized(run))) if "loqt" in line.contender else DASH,
            means(line, lambda run: perplexity(at(run["curve"], halfway(run)))),
            means(line, lambda run: run["final"]["perplexity"]),
            means(line, lambda run: run["also_final"]["perplexity"]),
            means(line, lambda run: run["also_final"]["perplexity"] / forgot),
        ]
        body.append([label(suite, line.contender), *cells, *cost_cells(line), trouble(line)])
    return table((*head, *COST_HEAD), body)


# ---------------------------------------------------------------- without merging


def differences(line: Line, base: Line | None) -> list[float]:
    """Held-out losses at the end less the base's of the same seed, nats."""
    own, others = (of.values(lambda run: run["final"]["loss"]) if of is not None else {} for of in (line, base))
    return [own[seed] - others[seed] for seed in own if seed in others]


def nomerge_table(found: Sequence[Line], suite: str, of_model: Result) -> list[str]:
    head = (
        "method",
        "loss when initialized",
        "loss after",
        "perplexity after",
        "loss less LoRA's",
        "seconds to initialize",
    )
    dense = next((line for line in found if label(suite, line.contender) == DENSE), None)
    body = []
    if dense is not None and dense.measured:  # whose adapters add nothing at first
        loss = at(dense.measured[0]["curve"], 0)
        rest = [DASH, DASH, *[DASH] * 4, ""]
        body.append([NO_TRAINING + " (dense)", DASH, f"{loss:.4f}", f"{perplexity(loss):.2f}", *rest])
    for line in found:
        cells = [
            means(line, initialized, 4),
            means(line, lambda run: run["final"]["loss"], 4),
            means(line, lambda run: run["final"]["perplexity"]),
            plus_minus(differences(line, dense), 4, "+") if line is not dense else DASH,
            means(line, lambda run: run["seconds_to_build"] + run["refresh_seconds"], 1),
        ]
        body.append([label(suite, line.contender), *cells, *cost_cells(line), trouble(line)])
    return table((*head, *COST_HEAD), body)


TABLES = {"icelandic": continued_table, "nomerge": nomerge_table}

TITLES = {
    "icelandic": "Continued pretraining: from English to Icelandic",
    "nomerge": "Fine-tuning without merging: adapters alone over one quantized model, on GSM8K",
}

READING = {
    "icelandic": """\
- *Before*, *initialized* and *halfway* are on the first {eval_tokens:,} held-out tokens, *after* on the first
  {final_tokens:,}, as is all of *no training*. Before the first step LoQT is the base in NF4 (LoQT-nq: the base);
  *initialized* is after its first step, in which embeddings, norms and head are trained and P and B found.
- *English: after* is on the first {final_tokens:,} held-out tokens of what the base was pretrained on, and its ratio to
  the base's: what is forgotten. Nothing was done against forgetting: no English text is among what is trained on.
- All train embeddings, norms and head in full, at the second of the rates, with AdamW in 32 bits (GaLore: its own).
- Perplexities are of one tokenizer that was trained on as much text of both languages. ± is over seeds.""",
    "nomerge": """\
- Losses are of answers to questions of GSM8K, nats a token: of the first held-out examples, {final_tokens:,} predicted
  tokens. *When initialized* is before the first update: of LoQT after its first step, in which P and B are found, and
  nothing is trained. No answer is judged: a model of this size calculates none.
- Embeddings, norms and head are frozen: adapters alone are trained, of LoQT B alone, so that at equal rank it trains
  fewer parameters (at rank 12 about as many). All have AdamW in 32 bits.
- W of LoRA is dense, of all others NF4 in blocks of 64 (QLoRA's scales quantized once more, as its paper has it). Where
  LoftQ, LQ-LoRA, ApiQ and LoQT put what rounding loses is told in `tools/rivals_adapters.py`, `tools/rivals_initial.py`
  and `loqt_ds/core/compensation.py`.
- *Seconds to initialize* include building the model and, of LQ-LoRA and ApiQ, reading data; of LoQT its one
  re-initialization.
- ± is the standard deviation over seeds, which draw the order of the data, what adapters start from, and calibration.
  *Loss less LoRA's* is of equal seeds.""",
}


# ---------------------------------------------------------------- plots


def draw(found: Sequence[Line], every: Sequence[Line], suite: str, output: Path) -> tuple[list[str], dict[str, str]]:
    """(names of the plots that are drawn, why others are not)."""
    try:
        import compare_plots
        import matplotlib
    except ImportError as error:
        return [], {"all": f"matplotlib cannot be imported ({error}); pip install -e '.[plot]', and --report again"}
    matplotlib.use("Agg")
    drawn, lost = [], {}
    for line in every:  # the plots show labels
        line.label = label(suite, line.contender)
    for name in ("perplexity", "final", "search", "forgetting"):
        file = output / f"{name}.png"
        file.unlink(missing_ok=True)
        make = draw_forgetting if name == "forgetting" else compare_plots.draw_one
        try:
            if make(name, every, file):
                drawn.append(name)
        except Exception as error:  # the tables are worth more than any plot
            lost[name] = f"{type(error).__name__}: {error}"
    return drawn, lost


def draw_forgetting(_: str, every: Sequence[Line], file: Path) -> bool:
    """Both languages' perplexities, from evaluation to evaluation; whether there was something to draw."""
    from compare_plots import plain_ticks, style
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    shown = [line for line in every if line.part == "method" and any("also_curve" in run for run in line.done.values())]
    if not shown:
        return False
    figure, ax = pyplot.subplots(figsize=(7.5, 5.0), layout="constrained")
    for line in shown:
        run = next(iter(line.done.values()))
        points = [
            (perplexity(one), perplexity(other))
            for (_, one), (_, other) in zip(run["curve"], run["also_curve"], strict=True)
            if one is not None and other is not None
        ]
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=line.label, **style(line.label, shown))
    ax.set(xlabel="held-out perplexity, Icelandic", ylabel="held-out perplexity, English")
    ax.set_title("From the base, at the right, to the end of training", fontsize=10)
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        plain_ticks(axis)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))  # it spans several powers of ten
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=7)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return True


# ---------------------------------------------------------------- all


def introduction(plan: Plan, results: Mapping[str, Result], of_model: Result, command: Sequence[str]) -> list[str]:
    suite = plan.suite
    rows = plan.rows(results)
    spec, base = next(row.spec for row in rows if row.spec is not None), of_model["spec"]
    shape, rank = suite.scales[0]
    said = shlex.join(["python", "tools/adapt.py", *(part for part in command if part != "--report")])
    runs = plan.runs(rows)
    merges = ""
    if spec.full_rank:
        growth = next((row.spec.growth for row in rows if row.spec is not None and "loqt" in row.contender), None)
        gap = f"{spec.interval} steps" if growth is None else f"{spec.interval} + int({growth:g}^k) steps"
        merges = f"GaLore projects anew every {spec.interval} steps, LoQT, where it merges, after {gap}. "
    told = [
        f"# {TITLES[suite.name]}",
        "",
        f"    {said}",
        "",
        f"The base: {shape}, pretrained in full rank for {base['steps']:,} steps of {base['rows']} x {base['length']} "
        f"tokens; held-out perplexity {of_model['final']['perplexity']:.2f}. Then rank {rank}, {spec.steps:,} steps of "
        f"{spec.rows} x {spec.length} tokens, {spec.dtype} on {spec.device}, {suite.seeds} "
        f"seed{'s' if suite.seeds > 1 else ''}. {merges}Rates fall as a cosine to a tenth after a warm-up over "
        "a tenth.",
        "",
        f"{len(runs & results.keys())} of {len(runs)} runs are over.",
    ]
    for machine in machines(results):
        told.append(
            f"Machine: {machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''} a run; "
            f"Python {machine['python']}, torch {machine['torch']}; commit {machine['commit']}. Other programs ran "
            "beside these: seconds are no measurement."
        )
    return [*told, "", package_line([results[name] for name in sorted(runs & results.keys())]), ""]


def summary(found: Sequence[Line], suite: str) -> list[dict[str, Any]]:
    """The numbers of the table, by seed."""
    told = []
    for line in found:
        entry: dict[str, Any] = {"method": label(suite, line.contender), "contender": line.contender}
        entry["status"] = {seed: run["status"] for seed, run in sorted(line.runs.items())}
        entry["initialized_loss"] = line.values(initialized)
        entry["loss"] = line.values(lambda run: run["final"]["loss"])
        entry["perplexity"] = line.values(lambda run: run["final"]["perplexity"])
        entry["forgotten_perplexity"] = {
            seed: run["also_final"]["perplexity"] for seed, run in line.done.items() if run.get("also_final")
        }
        told.append(entry)
    return told


def write(plan: Plan, results: Mapping[str, Result], of_model: Result, output: Path, *, command: Sequence[str]) -> None:
    """REPORT.md, results.json (every run without the losses of its steps) and, where they can be drawn, plots.

    Args:
        of_model: the result of the run that made the base.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows, suite = plan.rows(results), plan.suite.name
    results = {name: settled(result) for name, result in results.items()}
    found = lines(rows, results, "method")
    every = [*found, *lines(rows, results, "search")]
    content = {
        "suite": suite,
        "command": ["python", "tools/adapt.py", *command],
        "packages": packages(results.values()),
        "machines": machines(results),
        "base": of_model,
        "summary": summary(found, suite),
        "runs": {row.key: results[row.key] for row in rows if row.key in results},
    }
    (output / "results.json").write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    told = introduction(plan, results, of_model, command) + TABLES[suite](found, suite, of_model)
    searched = search_tables(rows, every)
    pictures, lost = draw(found, every, suite, output)
    told += [text for name in pictures for text in (f"![{name}]({name}.png)", "")]
    told += [text for name, error in lost.items() for text in (f"**Not drawn**: {name}: {error}", "")]
    spec = next(row.spec for row in rows if row.spec is not None)
    reading = READING[suite].format(eval_tokens=spec.eval_tokens, final_tokens=spec.final_tokens)
    told += searched + ["## How to read this", "", reading, ""]
    (output / "REPORT.md").write_text("\n".join(told))
