"""What `compatibility` has run, as a record in benchmarks/results/compatibility, and README's table of it.

    PYTHONPATH=tests python tests/distributed/compatibility_report.py             # runs all, and writes both
    PYTHONPATH=tests python tests/distributed/compatibility_report.py --table     # from the runs of the record

A tick stands for runs in the record, a number for the program's own words; nothing else makes either.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import launches
from compatibility import (
    ENGINES,
    FACTORS,
    NUM_STEPS,
    OPTIONS,
    PLAIN,
    TOLERANCES,
    WORLD_SIZES,
    Plan,
    Result,
    deviations,
    engine_of,
    make_plan,
    problem_of,
    reference_of,
    run_cases,
)
from covering import Pair, Value, all_pairs, pairs_of

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "compatibility"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- what works with what: written by tests/distributed/compatibility_report.py -->", "<!-- end -->"
WIDTH = 128  # of README's lines
KINDS = ("fp32", "bf16")
PACKAGES = ("torch", "deepspeed", "bitsandbytes", "transformers")

HEADERS: dict[Value, str] = {
    ("updates", "layer-wise"): "layer-wise updates",
    ("micro-batches", "2"): "accumulation",
    ("clipping", "max_grad_norm"): "`max_grad_norm`",
    ("clipping", "max_grad_norm_per_parameter"): "`max_grad_norm_per_parameter`",
    ("activation checkpointing", "on"): "activation checkpointing",
    ("moments", "8-bit"): "8-bit moments",
    ("precision", "bf16, fp32 masters"): "bf16, fp32 masters",
    ("precision", "bf16, bf16 masters"): "bf16 masters",
    ("torch.compile", "on"): "`train.compile`",
    ("activations", "lean"): "lean activations",
    ("trained", "B alone"): "B alone",
}
assert set(HEADERS) == {(name, value) for name in OPTIONS for value in FACTORS[name] if value != PLAIN[name]}


# ---------------------------------------------------------------- the record


@dataclass
class Record:
    """What was planned, and what it gave."""

    provenance: dict[str, str]
    results: list[Result]
    references: list[Result]
    refused: dict[Pair, str]
    impossible: list[Pair]

    @classmethod
    def of(cls, plan: Plan) -> Record:
        """Of a plan of which nothing has been run yet."""
        return cls(provenance(), [], [], plan.refused, plan.impossible)

    def add(self, plan: Plan, results: Iterable[Result]) -> None:
        """Takes in what has been run: plain runs that others are compared with, and cases."""
        for result in results:
            if result.case in plan.references and not any(r.case == result.case for r in self.references):
                self.references.append(result)
            else:
                self.results.append(result)

    def problem(self, result: Result) -> str:
        """What is wrong with a result; empty if nothing is."""
        wanted = reference_of(result.case)
        references = [reference for reference in self.references if reference.case == wanted]
        return problem_of(result, references[0]) if references else "there is no plain run to compare it with"

    def write(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        content = {
            "provenance": self.provenance,
            "refused": [{"values": sorted(pair), "reason": reason} for pair, reason in self.refused.items()],
            "impossible": [sorted(pair) for pair in self.impossible],
            "references": [asdict(result) for result in self.references],
            "results": [asdict(result) for result in self.results],
        }
        (RESULTS / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls) -> Record:
        content = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
        return cls(
            content["provenance"],
            [Result(**result) for result in content["results"]],
            [Result(**result) for result in content["references"]],
            {frozenset((f, v) for f, v in each["values"]): each["reason"] for each in content["refused"]},
            [frozenset((f, v) for f, v in pair) for pair in content["impossible"]],
        )


def provenance() -> dict[str, str]:
    """Where and with what the runs were made."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": f"{os.cpu_count()} cores of {models[0].split(':')[1].strip() if models else platform.processor()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(),
    }


# ---------------------------------------------------------------- README


class Notes:
    """Reasons, numbered in the order in which they are asked for."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, reason: str) -> str:
        return f"[{self._numbers.setdefault(reason, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[{number}] `{reason.replace('`', '')}`  " for reason, number in self._numbers.items()]


def table(record: Record) -> str:
    """What stands between the markers of README."""
    good = [result for result in record.results if not record.problem(result)]
    met = {pair for result in good for pair in pairs_of(result.case)}
    notes = Notes()
    columns = [*(f"{n} rank{'s' * (n > 1)}" for n in WORLD_SIZES), *HEADERS.values()]
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for engine in ENGINES:
        cells = [_place_cell(record, good, notes, engine, n) for n in WORLD_SIZES]
        cells += [_cell(record, met, notes, engine, value) for value in HEADERS]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    head = (
        f"Each tick is a run on each of the engine's numbers of ranks, through the command line's code: {NUM_STEPS} "
        "steps with two re-initializations, an evaluation and checkpoints. Its losses must be those of one device in "
        "fp32 with nothing else switched on (but the same clipping and the same trained parameters), on the same rows, "
        f"within {_tolerances()}. The {len(good)} runs are a covering array: every two options meet in one of them, "
        "too, but where the program refuses; then a number stands for its words. `train.compile` was run without C++ "
        "(backend aot_eager): tests/unit/test_compile.py runs it with."
    )
    tail = _pairs_of_options(record, met, notes)
    made = [
        f"Run on {record.provenance['machine']} ({record.provenance['versions']});",
        "[every run](benchmarks/results/compatibility/README.md).",
    ]
    return "\n".join(
        [textwrap.fill(head, WIDTH, break_on_hyphens=False), "", *lines, "", *tail, "", *notes.lines(), "", *made]
    )


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _tolerances() -> str:
    """The most that is allowed, in fp32 and in bf16."""
    most = {kind: max(t for (p, _), both in TOLERANCES.items() if p.startswith(kind) for t in both) for kind in KINDS}
    return " and ".join(f"{_percent(share)} ({kind})" for kind, share in most.items())


def _place_cell(record: Record, good: list[Result], notes: Notes, engine: str, world_size: int) -> str:
    place = f"{engine} x {world_size}"
    if (why := record.refused.get(frozenset({("place", place)}))) is not None:
        return notes.number(why)
    return "✓" if any(result.case["place"] == place for result in good) else "not run"


def _cell(record: Record, met: set[Pair], notes: Notes, engine: str, value: Value) -> str:
    """Of an option under an engine, on all numbers of ranks that it has."""
    found: dict[str, list[int]] = {}
    for place in FACTORS["place"]:
        if engine_of({"place": place})[0] != engine or frozenset({("place", place)}) in record.refused:
            continue
        pair = frozenset({("place", place), value})
        if (why := record.refused.get(pair, record.refused.get(frozenset({value})))) is not None:
            mark = notes.number(why)
        else:
            mark = "✓" if pair in met else "not run"
        found.setdefault(mark, []).append(engine_of({"place": place})[1])
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{mark} on {', '.join(map(str, numbers))}" for mark, numbers in found.items())


def _pairs_of_options(record: Record, met: set[Pair], notes: Notes) -> list[str]:
    """Sentences about two options that are refused together under every engine, or were not run together."""
    options = {name: FACTORS[name] for name in OPTIONS}
    refused, missing = [], []
    for pair in all_pairs(options):
        names = " with ".join(_name(value) for value in sorted(pair, key=lambda v: list(OPTIONS).index(v[0])))
        if pair in record.refused:
            refused.append(f"{names} {notes.number(record.refused[pair])}")
        elif pair not in met:
            missing.append(names)
    lines = [f"Refused under every engine: {'; '.join(refused)}."] if refused else []
    return lines + ([f"Not run together: {'; '.join(missing)}."] if missing else [])


def _name(value: Value) -> str:
    return HEADERS.get(value, f"{value[0]}: {value[1]}")


def in_readme(text: str, record: Record) -> str:
    """README with the table of a record in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


# ---------------------------------------------------------------- the report beside the record


def report(record: Record) -> str:
    """benchmarks/results/compatibility/README.md: every run with its deviations."""
    where = record.provenance
    about = (
        f"{len(record.results)} runs of a tiny Llama (two layers, 64 wide, rank 32), {NUM_STEPS} steps of 8 rows; what "
        "is named is what differs from one device in fp32 with nothing switched on. Deviations are the largest of a "
        "loss from that of the plain run with the same clipping and the same trained parameters, relative: before the "
        "second re-initialization, and from there on with the held-out loss at the end. What is allowed is in "
        "`tests/distributed/compatibility.py` (TOLERANCES)."
    )
    lines = [
        "# Which options work with which: the runs",
        "",
        "    PYTHONPATH=tests python tests/distributed/compatibility_report.py",
        "",
        *textwrap.wrap(about, WIDTH, break_on_hyphens=False),
        "",
        f"Machine: {where['machine']}, shared with other work; {where['versions']}; commit {where['commit']}.",
        "",
        "| engine | ranks | what is on | losses | deviations | |",
        "|---|---|---|---|---|---|",
    ]
    for result in record.results:
        engine, world_size = engine_of(result.case)
        on = [_name((name, value)) for name, value in result.case.items() if name in OPTIONS and value != PLAIN[name]]
        losses = " ".join(f"{loss:.4f}" for loss in result.losses)
        references = [r for r in record.references if r.case == reference_of(result.case)]
        both = deviations(result, references[0]) if references and len(result.losses) == NUM_STEPS + 1 else ()
        said = " ".join(f"{deviation:.1e}" for deviation in both)
        problem = " ".join((record.problem(result) or "good").split())[:300]
        lines.append(f"| {engine} | {world_size} | {', '.join(on)} | {losses} | {said} | {problem} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the command


def write(record: Record) -> None:
    record.write()
    (RESULTS / "README.md").write_text(report(record), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8"), record), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a run is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--table", action="store_true", help="run nothing: ask what is refused, and write the table")
    only_table = parser.parse_args(arguments).table
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launches.Workshop(folder)
        plan = make_plan(folder)
        if only_table:
            record = Record.read()
            record.refused, record.impossible = plan.refused, plan.impossible
            write(record)
            missing = [case for case in plan.cases if all(result.case != case for result in record.results)]
            print(*(f"not run: {case}" for case in missing), sep="\n")
            return int(bool(missing))
        cases = [*plan.references, *plan.cases]
        record = Record.of(plan)
        for world_size in WORLD_SIZES:  # what is there is kept if the rest is interrupted
            of_these = [case for case in cases if engine_of(case)[1] == world_size]
            record.add(plan, run_cases(of_these, folder, timeout_seconds=3600))
            write(record)
            print(f"{len(record.results)} of {len(plan.cases)} runs", flush=True)
    bad = [(result.case, record.problem(result)) for result in record.results if record.problem(result)]
    for case, problem in bad:
        print(f"{case}: {problem}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
