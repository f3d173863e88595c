"""What the tables and plots of a comparison are made of: a line for each method or variant, with its runs by seed.

Means and standard deviations are over seeds; ratios and differences are of runs with the same seed, data and shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from compare_suites import Result, Row

BASE = "adamw"
MB = 1e6
GIB = 2**30
DASH = "–"


# ---------------------------------------------------------------- lines


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


def loss(result: Result) -> float:
    """Held-out, nats."""
    return float(result["final"]["loss"])


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation of the sample); None for the latter of one value."""
    return mean(values), stdev(values) if len(values) > 1 else None


def ratios(line: Line, base: Line | None, get: Callable[[Result], float]) -> dict[int, float]:
    """A line's values over the base's of the same seed."""
    if base is None:
        return {}
    own, others = line.values(get), base.values(get)
    return {seed: own[seed] / others[seed] for seed in own if seed in others}


def differences(line: Line, base: Line | None) -> dict[int, float]:
    """A line's held-out losses less the base's of the same seed, nats."""
    if base is None:
        return {}
    own, others = line.values(loss), base.values(loss)
    return {seed: own[seed] - others[seed] for seed in own if seed in others}


def peak_bytes(result: Result) -> float:
    """What the process needed at most, above what it had before there was a model."""
    return float(GIB * (result["peak_memory_gib"] - result["memory_before_model_gib"]))


def components(result: Result) -> dict[str, float]:
    """Bytes: weights, gradients and optimizer states as counted, and the rest of the measured peak."""
    found = {name: float(result["bytes"][name]) for name in ("weights", "gradients", "states")}
    return found | {"the rest of the peak": max(0.0, peak_bytes(result) - sum(found.values()))}


# ---------------------------------------------------------------- words


def plus_minus(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean and standard deviation; `sign` is that of a format: + shows it always."""
    if not values:
        return DASH
    middle, deviation = spread(values)
    return f"{middle:{sign}.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def trouble(line: Line) -> str:
    """What went wrong, was interrupted or is missing; empty where all seeds trained to the end at one go."""
    seeds: dict[str, list[str]] = {}
    for seed, result in sorted(line.runs.items()):
        if result["status"] == "diverged":
            text = f"**diverged** at step {result['num_steps']} of {result['spec']['steps']}"
            seeds.setdefault(text, []).append(str(seed))
        elif result["status"] == "failed":
            seeds.setdefault(f"**failed**: {clean(result['error'])}", []).append(str(seed))
    told = [f"{text} (seed {', '.join(of)})" for text, of in seeds.items()]
    parts = max((result.get("num_parts", 1) for result in line.runs.values()), default=1)
    if parts > 1:
        told.append(f"in up to {parts} parts")
    missing = line.num_seeds - len(line.runs)
    if missing:
        told.append("not run yet" if missing == line.num_seeds else f"{missing} of {line.num_seeds} seeds not run yet")
    return "; ".join(told)


def clean(text: str) -> str:
    """Of one line, and without what ends a cell of a table."""
    return " ".join(text.split()).replace("|", "/")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)] + [""]


# ---------------------------------------------------------------- curves


def curve(result: Result) -> tuple[list[float], list[float]]:
    """(tokens, held-out perplexity) of a run's evaluations on the first held-out tokens, as far as they are finite."""
    points = [(tokens, value) for tokens, value in result["curve"] if value is not None and math.isfinite(value)]
    return [tokens for tokens, _ in points], [math.exp(min(value, 700.0)) for _, value in points]


def end_of(result: Result) -> float:
    """Tokens that a run was trained on."""
    spec = result["spec"]
    return float(result["num_steps"] * spec["rows"] * spec["length"])
