"""Tables of what `tools/compare.py` has trained: REPORT.md and results.json; `compare_plots.py` draws.

Everything is computed from the rows of a plan and the results of its runs, so that it can be written at any time. Means
and standard deviations are over seeds; ratios are of runs with the same seed, data and shape.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from compare_suites import PAPER, Plan, Result, Row
from rivals import parse

BASE = "adamw"
MB = 1e6
GIB = 2**30
DASH = "–"
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "galore-torch", "q-galore-torch", "apollo-torch")
PAPERS_GAP = "the paper: compensation closes 72 % of the gap, both 93 %"  # of the perplexity's, 130M on C4


# ---------------------------------------------------------------- numbers


@dataclass
class Line:
    """The runs of one method or variant at one shape on one data set. runs: by seed, those that are over."""

    part: str
    group: str
    label: str
    contender: str
    shape: str
    data: str
    num_seeds: int = 0
    runs: dict[int, Result] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def done(self) -> dict[int, Result]:
        return {seed: result for seed, result in sorted(self.runs.items()) if result["status"] == "done"}

    def values(self, get: Callable[[Result], float]) -> dict[int, float]:
        """By seed, of the runs that trained to the end."""
        return {seed: get(result) for seed, result in self.done.items()}

    @property
    def measured(self) -> list[Result]:
        """Runs that took steps: those that diverged as well."""
        return [result for _, result in sorted(self.runs.items()) if result["status"] != "failed"]


def lines(rows: Sequence[Row], results: Mapping[str, Result], part: str) -> list[Line]:
    """The rows of a part, one line for all seeds, in the order of the plan."""
    found: dict[tuple[str, ...], Line] = {}
    for row in rows:
        if row.part != part:
            continue
        where = (row.group, row.label, row.shape, row.data, "" if part != "search" else f"{row.factor:g}")
        made = Line(part, row.group, row.label, row.contender, row.shape, row.data)
        line = found.setdefault(where, made)
        line.num_seeds += 1
        line.rows.append(row)
        if (result := results.get(row.key or "")) is not None:
            line.runs[row.seed] = result
    return list(found.values())


def base_of(every: Sequence[Line], line: Line, contender: str) -> Line | None:
    """The line of another contender at the same shape on the same data."""
    same = [other for other in every if (other.shape, other.data) == (line.shape, line.data)]
    return next((other for other in same if other.contender == contender and other.part != "search"), None)


def perplexity(result: Result) -> float:
    return float(result["final"]["perplexity"])


def speed(result: Result) -> float:
    return float(result["tokens_per_second"])


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation of the sample); None for the latter of one value."""
    return mean(values), stdev(values) if len(values) > 1 else None


def ratios(line: Line, base: Line | None, get: Callable[[Result], float]) -> dict[int, float]:
    """A line's values over the base's of the same seed."""
    if base is None:
        return {}
    own, others = line.values(get), base.values(get)
    return {seed: own[seed] / others[seed] for seed in own if seed in others}


def peak_bytes(result: Result) -> float:
    """What the process needed at most, above what it had before there was a model."""
    return float(GIB * (result["peak_memory_gib"] - result["memory_before_model_gib"]))


def components(result: Result) -> dict[str, float]:
    """Bytes: weights, gradients and optimizer states as counted, and the rest of the measured peak."""
    found = {name: float(result["bytes"][name]) for name in ("weights", "gradients", "states")}
    return found | {"the rest of the peak": max(0.0, peak_bytes(result) - sum(found.values()))}


# ---------------------------------------------------------------- words


def plus_minus(values: Sequence[float], digits: int) -> str:
    if not values:
        return DASH
    middle, deviation = spread(values)
    return f"{middle:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def trouble(line: Line) -> str:
    """What went wrong or is missing; empty where all seeds trained to the end."""
    seeds: dict[str, list[str]] = {}
    for seed, result in sorted(line.runs.items()):
        if result["status"] == "diverged":
            text = f"**diverged** at step {result['num_steps']} of {result['spec']['steps']}"
            seeds.setdefault(text, []).append(str(seed))
        elif result["status"] == "failed":
            seeds.setdefault(f"**failed**: {clean(result['error'])}", []).append(str(seed))
    told = [f"{text} (seed {', '.join(of)})" for text, of in seeds.items()]
    missing = line.num_seeds - len(line.runs)
    if missing:
        told.append("not run yet" if missing == line.num_seeds else f"{missing} of {line.num_seeds} seeds not run yet")
    return "; ".join(told)


def clean(text: str) -> str:
    """Of one line, and without what ends a cell of a table."""
    return " ".join(text.split()).replace("|", "/")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)] + [""]


HEAD = (
    "method",
    "perplexity",
    "/ AdamW",
    "family's definition",
    "rates",
    "trained parameters",
    "weights / gradients / states, MB",
    "peak, MB",
    "tokens/s",
    "/ AdamW's",
    "re-initializations",
    "remarks",
)


def method_cells(line: Line, every: Sequence[Line]) -> list[str]:
    """A line of the main table."""
    base = base_of(every, line, BASE) if line.label != BASE else None
    some = line.measured
    if not some:
        return [line.label, *[DASH] * (len(HEAD) - 2), trouble(line)]
    done = list(line.done.values())
    biased = [float(result["final"]["biased_perplexity"]) for result in done]
    batches = sorted({result["final"]["num_batches"] for result in done})
    sizes = " / ".join(f"{some[0]['bytes'][name] / MB:,.1f}" for name in ("weights", "gradients", "states"))
    spec = some[0]["spec"]
    return [
        line.label,
        plus_minus([perplexity(result) for result in done], 2),
        plus_minus(list(ratios(line, base, perplexity).values()), 3),
        DASH if not done else f"{mean(biased):.2f} (n = {', '.join(map(str, batches))})",
        f"{spec['lr']:g}, {spec['lr_full_rank']:g}",
        f"{some[0]['trained_parameters']:,}",
        sizes,
        f"{max(map(peak_bytes, some)) / MB:,.0f}",
        f"{mean(map(speed, some)):,.0f}",
        plus_minus(list(ratios(line, base, speed).values()), 2),
        reinit_cell(some),
        trouble(line),
    ]


def reinit_cell(results: Sequence[Result]) -> str:
    """How many, their seconds and the share of all: of those that measure them."""
    if not any(result["num_refreshes"] for result in results):
        return DASH
    number = mean(result["num_refreshes"] for result in results)
    seconds = mean(result["refresh_seconds"] for result in results)
    share = mean(result["refresh_seconds"] / result["seconds"] for result in results)
    return f"{number:.0f}: {seconds:.1f} s ({100 * share:.1f} %)"


def method_tables(every: Sequence[Line]) -> list[str]:
    told = []
    found = [line for line in every if line.part == "method"]
    for shape, data in dict.fromkeys((line.shape, line.data) for line in found):
        here = [line for line in found if (line.shape, line.data) == (shape, data)]
        told += [f"## {Path(shape).stem} on {data}", ""]
        body = [method_cells(line, every) for line in here]
        # a method that no rate of the search could train is on the first data set alone
        labels = dict.fromkeys(line.label for line in found if line.shape == shape)
        for label in (label for label in labels if label not in {line.label for line in here}):
            remark = f"not run: no rate trained it on {found[0].data}"
            body.append([label, *[DASH] * (len(HEAD) - 2), remark])
        told += table(HEAD, body)
    return told


def search_tables(rows: Sequence[Row], every: Sequence[Line]) -> list[str]:
    """Every rate that was tried, and which was taken."""
    found = [line for line in every if line.part == "search"]
    if not found:
        return []
    told = ["## The search of the learning rate", "", SEARCH, ""]
    for shape in dict.fromkeys(line.shape for line in found):
        here = [line for line in found if line.shape == shape]
        factors = sorted({row.factor for line in here for row in line.rows if row.factor is not None})
        body = []
        for label in dict.fromkeys(line.label for line in here):
            taken = next((row.factor for row in rows if is_method(row, label, shape)), None)
            cells = [search_cell(line, taken) for line in sorted_by_factor(here, label)]
            at_edge = taken in (factors[0], factors[-1]) and len(factors) > 1
            body.append([label, *cells, "the best is at the edge of the grid" if at_edge else ""])
        head = [f"{Path(shape).stem} on {here[0].data}", *(f"x {factor:g}" for factor in factors), ""]
        told += table(head, body)
    return told


def is_method(row: Row, label: str, shape: str) -> bool:
    return (row.part, row.label, row.shape) == ("method", label, shape)


def sorted_by_factor(found: Sequence[Line], label: str) -> list[Line]:
    return sorted((line for line in found if line.label == label), key=lambda line: line.rows[0].factor or 0.0)


def search_cell(line: Line, taken: float | None) -> str:
    row = line.rows[0]
    result = line.runs.get(row.seed)
    if result is None:
        return "not run yet"
    told = f"{perplexity(result):.2f}" if result["status"] == "done" else result["status"]
    rates = f"{result['spec']['lr']:g}, {result['spec']['lr_full_rank']:g}"
    return f"**{told}** ({rates})" if taken == row.factor and result["status"] == "done" else f"{told} ({rates})"


def variant_tables(every: Sequence[Line]) -> list[str]:
    """One table for each group: the variants beside LoQT as shipped."""
    found = [line for line in every if line.part == "variant"]
    if not found:
        return []
    told = ["## Variants of LoQT", "", VARIANTS, ""]
    for group in dict.fromkeys(line.group for line in found):
        here = [line for line in found if line.group == group]
        told += [f"### {group}", ""]
        told += table(VARIANT_HEAD, [variant_cells(line, every) for line in here])
        if group == PAPER:
            told += paper_gap(here)
    return told + overview(found, every)


def overview(found: Sequence[Line], every: Sequence[Line]) -> list[str]:
    """All variants, best first by the mean ratio to LoQT as shipped over data sets and seeds."""
    entries: dict[tuple[str, str], dict[str, list[float]]] = {}
    for line in found:
        against = list(ratios(line, shipped_line(every, line), perplexity).values())
        if against and not is_shipped_line(line, every):
            entries.setdefault((line.group, line.label), {}).setdefault(line.data, []).extend(against)
    if not entries:
        return []
    names = list(dict.fromkeys(line.data for line in found))

    def total(values: Iterable[Sequence[float]]) -> list[float]:
        return [ratio for part in values for ratio in part]

    body = []
    for (group, label), of in sorted(entries.items(), key=lambda entry: mean(total(entry[1].values()))):
        together = total(of.values())
        wins = f"{sum(ratio < 1 for ratio in together)} of {len(together)}"
        cells = [plus_minus(of.get(name, []), 4) for name in names]
        body.append([f"{group}: {label}", *cells, f"{mean(together):.4f}", wins])
    return ["### All variants, best first", "", *table(("/ LoQT as shipped", *names, "mean", "better than it"), body)]


VARIANT_HEAD = ("", "on", "perplexity", "/ LoQT as shipped", "better than it", "/ AdamW", "remarks")


def shipped_line(every: Sequence[Line], line: Line) -> Line | None:
    """The suite's LoQT without options, at a line's shape and on its data."""
    same = [other for other in every if (other.shape, other.data) == (line.shape, line.data)]
    ours = [other for other in same if other.part == "method" and parse(other.contender)[0] == "loqt"]
    return next((other for other in ours if "+" not in other.contender), None)


def is_shipped_line(line: Line, every: Sequence[Line]) -> bool:
    """Whether a variant is LoQT as shipped."""
    shipped = shipped_line(every, line)
    return shipped is not None and shipped.contender == line.contender and not line.rows[0].changes


def variant_cells(line: Line, every: Sequence[Line]) -> list[str]:
    against = ratios(line, shipped_line(every, line), perplexity)
    is_same = is_shipped_line(line, every)
    wins = f"{sum(ratio < 1 for ratio in against.values())} of {len(against)}"
    return [
        f"{line.label} (shipped)" if is_same and "shipped" not in line.label else line.label,
        f"{line.data}, {Path(line.shape).stem}",
        plus_minus(list(line.values(perplexity).values()), 2),
        DASH if is_same else plus_minus(list(against.values()), 4),
        DASH if is_same or not against else wins,
        plus_minus(list(ratios(line, base_of(every, line, BASE), perplexity).values()), 3),
        trouble(line),
    ]


def paper_gap(found: Sequence[Line]) -> list[str]:
    """How much of the gap between neither idea and no quantization each closes, by data set."""
    told = []
    for data in dict.fromkeys(line.data for line in found):
        means = {
            line.label: mean(line.values(perplexity).values()) for line in found if line.data == data and line.done
        }
        closed = gap_closed(means)
        if closed:
            shares = ", ".join(f"{label} {100 * share:.0f} %" for label, share in closed.items())
            told += [f"Of the gap to no quantization on {data}: {shares} ({PAPERS_GAP}).", ""]
    return told


def gap_closed(means: Mapping[str, float]) -> dict[str, float]:
    """Share of (neither - no quantization) that each of the others closes; empty where there is no such gap."""
    if not {"neither", "no quantization"} <= means.keys() or means["neither"] <= means["no quantization"]:
        return {}
    gap = means["neither"] - means["no quantization"]
    others = {label: value for label, value in means.items() if label not in ("neither", "no quantization")}
    return {label: (means["neither"] - value) / gap for label, value in others.items()}


def memory_table(every: Sequence[Line]) -> list[str]:
    found = [line for line in every if line.part == "memory" and line.runs]
    if not found:
        return []
    spec = next(iter(found[0].runs.values()))["spec"]
    told = [f"## Components of memory: {Path(spec['shape']).stem}, {spec['rows']} x {spec['length']} tokens", ""]
    body = []
    for line in found:
        some = line.measured
        sizes = [f"{value / MB:,.1f}" for value in components(some[0]).values()] if some else [DASH] * 4
        body.append([line.label, *sizes, f"{peak_bytes(some[0]) / MB:,.0f}" if some else DASH, trouble(line)])
    return [
        *told,
        *table(("", "weights, MB", "gradients", "optimizer states", "the rest of the peak", "peak", ""), body),
    ]


def data_table(rows: Sequence[Row], results: Mapping[str, Result]) -> list[str]:
    """What was read."""
    body: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        result = results.get(row.key or "")
        if result is None or "data" not in result or row.part == "memory":
            continue
        said, spec = result["data"], result["spec"]
        tokens = spec["steps"] * spec["rows"] * spec["length"]
        epochs = DASH if not said["num_tokens"] else f"{tokens / said['num_tokens']:.2f}"
        unigram = math.exp(said["unigram_loss"])
        numbers = (said["num_documents"], said["num_tokens"], tokens)
        held_out = (said["num_validation_documents"], said["num_validation_tokens"])
        cells = [DASH if number is None else f"{number:,}" for number in (*numbers, *held_out)]
        body.setdefault((row.data, row.shape), [row.data, *cells[:3], epochs, *cells[3:], f"{unigram:.1f}"])
    head = ("data", "documents", "tokens", "trained on", "epochs", "held-out documents", "tokens", "frequencies alone")
    unique = list(dict.fromkeys(tuple(cells) for cells in body.values()))
    return ["## Data", "", *table(head, unique)] if body else []


def trouble_list(every: Sequence[Line]) -> list[str]:
    """Everything that failed or diverged, and what runs noted, in full."""
    told = []
    for line in every:
        for seed, result in sorted(line.runs.items()):
            where = f"- {line.group + ': ' if line.group else ''}{line.label} on {line.data}, seed {seed}"
            if result["status"] == "failed":
                told.append(f"{where}: failed: {clean(result['error'])}")
            elif result["status"] == "diverged":
                told.append(f"{where}: diverged at step {result['num_steps']} of {result['spec']['steps']}")
            if result.get("notes"):
                told.append(f"{where}: {len(result['notes'])} notes (50 at most are kept): {clean(result['notes'][0])}")
    return ["## What failed, diverged, or was noted", "", *dict.fromkeys(told), ""] if told else []


READING = """\
- *Perplexity*: exp(summed negative log-likelihood / predicted tokens) over whole held-out documents, joined and cut to
  rows; all methods see the same rows in the same order at equal seed. ± is the standard deviation over seeds.
- */ AdamW*: over full-rank AdamW's with the same seed and data.
- *Family's definition*: the evaluators of the repositories that LoQT, GaLore and ReLoRA share divide the summed loss by
  one batch too many; with n batches they report the perplexity to the power n / (n + 1). It depends on n, and is here
  to be laid next to published tables only.
- *Rates*: peak learning rates of the adapted matrices (or what takes their place), and of embeddings, norms and head,
  which all methods train in full.
- Bytes are of tensors: gradients when the backward is over, states with the optimizer's masters. *Peak* is what the
  process needed above what it had before there was a model, evaluation included: on a CPU resident, on CUDA allocated.
- *Tokens/s* is of steps alone, re-initializations included; runs share the machine as said above.
- *Re-initializations*: how many steps had one, their seconds and share of the run: LoQT's re-initializations, new
  projections of GaLore, Q-GaLore and APOLLO, restarts of ReLoRA.
- *Diverged*: a loss that is not finite, or 3 nats above the untrained model's. Its curve ends with a cross."""

SEARCH = """\
The same number of runs for every method: with seed 0, factors on both of its stored rates. Held-out perplexity at the
end (rates); the lowest, in bold, is taken for all seeds and data sets, and is the same run as that of seed 0."""

VARIANTS = """\
Each differs from LoQT as shipped in what its table says. Ratios are of the same seed and data; below 1 is better."""


# ---------------------------------------------------------------- all


def packages() -> dict[str, str]:
    """Versions of what is compared, where it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machines(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    found = [result["machine"] for result in results.values() if "machine" in result]
    return [json.loads(text) for text in dict.fromkeys(json.dumps(machine, sort_keys=True) for machine in found)]


def introduction(plan: Plan, results: Mapping[str, Result], command: Sequence[str]) -> list[str]:
    suite = plan.suite
    said = shlex.join(["python", "tools/compare.py", *(part for part in command if part != "--report")])
    rows = plan.rows(results)
    spec = next(row.spec for row in rows if row.spec is not None and row.part != "memory")
    shapes = ", ".join(Path(shape).stem + f" (rank {rank})" for shape, rank in suite.scales)
    names = {row.key for row in rows}
    over = len(names & results.keys())
    told = [
        f"# Every method side by side: suite {suite.name}",
        "",
        f"    {said}",
        "",
        f"{shapes}; {spec.steps:,} steps of {spec.rows} x {spec.length} tokens, {spec.dtype} on {spec.device}; "
        f"{suite.seeds} seed{'s' if suite.seeds > 1 else ''}; re-initializations every {spec.interval} steps or, with "
        f"growing gaps, {spec.interval} + int({spec.growth:g}^k); cosine from the peak to a tenth after a warm-up over "
        f"a tenth; gradients clipped to norm {spec.max_grad_norm:g}.",
        "",
        f"{over} of {len(names)} runs are over."
        + (f" {suite.jobs} at a time, so that tokens/s are of a machine that is shared by {suite.jobs}; each had the"
           " threads told below." if suite.jobs > 1 else " One at a time."),
    ]  # fmt: skip
    for machine in machines(results):
        told.append(
            f"Machine: {machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''} a run; "
            f"Python {machine['python']}, torch {machine['torch']}; commit {machine['commit']}."
        )
    versions = ", ".join(f"{name} {number}" for name, number in packages().items())
    return [*told, "", f"Packages: {versions}.", ""]


def summary(every: Sequence[Line]) -> list[dict[str, Any]]:
    """The numbers of the tables."""
    found = []
    for line in every:
        base = base_of(every, line, BASE)
        found.append(
            {
                **{name: getattr(line, name) for name in ("part", "group", "label", "contender", "shape", "data")},
                "factor": line.rows[0].factor,
                "status": {seed: result["status"] for seed, result in sorted(line.runs.items())},
                "perplexity": line.values(perplexity),
                "perplexity_over_adamw": ratios(line, base, perplexity),
                "runs": [row.key for row in line.rows],
            }
        )
    return found


def write(plan: Plan, results: Mapping[str, Result], output: Path, *, command: Sequence[str]) -> None:
    """REPORT.md, results.json (every run without the losses of its steps) and, where matplotlib is there, plots."""
    output.mkdir(parents=True, exist_ok=True)
    rows = plan.rows(results)
    every = [line for part in ("method", "search", "variant", "memory") for line in lines(rows, results, part)]
    names = [row.key for row in rows if row.key in results]
    content = {
        "suite": plan.suite.name,
        "command": ["python", "tools/compare.py", *command],
        "packages": packages(),
        "machines": machines(results),
        "summary": summary(every),
        "runs": {name: results[name] for name in dict.fromkeys(names) if name is not None},
    }
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    pictures: list[str] = []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no plots (pip install -e '.[plot]')")
    else:
        import compare_plots

        pictures = compare_plots.draw(every, output)
    told = introduction(plan, results, command) + method_tables(every)
    for name in pictures:
        told += [f"![{name}]({name}.png)", ""]
    told += search_tables(rows, every) + variant_tables(every) + memory_table(every)
    told += data_table(rows, results) + trouble_list(every)
    (output / "REPORT.md").write_text("\n".join([*told, "## How to read this", "", READING, ""]))


def curve(result: Result) -> tuple[list[float], list[float]]:
    """(tokens, held-out perplexity) of a run's evaluations on the same held-out tokens: the last one, where it is on
    more of them than the others, is left out."""
    evaluations, final = result["curve"], result.get("final")
    if final is not None and final["loss"] == evaluations[-1][1] and len(evaluations) > 2:
        evaluations = evaluations if final["num_tokens"] <= result["spec"]["eval_tokens"] else evaluations[:-1]
    points = [(tokens, math.exp(min(loss, 700.0))) for tokens, loss in evaluations]
    return [tokens for tokens, _ in points], [value for _, value in points]


def end_of(result: Result) -> float:
    """Tokens that a run was trained on."""
    spec = result["spec"]
    return float(result["num_steps"] * spec["rows"] * spec["length"])
