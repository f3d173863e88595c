"""A page about one run: what was asked, the data, every evaluation and re-initialization, the export, and its curve.

    python tools/report_run.py runs/gsm8k_small --output benchmarks/results/gsm8k_small

Everything is read from the run's directory (config.yaml, metrics.jsonl, export/export_report.json): nothing is computed
again. Writes REPORT.md, results.json and loss.png. Needs matplotlib: pip install -e '.[plot]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_run import write_whole
from plot_run import Curves, draw, read_curves

from loqt_ds.config import Config, from_dict, read_yaml

Event = dict[str, Any]

LOSSES = ("loss", "perplexity")
NOT_SCORES = {"event", "step", "num_tokens", *LOSSES}
HIDDEN = {"path", "layers", "seconds_by_part"}  # of events: long, or of this machine
LEFT_OUT = {"checkpoint", "best_checkpoint"}  # events


def read(directory: Path) -> tuple[list[Event], list[Event]]:
    """Steps and events of metrics.jsonl, in the order of steps; of what a resumed run logged twice, the last."""
    found: dict[tuple[str, int], Event] = {}
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a last line that was not written whole: read_curves has refused any other
        found[record.get("event", ""), record["step"]] = record
    ordered = sorted(found.values(), key=lambda record: record["step"])
    return [r for r in ordered if "event" not in r], [
        r for r in ordered if r.get("event", "checkpoint") not in LEFT_OUT
    ]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def chosen_options(directory: Path) -> dict[str, Any]:
    """Options of the run that are not the defaults; of a path, its name."""
    default = dict(flat(Config().to_dict()))
    written = from_dict(read_yaml(directory / "config.yaml"), source="config.yaml")
    chosen = {}
    for name, value in flat(written.to_dict()):
        if value == default[name]:
            continue
        path = isinstance(value, str) and Path(value).is_absolute()
        chosen[name] = Path(value).name if path else value
    return chosen


def training_seconds(steps: Sequence[Event]) -> float:
    """Seconds in steps alone, from tokens and tokens/s of each logged step."""
    seconds, before = 0.0, 0
    for record in steps:
        seconds += (record["tokens"] - before) / record["tokens_per_second"]
        before = record["tokens"]
    return seconds


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(map(number, row))} |" for row in rows]


def evaluations(events: Sequence[Event]) -> list[str]:
    """A table: loss, perplexity and scores at every evaluation, and those of the export as it was loaded again."""
    done = [event for event in events if event["event"] == "eval"]
    if not done:
        return ["Nothing was evaluated.", ""]
    scores = [name for name in done[0] if name not in NOT_SCORES]
    columns = [name for name in (*LOSSES, *scores) if name in done[0]]
    rows = [[event["step"], *(event.get(name, "–") for name in columns)] for event in done]
    for event in events:
        if event["event"] == "export" and "loss" in event:
            rows.append([f"{event['format']}, loaded again", *(event.get(name, "–") for name in columns)])
    lines = table(["step", *(name.replace("_", " ") for name in columns)], rows)
    tokens = sorted({number(event["num_tokens"]) for event in done if "num_tokens" in event})
    return [*lines, "", f"Losses are nats a token, over {' or '.join(tokens)} held-out tokens." if tokens else "", ""]


def reinitializations(events: Sequence[Event]) -> list[str]:
    done = [event for event in events if event["event"] == "reinit"]
    header = ["step", "matrices", "gradient's energy in P", "quantization error", "after compensation", "s"]
    names = ("step", "num_layers", "captured_energy", "error_before", "error_after", "seconds")
    return [*table(header, [[event[name] for name in names] for event in done]), ""] if done else []


def verification(directory: Path) -> dict[str, Any]:
    """Differences that the export measured when it was loaded again; empty where there is none."""
    path = directory / "export/export_report.json"
    if not path.is_file():
        return {}
    report = json.loads(path.read_text())
    parts = {"": report.get("verification") or {}, "adapter ": report.get("adapter") or {}}
    found = {p + k: v for p, part in parts.items() for k, v in part.items() if k.endswith("relative_difference")}
    return found | {"bytes": report["num_bytes"]}


def page(record: Mapping[str, Any], command: str) -> str:
    """REPORT.md."""
    events = record["events"]
    data: Event = next((event for event in events if event["event"] == "data"), {})
    lines = [f"# {record['name']}: one run", "", f"    {command}", "", "![loss over tokens](loss.png)", ""]
    lines += ["Options that are not the defaults:", ""]
    lines += [f"    {name}={json.dumps(value, ensure_ascii=False)}" for name, value in record["options"].items()]
    shown = {name: value for name, value in data.items() if name not in ("event", "step")}
    lines += ["", *table(["of the data", ""], [[name, value] for name, value in shown.items()]), ""]
    lines += evaluations(events) + reinitializations(events)
    if record["verification"]:
        lines += ["The export, loaded again, against the model as it was trained:", ""]
        shown = {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in record["verification"].items()}
        lines += [*table(["", ""], [[k.replace("_", " "), v] for k, v in shown.items()]), ""]
    lines += [
        f"{number(record['num_steps'])} steps, {number(record['num_tokens'])} tokens, "
        f"{number(round(record['training_seconds']))} s in steps alone. {record['versions']}."
    ]
    return "\n".join(lines).rstrip() + "\n"


def versions(directory: Path) -> str:
    """With which packages, as the export noted them."""
    path = directory / "export/export_report.json"
    known = json.loads(path.read_text())["versions"] if path.is_file() else {}
    return ", ".join(f"{name} {version}" for name, version in known.items())


def gather(directory: Path, curves: Curves) -> dict[str, Any]:
    """results.json."""
    steps, events = read(directory)
    options = chosen_options(directory)
    return {
        "name": options.get("name", directory.name),
        "options": options,
        "num_steps": max(curves.train),
        "num_tokens": steps[-1]["tokens"],
        "training_seconds": training_seconds(steps),
        "losses": {step: float(f"{loss:.6g}") for step, loss in sorted(curves.train.items())},
        "events": [{k: v for k, v in event.items() if k not in HIDDEN} for event in events],
        "verification": verification(directory),
        "versions": versions(directory),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        curves = read_curves(options.run)
        record = gather(options.run, curves)
        draw([curves], options.output / "loss.png", title=record["name"])
        command = f"python tools/report_run.py {options.run} --output {options.output}"
        (options.output / "REPORT.md").write_text(page(record, command), encoding="utf-8")
        write_whole(options.output / "results.json", record)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output / "REPORT.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
