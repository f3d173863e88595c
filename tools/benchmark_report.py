"""Tables and plots of what `tools/benchmark.py` has measured: medians with quartiles, and ratios of the same round."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmark_operations import promised
from rivals import options_of, parse

BASE = "adamw"
EIGHT_BIT = {"adamw8bit", "loqt8bit", "loqtcard"}
PARTS = ("forward", "backward", "update")
MB = 1e6
DASH = "–"

Record = dict[str, Any]
Point = tuple[str, float, float]  # series, x, y


def step_seconds(taken: dict[str, Any]) -> float:
    """Of one step, all parts."""
    return float(sum(taken["seconds"].values()))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile); of one value it is that, three times."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def of_rounds(record: Record, name: str) -> list[float]:
    """Seconds of a step of a contender in each round it took part in: the median where it took several."""
    return [median(map(step_seconds, entry[name])) for entry in record["rounds"] if name in entry]


def ratios(record: Record, name: str, base: str = BASE) -> list[float]:
    """A contender's step over the base's step of the same round."""
    both = [entry for entry in record["rounds"] if name in entry and base in entry]
    return [median(map(step_seconds, entry[name])) / median(map(step_seconds, entry[base])) for entry in both]


def refresh_seconds(record: Record, name: str) -> float | None:
    """What new subspaces add to a step: the median of the steps that found some less that of those that did not, or
    what was measured beside the step; None where there was none."""
    found = [entry[name] for entry in record["refreshes"] if name in entry]
    if not found:
        return None
    beside = [taken["refresh"] for taken in found if taken["refresh"] is not None]
    if beside:
        return median(beside)
    return median(map(step_seconds, found)) - median(of_rounds(record, name))


def peak_bytes(entry: dict[str, Any], device: str) -> tuple[int, str] | None:
    """(the most that a contender needed, how): on CUDA what torch allocated, on a CPU what was resident above what was
    before there was a model."""
    if "peak" not in entry:
        return None
    if device == "cuda":
        return entry["peak"]["allocated"], "allocated"
    return entry["peak"]["resident"] - entry["before"]["resident"], "resident"


def line(record: Record, name: str) -> dict[str, Any]:
    """Everything about one contender of a cell; `seconds` is missing where no step was measured."""
    cell, entry = record["cell"], record["contenders"][name]
    found: dict[str, Any] = {"name": name, "status": entry["status"], "error": entry.get("error")}
    times = of_rounds(record, name)
    if not times:
        return found
    steps = [step for rounds in record["rounds"] for step in rounds.get(name, [])]
    own_base = "adamw8bit" if parse(name)[0] in EIGHT_BIT else BASE
    found |= {
        "num_rounds": len(times),
        "seconds": spread(times),
        "tokens_per_second": cell["rows"] * cell["length"] / median(times),
        "parts": {part: median(step["seconds"][part] for step in steps) for part in PARTS},
        "ratio": spread(values) if (values := ratios(record, name)) else None,
        "ratio_own": spread(values) if (values := ratios(record, name, own_base)) else None,
        "promised": promised(cell, name, BASE),
        "refresh": refresh_seconds(record, name),
        "bytes": entry["bytes"],
        "peak": peak_bytes(entry, cell["device"]),
        "losses": (entry["first_loss"], steps[-1]["loss"], entry["num_steps"]),
    }
    return found


def one_line(taken: dict[str, list[dict[str, Any]]]) -> str:
    """A round, for the terminal."""
    base = median(map(step_seconds, taken[BASE])) if BASE in taken else None
    told = []
    for name, steps in taken.items():
        value = median(map(step_seconds, steps))
        told.append(f"{name} {value:.3g}" + ("" if base is None or name == BASE else f" ({value / base:.2f})"))
    return ", ".join(told)


# ---------------------------------------------------------------- Markdown


HEAD = (
    "contender",
    "ms a step: median [quartiles]",
    "forward / backward / update",
    "tokens/s",
    "/ full rank [quartiles]",
    "by the counts",
    "/ same optimizer",
    "new subspaces add, s",
    "weights / gradients / states, MB",
    "peak, MB",
    "loss",
)


def row(found: dict[str, Any]) -> list[str]:
    """One contender's cells of the table."""
    if "seconds" not in found:
        told = found["status"] + (f": {found['error']}" if found["error"] else "")
        return [found["name"], told.replace("|", "/"), *[DASH] * (len(HEAD) - 2)]
    low, middle, high = (1000 * value for value in found["seconds"])
    parts = " / ".join(f"{1000 * found['parts'][part]:.0f}" for part in PARTS)
    ratio, own = found["ratio"], found["ratio_own"]
    first, last, count = found["losses"]
    sizes = " / ".join(f"{found['bytes'][kind] / MB:,.0f}" for kind in ("weights", "gradients", "states"))
    return [
        found["name"] + ("" if found["status"] == "ok" else f" ({found['status']} later)"),
        f"{middle:,.0f} [{low:,.0f}, {high:,.0f}]",
        parts,
        f"{found['tokens_per_second']:,.0f}",
        DASH if ratio is None else f"**{ratio[1]:.3f}** [{ratio[0]:.3f}, {ratio[2]:.3f}]",
        DASH if found["promised"] is None else f"{found['promised']:.3f}",
        DASH if own is None else f"{own[1]:.3f}",
        DASH if found["refresh"] is None else f"{found['refresh']:.2f}",
        sizes,
        DASH if found["peak"] is None else f"{found['peak'][0] / MB:,.0f}",
        f"{first:.2f} → {last:.2f} ({count})",
    ]


def title(record: Record) -> str:
    cell = record["cell"]
    shape = Path(cell["shape"]).stem + ("" if cell["num_layers"] is None else f", {cell['num_layers']} layers")
    cap = "" if cell["cap_gib"] is None else f", {cell['cap_gib']:g} GiB at most"
    return f"{shape}, {cell['dtype']}, {cell['rows']} x {cell['length']} tokens, {cell['device']}{cap}"


def table(record: Record) -> list[str]:
    """Markdown lines of one cell."""
    rows = [row(line(record, name)) for name in record["cell"]["contenders"]]
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]
    machines = {describe(run["machine"]) for run in record["runs"]}
    loads = [run["load"][0] for run in record["runs"]]
    told = f"{len(record['rounds'])} rounds; load before it {', '.join(f'{load:.1f}' for load in loads)}; "
    return [f"## {title(record)}", "", *lines, "", told + "; ".join(sorted(machines)), ""]


def describe(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "bitsandbytes"))
    return f"{machine['device']}, {machine['threads']} threads, {versions}, commit {machine['commit']}"


EXPLANATION = """\
A round is one step of each contender, one after another, each in a process of its own.

- *ms a step*: median over the rounds, and quartiles.
- */ full rank*: a step over full-rank AdamW's step of the same round; the median of these ratios and their quartiles.
- *By the counts*: the ratio of the operations of a step (products, head and attention; no optimizer, norms or
  quantization): what a machine that did nothing else would show.
- */ same optimizer*: as */ full rank*, but over 8-bit AdamW in full rank where a contender's optimizer is in 8 bits.
- *New subspaces add*: a step with a re-initialization (LoQT), an SVD of every gradient (GaLore) or new random
  projections (APOLLO), less a step without. On CUDA, GaLore's and APOLLO's are of one matrix of each shape, times how
  many there are.
- Bytes are of tensors. *Peak* is what the process needed in an ordinary step above what it had before the model.
- *Loss*: of the first step and of the last, of different pieces of text: that all of them train, not how well.

In bf16 the rivals update bf16 weights, as their packages do; LoQT keeps float32 masters of what it trains (not
loqtcard). Embeddings, norms and head are trained by all, in QLoRA too."""


def write(
    records: Sequence[Record], output: Path, *, command: Sequence[str], processes: Sequence[Point] = (), more: str = ""
) -> None:
    """README.md and the plots.

    processes: of several processes (method and way, number, tokens a second); given, or with cells that differ in
    rows or layers, how cost grows is drawn as well. more: Markdown that follows the cells.
    """
    said = shlex.join(["python", "tools/benchmark.py", *(part for part in command if part != "--report")])
    lines = ["# Speed: step times side by side", "", f"    {said}", "", EXPLANATION, ""]
    for record in records:
        lines += table(record)
    lines += [more] if more else []
    measured = [record for record in records if any(of_rounds(record, name) for name in record["contenders"])]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no plots (pip install -e '.[plot]')")
    else:
        if measured:
            plot_ratios(measured, output / "ratios.png")
            plot_parts(measured, output / "parts.png")
            lines += ["![ratios](ratios.png)", "", "![parts](parts.png)", ""]
        if processes or len({(r["cell"]["rows"], r["cell"]["num_layers"]) for r in measured}) > 1:
            plot_growth(measured, processes, output / "growth.png")
            lines += ["![how cost grows](growth.png)", ""]
    (output / "README.md").write_text("\n".join(lines))
    for record in records:
        print("\n".join(table(record)))


# ---------------------------------------------------------------- plots


def measured_lines(record: Record) -> list[dict[str, Any]]:
    found = [line(record, name) for name in record["cell"]["contenders"]]
    return [entry for entry in found if "seconds" in entry]


def axes_of(records: Sequence[Any], height: float) -> tuple[Any, list[Any]]:
    """A figure with one plot for each cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, height * rows), squeeze=False)
    flat = list(axes.flat)
    for unused in flat[len(records) :]:
        unused.axis("off")
    return figure, flat


def plot_ratios(records: Sequence[Record], path: Path) -> None:
    """Measured ratios to full rank with quartiles, beside those that the counts promise."""
    figure, axes = axes_of(records, 3.6)
    for record, ax in zip(records, axes, strict=False):
        found = [entry for entry in measured_lines(record) if entry["ratio"] is not None]
        positions = list(range(len(found)))
        middle = [entry["ratio"][1] for entry in found]
        below = [entry["ratio"][1] - entry["ratio"][0] for entry in found]
        above = [entry["ratio"][2] - entry["ratio"][1] for entry in found]
        ours = ["tab:green" if entry["name"].startswith("loqt") else "tab:gray" for entry in found]
        ax.barh(positions, middle, 0.6, xerr=(below, above), color=ours, capsize=2)
        counted = [(p, entry["promised"]) for p, entry in zip(positions, found, strict=True) if entry["promised"]]
        ax.plot([value for _, value in counted], [p for p, _ in counted], "k|", markersize=14, label="by the counts")
        ax.axvline(1.0, color="0.3", linewidth=0.8, linestyle=":")
        ax.set_yticks(positions, [entry["name"] for entry in found], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(title(record), fontsize=9)
        ax.set_xlabel("step time / full-rank AdamW", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_parts(records: Sequence[Record], path: Path) -> None:
    """Forward, backward and update of each contender."""
    figure, axes = axes_of(records, 3.6)
    for record, ax in zip(records, axes, strict=False):
        found = measured_lines(record)
        left = [0.0] * len(found)
        for part in PARTS:
            widths = [1000 * entry["parts"][part] for entry in found]
            ax.barh([entry["name"] for entry in found], widths, 0.6, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=8)
        ax.set_title(title(record), fontsize=9)
        ax.set_xlabel("ms a step", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def growth(records: Sequence[Record]) -> dict[str, list[Point]]:
    """How cost grows: over rank (ratio to full rank), tokens of a micro-batch and layers (ms a step)."""
    found: dict[str, list[Point]] = {"rank": [], "tokens of a micro-batch": [], "layers": []}
    for record in records:
        cell = record["cell"]
        for entry in measured_lines(record):
            method, rank = parse(entry["name"])
            method = "+".join([method, *options_of(entry["name"])])
            milliseconds = 1000 * entry["seconds"][1]
            if cell["num_layers"] is not None:
                found["layers"].append((entry["name"], cell["num_layers"], milliseconds))
                continue
            found["tokens of a micro-batch"].append((entry["name"], cell["rows"] * cell["length"], milliseconds))
            if rank and entry["ratio"] is not None and len(record["contenders"]) > 2:
                found["rank"].append((f"{method}, measured", rank, entry["ratio"][1]))
                if entry["promised"] is not None:
                    found["rank"].append((f"{method}, by the counts", rank, entry["promised"]))
    return found


def plot_growth(records: Sequence[Record], processes: Sequence[Point], path: Path) -> None:
    """One plot each for rank, tokens, layers and processes, where more than one value was measured."""
    panels = {**growth(records), "processes": list(processes)}
    labels = {"rank": "step time / full-rank AdamW", "processes": "tokens a second"}
    shown = {name: points for name, points in panels.items() if len({x for _, x, _ in points}) > 1}
    figure, axes = axes_of(list(shown), 3.6)
    for (name, points), ax in zip(shown.items(), axes, strict=False):
        for series in dict.fromkeys(series for series, _, _ in points):
            line_of = sorted((x, y) for label, x, y in points if label == series)
            if len(line_of) > 1:
                ax.plot(*zip(*line_of, strict=True), "o-", label=series, markersize=4)
        ax.set(xlabel=name, xscale="log", yscale="linear" if name == "rank" else "log")
        ticks = sorted({x for _, x, _ in points})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        ax.minorticks_off()
        ax.set_ylabel(labels.get(name, "ms a step"), fontsize=8)
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
