"""Plots of a comparison: perplexity over tokens, final perplexity with each seed, memory, and the searched rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compare_lines import BASE, MB, Line, components, curve, end_of, perplexity

COMPONENT_COLORS = ("tab:blue", "tab:orange", "tab:green", "0.8")


def draw(every: Sequence[Line], output: Path) -> tuple[list[str], dict[str, str]]:
    """Writes the plots that there is something to draw for; (their names, by the names of others what went wrong).

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn: list[str] = []
    lost: dict[str, str] = {}
    for name in PICTURES:
        file = output / f"{name}.png"
        file.unlink(missing_ok=True)  # of an earlier report
        try:
            if draw_one(name, every, file):
                drawn.append(name)
        except Exception as error:  # the tables are worth more than any plot
            lost[name] = f"{type(error).__name__}: {error}"
        finally:
            pyplot.close("all")
    return drawn, lost


def draw_one(name: str, every: Sequence[Line], file: Path) -> bool:
    """Whether there was something to draw."""
    part, draw_panel, height = PICTURES[name]
    panels: dict[tuple[str, str], list[Line]] = {}
    for line in every:
        if line.part == part and line.runs:
            panels.setdefault((line.shape, line.data), []).append(line)
    # a logarithmic axis wants values
    panels = {where: here for where, here in panels.items() if any(line.done for line in here)}
    if panels:
        figure, axes = axes_of(len(panels), height)
        for ((shape, data), here), ax in zip(panels.items(), axes, strict=False):
            draw_panel(ax, here, every)
            ax.set_title(f"{Path(shape).stem} on {data}", fontsize=10)
        figure.savefig(file, dpi=120)
    return bool(panels)


def axes_of(number: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with so many plots."""
    from matplotlib import pyplot

    columns = min(2, number)
    rows = -(-number // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(7.5 * columns, height * rows), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for unused in flat[number:]:
        unused.axis("off")
    return figure, flat


def style(label: str, every: Sequence[Line]) -> dict[str, Any]:
    """Color and line of a method, the same in all plots: by its place among all."""
    from matplotlib import colormaps

    number = list(dict.fromkeys(line.label for line in every)).index(label)
    palette = colormaps["tab20"]
    colors = [palette(place) for place in (*range(0, 20, 2), *range(1, 20, 2))]
    return {"color": colors[number % 20], "linestyle": ("-", "--", ":")[number // 10 % 3]}


def draw_curves(ax: Any, found: list[Line], every: Sequence[Line]) -> None:
    """Held-out perplexity over tokens: the mean over seeds (of the loss), and the range; a cross where a run
    diverged."""
    ends_at = sorted(values[-1] for line in found for result in line.done.values() if (values := curve(result)[1]))
    # what an untrained model has would leave no room for the differences
    top = 3.0 * ends_at[len(ends_at) // 2] if ends_at else math.inf
    for line in found:
        runs = [dict(zip(*curve(result), strict=True)) for result in line.done.values()]
        where = style(line.label, every)
        if runs:
            shared = [value for value in runs[0] if all(value in run for run in runs)]
            tokens, columns = [value / 1e6 for value in shared], [[run[value] for run in runs] for value in shared]
            middle = [math.exp(sum(map(math.log, column)) / len(column)) for column in columns]
            ax.plot(tokens, middle, label=line.label, linewidth=2.0 if line.label == BASE else 1.3, **where)
            if len(runs) > 1:
                ax.fill_between(tokens, [*map(min, columns)], [*map(max, columns)], alpha=0.15, color=where["color"])
        for result in line.measured:
            if result["status"] != "diverged":
                continue
            tokens_of, values = curve(result)
            ends = [value / 1e6 for value in (*tokens_of, end_of(result))]
            last = values[-1] if values else math.inf
            label = None if runs else f"{line.label} (diverged)"
            ax.plot(ends, [*values, last], linewidth=1.0, label=label, **where)
            # above what is shown it stands at the top edge
            ax.plot(ends[-1], min(last, top), "X", markersize=9, color=where["color"], clip_on=False)
        if not line.measured:
            ax.plot([], [], "X", color="tab:red", label=f"{line.label} (failed)")
    ax.set(xlabel="tokens trained on, million", ylabel="held-out perplexity", yscale="log")
    if ends_at:
        ax.set_ylim(0.97 * ends_at[0], top)
    plain_ticks(ax.yaxis)
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=7, ncols=2)


def plain_ticks(axis: Any) -> None:
    """Numbers instead of powers of ten."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(lambda *_: "")


def final_mean(line: Line) -> float:
    values = line.values(perplexity).values()
    return sum(values) / len(values)


def draw_finals(ax: Any, found: list[Line], every: Sequence[Line]) -> None:
    """A dot for every seed, a bar for their mean, best first; what has none says why."""
    found = sorted(found, key=lambda line: (not line.done, *([final_mean(line)] if line.done else [])))
    places = list(range(len(found)))
    for place, line in zip(places, found, strict=True):
        values = list(line.values(perplexity).values())
        color = "tab:green" if line.contender.startswith("loqt") else "tab:blue" if line.contender == BASE else "0.4"
        ax.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.7)
        if values:
            ax.plot(final_mean(line), place, "|", color=color, markersize=18, markeredgewidth=2)
        lost = [result["status"] for result in line.runs.values() if result["status"] != "done"]
        if lost:
            told = " and ".join(f"{lost.count(status)} {status}" for status in dict.fromkeys(lost))
            ax.plot(1.0, place, "X", color="tab:red", markersize=9, transform=ax.get_yaxis_transform(), clip_on=False)
            where = {"ha": "left", "va": "center", "transform": ax.get_yaxis_transform()}
            ax.text(1.02, place, told, color="tab:red", fontsize=8, **where)
    base = next((line for line in found if line.contender == BASE and line.done), None)
    if base is not None:
        ax.axvline(final_mean(base), color="tab:blue", linewidth=0.8, linestyle=":")
    ax.set_yticks(places, [line.label for line in found], fontsize=8)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.3)
    dotted = "" if base is None else f"; dotted: {'AdamW' if base.label == BASE else base.label}"
    ax.set_xlabel(f"final perplexity (dots: seeds; bar: mean{dotted})")


def draw_memory(ax: Any, found: list[Line], every: Sequence[Line]) -> None:
    """Stacked bars; methods that took no step have none."""
    shown = [line for line in found if line.measured]
    parts = [components(line.measured[0]) for line in shown]
    left = [0.0] * len(shown)
    labels = [line.label for line in shown]
    for name, color in zip(parts[0] if parts else (), COMPONENT_COLORS, strict=False):
        widths = [part[name] / MB for part in parts]
        ax.barh(labels, widths, 0.65, left=left, label=name, color=color)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlabel("MB")
    ax.legend(fontsize=7)


def draw_search(ax: Any, found: list[Line], every: Sequence[Line]) -> None:
    """Final perplexity over the factor on the stored rates; crosses: diverged or failed, as the legend says."""
    for label in dict.fromkeys(line.label for line in found):
        entries = [(line.rows[0].factor or 0.0, line) for line in found if line.label == label]
        entries.sort(key=lambda entry: entry[0])
        points = [(factor, value) for factor, line in entries for value in line.values(perplexity).values()]
        where = style(label, every)
        lost: dict[str, list[float]] = {}
        for factor, line in entries:
            for result in line.runs.values():
                if result["status"] != "done":
                    lost.setdefault(result["status"], []).append(factor)
        told = "".join(f" ({status} x {', '.join(f'{f:g}' for f in of)})" for status, of in lost.items())
        ax.plot([factor for factor, _ in points], [value for _, value in points], "o", markersize=4, label=label + told,
                **where)  # fmt: skip
        if points:
            ax.plot(*min(points, key=lambda point: point[1]), "*", markersize=12, color=where["color"])
        top = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        for of in lost.values():
            ax.plot(of, [1.0] * len(of), "X", color="tab:red", **top)
    factors = sorted({line.rows[0].factor or 0.0 for line in found})
    ax.set(xscale="log", yscale="log", xlabel="factor on the stored rates", ylabel="held-out perplexity at the end")
    ax.set_xticks(factors, [f"{factor:g}" for factor in factors])
    ax.minorticks_off()
    plain_ticks(ax.yaxis)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))


PICTURES: dict[str, tuple[str, Callable[[Any, list[Line], Sequence[Line]], None], float]] = {
    "perplexity": ("method", draw_curves, 5.0),
    "final": ("method", draw_finals, 4.2),
    "memory": ("method", draw_memory, 4.2),
    "search": ("search", draw_search, 5.0),
    "components": ("memory", draw_memory, 3.6),
}
