"""Tables of what `tools/compare.py` has trained: REPORT.md and results.json; `compare_plots.py` draws.

Everything is computed from the rows of a plan and the results of its runs, so that it can be written at any time
(`compare_lines.py` puts them together, `compare_variants.py` has the tables of LoQT's variants).
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from compare_lines import (
    BASE,
    DASH,
    MB,
    Line,
    base_of,
    clean,
    components,
    differences,
    lines,
    peak_bytes,
    perplexity,
    plus_minus,
    ratios,
    speed,
    table,
    trouble,
)
from compare_run import Spec
from compare_suites import Plan, Result, Row, settled
from compare_variants import shipped_line, variant_tables

# ---------------------------------------------------------------- methods

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


def memory_table(every: Sequence[Line]) -> list[str]:
    found = [line for line in every if line.part == "memory" and line.runs]
    if not found:
        return []
    spec = Spec.from_json(json.dumps(next(iter(found[0].runs.values()))["spec"]))
    shape = f"{Path(spec.shape).stem} with a vocabulary of {vocabulary(spec)}"
    told = [f"## Components of memory: {shape}, {spec.rows} x {spec.length} tokens", ""]
    body = []
    for line in found:
        some = line.measured
        sizes = [f"{value / MB:,.1f}" for value in components(some[0]).values()] if some else [DASH] * 4
        body.append([line.label, *sizes, f"{peak_bytes(some[0]) / MB:,.0f}" if some else DASH, trouble(line)])
    return [
        *told,
        *table(("", "weights, MB", "gradients", "optimizer states", "the rest of the peak", "peak", ""), body),
    ]


def vocabulary(spec: Spec) -> str:
    """Of the tokenizer that a run asks for."""
    given = dict(option.split("=", 1) for option in spec.data)
    return f"{int(given['data.tokenizer_vocab_size']):,}"


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


def reading(spec: Spec) -> str:
    """What the tables' words mean."""
    held_out = "whole held-out documents"
    if spec.final_tokens is not None:
        held_out = f"the first {spec.final_tokens:,} tokens of the held-out documents"
    return f"""\
- *Perplexity*: exp(summed negative log-likelihood / predicted tokens) over {held_out}, joined and
  cut to rows; all methods see the same rows in the same order at equal seed. ± is the standard deviation over seeds.
  Curves are on the first {spec.eval_tokens:,} held-out tokens.
- */ AdamW*: over full-rank AdamW's with the same seed and data.
- *Family's definition*: the evaluators of the repositories that LoQT, GaLore and ReLoRA share divide the summed loss by
  one batch too many; with n batches they report the perplexity to the power n / (n + 1). It depends on n, and is here
  to be laid next to published tables only.
- *Rates*: peak learning rates of the adapted matrices (or what takes their place), and of embeddings, norms and head,
  which all methods train in full.
- Bytes are of tensors: weights at the end, gradients and optimizer states (with their masters) at their largest; of
  ReLoRA after a start in full rank, weights and trained parameters are those with adapters. *Peak* is what the process
  needed above what it had before there was a model, evaluation included: on a CPU resident, on CUDA allocated. Of a run
  *in parts* it is the largest of all parts, and on a CPU reading back its state is in it.
- *Tokens/s* is of steps alone, re-initializations included; runs share the machine as said above.
- *Re-initializations*: how many steps had one, their seconds and share of the run: LoQT's re-initializations, new
  projections of GaLore, Q-GaLore and APOLLO, restarts of ReLoRA.
- *Diverged*: a loss that is not finite, or 3 nats above the untrained model's. Its curve ends with a cross."""


SEARCH = """\
The same number of runs for every method: with seed 0, factors on both of its stored rates. Held-out perplexity at the
end (rates); the lowest, in bold, is taken for all seeds and data sets, and is the same run as that of seed 0. So seed 0
on this data set is the best of these runs by the very held-out tokens that it is reported on, which flatters every
method a little; other seeds and data sets are free of that."""


BF16 = """\
In bf16 all methods hold precision equal: products are in bf16, and what is trained is kept in float32, with moments in
float32 or, of 8-bit optimizers, in 8 bits. LoQT does so as shipped, with bf16 weights and gradients and float32 masters
that count as states. The others have float32 weights and gradients and multiply under autocast (what runs between the
products, such as the residual stream, is float32 there too); weights that are frozen are bf16 or 4-bit ones, and
Q-GaLore's INT8 weights have no masters, which is its method. By themselves their packages would update bf16 weights
with moments in bf16, whose second ones hardly decay: that is not what is shown here."""


# ---------------------------------------------------------------- all


def packages(results: Iterable[Result]) -> dict[str, dict[str, int]]:
    """By package, the versions that runs had, each with how many runs."""
    found: dict[str, dict[str, int]] = {}
    for result in results:
        for name, version in result.get("packages", {}).items():
            counts = found.setdefault(name, {})
            counts[version] = counts.get(version, 0) + 1
    return found


def package_line(results: Sequence[Result]) -> str:
    told = []
    for name, counts in packages(results).items():
        versions = [f"{version} ({count} runs)" for version, count in counts.items()]
        told.append(f"{name} {next(iter(counts)) if len(counts) == 1 else ' and '.join(versions)}")
    silent = sum("packages" not in result for result in results)
    rest = f" {silent} of {len(results)} runs do not say theirs." if silent else ""
    return f"Packages of the runs: {', '.join(told) or 'not known'}.{rest}"


def machines(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    found = [result["machine"] for result in results.values() if "machine" in result]
    return [json.loads(text) for text in dict.fromkeys(json.dumps(machine, sort_keys=True) for machine in found)]


def introduction(plan: Plan, rows: Sequence[Row], results: Mapping[str, Result], command: Sequence[str]) -> list[str]:
    suite = plan.suite
    said = shlex.join(["python", "tools/compare.py", *(part for part in command if part != "--report")])
    spec, runs = first_spec(rows), plan.runs(rows)
    ours = next((row.spec for row in rows if row.spec is not None and row.contender.startswith("loqt")), spec)
    shapes = ", ".join(Path(shape).stem + f" (rank {rank})" for shape, rank in suite.scales)
    gaps = f"every {spec.interval} steps"
    if ours.growth is not None and ours is not spec:
        gaps += f", LoQT's after {spec.interval} + int({ours.growth:g}^k)"
    told = [
        f"# Every method side by side: suite {suite.name}",
        "",
        f"    {said}",
        "",
        f"{shapes}; {spec.steps:,} steps of {spec.rows} x {spec.length} tokens, {spec.dtype} on {spec.device}; "
        f"{suite.seeds} seed{'s' if suite.seeds > 1 else ''}; re-initializations {gaps}; cosine from the peak to a "
        f"tenth after a warm-up over a tenth; gradients clipped to norm {spec.max_grad_norm:g}; tokenizers of "
        f"{suite.vocabulary:,} pieces.",
        "",
    ]
    if spec.dtype == "bf16":
        told += [BF16, ""]
    told.append(
        f"{len(runs & results.keys())} of {len(runs)} runs are over."
        + (f" {suite.jobs} at a time, so that tokens/s are of a machine that is shared by {suite.jobs}; each had the"
           " threads told below." if suite.jobs > 1 else " One at a time.")
    )  # fmt: skip
    for machine in machines(results):
        told.append(
            f"Machine: {machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''} a run; "
            f"Python {machine['python']}, torch {machine['torch']}; commit {machine['commit']}."
        )
    return [*told, "", package_line([results[name] for name in sorted(runs & results.keys())]), ""]


def first_spec(rows: Sequence[Row]) -> Spec:
    """Of a run that is like the suite's others."""
    found = [row.spec for row in sorted(rows, key=lambda row: row.part == "memory") if row.spec is not None]
    return found[0]


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
                "loss_less_shipped": differences(line, shipped_line(every, line)),
                "runs": [row.key for row in line.rows],
            }
        )
    return found


def finite(value: Any) -> Any:
    """What JSON can hold: None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(every: Sequence[Line], output: Path) -> tuple[list[str], dict[str, str]]:
    """(names of the plots that are drawn, why others are not)."""
    try:
        import compare_plots

        return compare_plots.draw(every, output)
    except ImportError as error:
        return [], {"all": f"matplotlib cannot be imported ({error}); pip install -e '.[plot]', and --report again"}


def picture_lines(pictures: Sequence[str], lost: Mapping[str, str]) -> list[str]:
    told = [line for name in pictures for line in (f"![{name}]({name}.png)", "")]
    for name, error in lost.items():
        told += [f"**Not drawn**: {name}: {clean(error)}", ""]
    return told


def write(plan: Plan, results: Mapping[str, Result], output: Path, *, command: Sequence[str]) -> None:
    """REPORT.md, results.json (every run without the losses of its steps) and, where they can be drawn, plots."""
    output.mkdir(parents=True, exist_ok=True)
    rows = plan.rows(results)
    results = {name: settled(result) for name, result in results.items()}
    every = [line for part in ("method", "search", "variant", "memory") for line in lines(rows, results, part)]
    runs = {row.key: results[row.key] for row in rows if row.key in results}
    content = {
        "suite": plan.suite.name,
        "command": ["python", "tools/compare.py", *command],
        "packages": packages(runs.values()),
        "machines": machines(results),
        "summary": summary(every),
        "runs": runs,
    }
    (output / "results.json").write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    pictures, lost = draw(every, output)
    for name, error in lost.items():
        print(f"not drawn: {name}: {error}")
    told = introduction(plan, rows, results, command) + method_tables(every) + picture_lines(pictures, lost)
    told += search_tables(rows, every) + variant_tables(every) + memory_table(every)
    told += data_table(rows, results) + trouble_list(every)
    told += ["## How to read this", "", reading(first_spec(rows)), ""]
    (output / "REPORT.md").write_text("\n".join(told))
