"""Tables of a comparison for deciding what is shipped: LoQT's variants, held against LoQT as shipped.

Everything is of runs with the same seed, data and shape; what has diverged, failed or not been run is said and counted,
and ranked behind what was trained with every seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from compare_lines import BASE, DASH, Line, base_of, differences, perplexity, plus_minus, ratios, table, trouble
from compare_suites import PAPER
from rivals import parse

PAPERS_GAP = "the paper: compensation closes 72 % of the gap, both 93 %"  # of the perplexity's, 130M on C4

VARIANTS = """\
Each differs from LoQT as shipped in what its table says, and is held against it at the same seed and data. Variants are
reported on the held-out tokens that they are compared by: the best of many is flattered by that, and differences within
the spread over seeds decide nothing."""

DECIDING = """\
Best first by the mean difference of the held-out loss over data sets and seeds; below 0 is better than LoQT as shipped.
± is the standard deviation over seeds; seeds are those that both were trained with. What lacks runs comes last."""


def variant_tables(every: Sequence[Line]) -> list[str]:
    """All variants in one table; and one for each group that has several."""
    found = [line for line in every if line.part == "variant"]
    if not found:
        return []
    told = ["## Variants of LoQT", "", VARIANTS, "", *deciding_table(every)]
    for group in dict.fromkeys(line.group for line in found):
        here = [line for line in found if line.group == group]
        if len({line.label for line in here}) == 1:
            continue
        told += [f"### {group}", ""]
        told += table(VARIANT_HEAD, [variant_cells(line, every) for line in here])
        if group == PAPER:
            told += paper_gap(here)
    return told


def shipped_line(every: Sequence[Line], line: Line) -> Line | None:
    """The suite's LoQT without options, at a line's shape and on its data."""
    same = [other for other in every if (other.shape, other.data) == (line.shape, line.data)]
    ours = [other for other in same if other.part == "method" and parse(other.contender)[0] == "loqt"]
    return next((other for other in ours if "+" not in other.contender), None)


def is_shipped_line(line: Line, every: Sequence[Line]) -> bool:
    """Whether a variant is LoQT as shipped."""
    shipped = shipped_line(every, line)
    return shipped is not None and shipped.contender == line.contender and not line.rows[0].changes


def place(line: Line) -> str:
    return f"{line.data}, {Path(line.shape).stem}"


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Standing:
    """How a variant stands against LoQT as shipped. lines: one for each data set (and shape)."""

    name: str
    lines: tuple[Line, ...]
    against: tuple[dict[int, float], ...]  # differences of the loss by seed, for each line

    @property
    def all(self) -> list[float]:
        return [value for of in self.against for value in of.values()]

    @property
    def num_missing(self) -> int:
        """Runs that there is nothing to compare of: diverged, failed, or not run yet; or LoQT as shipped was not."""
        return sum(line.num_seeds for line in self.lines) - len(self.all)

    @property
    def order(self) -> tuple[bool, bool, float]:
        return self.num_missing > 0, not self.all, mean(self.all) if self.all else 0.0

    def verdict(self) -> str:
        """Whether it is better with all seeds on all data sets."""
        number, better = len(self.all), sum(value < 0 for value in self.all)
        if self.num_missing:
            return f"in {better} of {number} runs; **{self.num_missing} lacking**"
        return f"**in all {number}**" if better == number else f"in {better} of {number}"


def standings(every: Sequence[Line]) -> list[Standing]:
    """Of all variants that differ from LoQT as shipped, best first; those that lack runs last."""
    grouped: dict[tuple[str, str], list[Line]] = {}
    for line in every:
        if line.part == "variant" and not is_shipped_line(line, every):
            grouped.setdefault((line.group, line.label), []).append(line)
    found = [
        Standing(f"{group}: {label}", tuple(of), tuple(differences(line, shipped_line(every, line)) for line in of))
        for (group, label), of in grouped.items()
    ]
    return sorted(found, key=lambda standing: standing.order)


DECIDING_HEAD = (
    "variant",
    "on",
    "loss − LoQT's as shipped, nats",
    "perplexity",
    "/ AdamW's",
    "seeds",
    "better than LoQT as shipped",
    "remarks",
)


def deciding_table(every: Sequence[Line]) -> list[str]:
    """A row for each variant and data set; before them the methods that they lie between."""
    found = standings(every)
    if not any(standing.all for standing in found):
        return []
    where = {(line.shape, line.data) for standing in found for line in standing.lines}
    beside = [line for line in every if line.part == "method" and (line.shape, line.data) in where]
    labels = list(dict.fromkeys(line.label for line in beside))
    body = []
    for line in sorted(beside, key=lambda line: labels.index(line.label)):
        shipped = shipped_line(every, line)
        against = differences(line, shipped) if line is not shipped else {}
        name = f"*{line.label}{' as shipped' if line is shipped else ''}*"
        body.append(deciding_cells(name, line, against, every, DASH))
    for standing in found:
        name, verdict = standing.name, standing.verdict()
        for line, against in zip(standing.lines, standing.against, strict=True):
            body.append(deciding_cells(name, line, against, every, verdict))
            name = verdict = ""
    return ["### All variants, best first", "", DECIDING, "", *table(DECIDING_HEAD, body)]


def deciding_cells(
    name: str, line: Line, against: Mapping[int, float], every: Sequence[Line], verdict: str
) -> list[str]:
    base = base_of(every, line, BASE) if line.label != BASE else None
    return [
        name,
        place(line),
        plus_minus(list(against.values()), 4, "+"),
        plus_minus(list(line.values(perplexity).values()), 2),
        plus_minus(list(ratios(line, base, perplexity).values()), 4),
        f"{len(against) if line.part == 'variant' else len(line.done)} of {line.num_seeds}",
        verdict,
        trouble(line),
    ]


# ---------------------------------------------------------------- one group


VARIANT_HEAD = ("", "on", "perplexity", "/ LoQT as shipped", "better than it", "/ AdamW", "remarks")


def variant_cells(line: Line, every: Sequence[Line]) -> list[str]:
    against = ratios(line, shipped_line(every, line), perplexity)
    is_same = is_shipped_line(line, every)
    wins = f"{sum(ratio < 1 for ratio in against.values())} of {len(against)}"
    return [
        f"{line.label} (shipped)" if is_same and "shipped" not in line.label else line.label,
        place(line),
        plus_minus(list(line.values(perplexity).values()), 2),
        DASH if is_same else plus_minus(list(against.values()), 4),
        DASH if is_same or not against else wins,
        plus_minus(list(ratios(line, base_of(every, line, BASE), perplexity).values()), 3),
        trouble(line),
    ]


def paper_gap(found: Sequence[Line]) -> list[str]:
    """How much of the gap between neither idea and no quantization each closes, over the seeds that all of them were
    trained with."""
    told = []
    for where in dict.fromkeys(map(place, found)):
        done = {line.label: line for line in found if place(line) == where and line.done}
        seeds = sorted(set.intersection(*(set(line.done) for line in done.values()))) if done else []
        if not seeds:
            continue
        closed = gap_closed(
            {label: mean(line.values(perplexity)[seed] for seed in seeds) for label, line in done.items()}
        )
        if closed:
            shares = ", ".join(f"{label} {100 * share:.0f} %" for label, share in closed.items())
            of = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            told += [f"Of the gap to no quantization on {where} ({of}): {shares} ({PAPERS_GAP}).", ""]
    return told


def gap_closed(means: Mapping[str, float]) -> dict[str, float]:
    """Share of (neither - no quantization) that each of the others closes; empty where there is no such gap."""
    if not {"neither", "no quantization"} <= means.keys() or means["neither"] <= means["no quantization"]:
        return {}
    gap = means["neither"] - means["no quantization"]
    others = {label: value for label, value in means.items() if label not in ("neither", "no quantization")}
    return {label: (means["neither"] - value) / gap for label, value in others.items()}
