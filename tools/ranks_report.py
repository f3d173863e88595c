"""Tables and plots of what `measure_ranks` has counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ranks_cases import Case
from ranks_memory import KEPT, PARTS_OF_RUN
from ranks_wire import PURPOSES, SMALL

ENGINES = {
    "zero2": "ZeRO-2",
    "zero1": "ZeRO-1",
    "fsdp2": "FSDP2",
    "sharded": "FSDP2, W and P sharded",
    "hybrid": "FSDP2, W and P sharded, two groups",
}
# what -> (case but for the engine, one of STEPS, engines)
SERIES: dict[str, tuple[dict[str, str], str, tuple[str, ...]]] = {
    "LoQT, ordinary step": ({"method": "loqt"}, "ordinary", ("zero2", "fsdp2", "sharded", "hybrid")),
    "LoQT, re-initialization": ({"method": "loqt"}, "reinit", ("zero2", "fsdp2", "sharded", "hybrid")),
    "LoQT, re-initialization by sketch": ({"method": "loqt", "subspace": "sketch"}, "reinit", ("zero2", "sharded")),
    "LoQT, the first initialization": ({"method": "loqt"}, "first", ("zero2", "sharded")),
    "full rank, any step": ({"method": "dense"}, "ordinary", ("zero2", "fsdp2")),
}
MB = 1e6
GIB = 2**30
INTRODUCTION = """\
Random tokens, real processes over gloo. **Payload** of an exchange: the whole tensor that it is about: that of an
all_reduce, reduce or broadcast, what goes into a reduce_scatter, all ranks' parts of an all_gather, gather or scatter;
the same on every rank, whatever their number (but for padding; where only one of two groups takes part, the mean over
all ranks). What a rank sends for a payload S over N ranks is the backend's affair: at best, averaged over the ranks,
2 S (N − 1)/N for an all_reduce, S (N − 1)/N² for a gather or scatter, and S (N − 1)/N for the others. A ring does that;
so does a tree on average, but its busiest rank sends more. Formulas are made from shapes alone; MB are 10^6 bytes.
Trained in full are embeddings, head and norms: they are most of a small model, and next to nothing of a large one.

ZeRO-2 sums gradients in bf16 and sends updated parameters once in a step. FSDP2 scatters gradients in float32 and
gathers each block twice, for its forward and its backward, in every micro-batch; with W and P sharded these bytes come
along. **/ full rank**: beside full-rank training with the same engine (ZeRO-2, or FSDP2)."""
MEMORY_TEXT = """\
Bytes that the fullest rank keeps between two micro-batches, in MB: live tensors, in brackets the planner's count. At
stage 2 ZeRO keeps the whole gradient of every parameter that a rank's partition touches. Of ZeRO besides: during the
update the gradient of the partition cast for the optimizer; at a re-initialization, what was gathered for it when the
backward is over (sums that a peer has not taken yet are still there); and the bucket, `reduce_bucket_size` elements of
the gradients' dtype (here 5e7: 100 MB in bf16), however small the model is, at stage 1 between micro-batches too."""
PEAKS_TEXT = """\
The most that is alive at once on the fullest rank, in MB, beside the planner's phases: all storages that operations
return (what a kernel makes for itself is not seen, and left out of the plan too: bitsandbytes' workspace; so is the
process itself). Where ZeRO starts is not compared: DeepSpeed makes its masters and buckets then."""
SCALING_TEXT = """\
What goes with the number of ranks when W and P are sharded, bf16 with float32 shards, kept by the fullest rank in MB:
what one rank has, over N, and what is measured. Nothing that stays is on every rank. (Rows that do not divide by N are
filled up, and bytes of W and P are cut between words.)"""
LARGE_TEXT = """\
The same planner for the recipe `fsdp2_70b_8x24gb` (Llama 2's 70B at rank 256), GiB on each rank; **not run**. A card of
24 GB has 23.4 GiB. Where every rank has all of W, its 33 GiB alone are more than a card, whatever else is divided; in
shards they are 4.1 GiB on each of eight, and the largest phase fits."""
FORMULA_TEXT = """\
Not run. The formulas are those that hold to the byte above: one micro-batch a step, bf16; payload, MB."""
CHECK_TEXT = """\
In the loopback's bytes are headers, the process group's own messages, and what other programs send: none, if it is one
of its own (`unshare -rn sh -c 'ip link set lo up; python tools/measure_ranks.py'`). gloo's reduce scatters sums over
all ranks and then gathers them on one, and so sends more than needed: that is what re-initializations show; its
reduce_scatter is an all_reduce of which each rank keeps its part, twice as much as needed: that is what FSDP2 shows."""

Results = Sequence[dict[str, Any]]


# ---------------------------------------------------------------- what was measured


def find(results: Results, case: Case, world_size: int) -> dict[str, Any] | None:
    """The result of a case, if it was measured."""
    wanted = (asdict(case), world_size)
    return next((result for result in results if (result["case"], result["world_size"]) == wanted), None)


def worlds_of(results: Results) -> list[int]:
    """Numbers of ranks, several at least."""
    return sorted({result["world_size"] for result in results} - {1})


def of_step(result: dict[str, Any], name: str) -> dict[str, Any]:
    """One of a result's STEPS."""
    return next(step for step in result["steps"] if step["step"] == name)


def purposes(step: dict[str, Any]) -> dict[str, float]:
    """Payload bytes by purpose."""
    return {name: sum(size for _, size in kinds.values()) for name, kinds in step["traffic"].items()}


def largest(per_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of the ranks."""
    return {name: max(rank[name] for rank in per_rank) for name in per_rank[0]} if per_rank else {}


# ---------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def ratio(measured: float, expected: float) -> str:
    return f"{measured / expected:.4f}" if expected else "–"


def bytes_table(results: Results) -> list[str]:
    """Totals of steps."""
    rows = []
    for label, (base, name, engines) in SERIES.items():
        for engine in engines:
            for n in worlds_of(results):
                case = Case(engine=engine, **base)
                dense = Case("dense", "zero2" if case.is_zero else "fsdp2")
                result, full = find(results, case, n), find(results, dense, n)
                if result is None:
                    continue
                step = of_step(result, name)
                total, expected = sum(purposes(step).values()), sum(result["formula"][name].values())
                beside = sum(purposes(of_step(full, "ordinary")).values()) if full else 0
                calls = sum(number for kinds in step["traffic"].values() for number, _ in kinds.values())
                rows.append(
                    [label, ENGINES[engine], str(n), f"{total / MB:.3f}", f"{expected / MB:.3f}"]
                    + [ratio(total, expected), f"{total / beside:.3f}" if beside else "–"]
                    + [f"{step['sent'] / MB:.3f}", f"{calls:g}"]
                )
    head = ["step", "engine", "ranks", "payload, MB", "formula, MB", "ratio", "/ full rank", "a rank sends ≥, MB"]
    return table([*head, "exchanges"], rows)


def purposes_tables(results: Results) -> list[str]:
    """Payloads by purpose, of ordinary steps and of re-initializations."""
    n, lines = worlds_of(results)[0], []
    for title, steps in (("ordinary step", ("ordinary",)), ("re-initialization", ("reinit",))):
        columns: dict[str, tuple[dict[str, Any], str]] = {}
        for label, (base, name, engines) in SERIES.items():
            for engine in engines:
                result = find(results, Case(engine=engine, **base), n)
                if result is not None and name in steps:
                    columns[f"{label.split(', ')[0]}{' by sketch' if 'sketch' in label else ''}: {ENGINES[engine]}"] = (
                        result,
                        name,
                    )
        rows = []
        for purpose, what in PURPOSES.items():
            cells = [_purpose_cell(*column, purpose) for column in columns.values()]
            if any(cells):
                rows.append([what, *cells])
        lines += table([f"{title}: payload bytes, {n} ranks", *columns], rows)
    return lines


def _purpose_cell(result: dict[str, Any], step_name: str, purpose: str) -> str:
    step = of_step(result, step_name)
    size, expected = purposes(step).get(purpose, 0), result["formula"][step_name].get(purpose, 0)
    kinds = "+".join(f"{number:g} {kind}" for kind, (number, _) in step["traffic"].get(purpose, {}).items())
    same = "" if purpose in SMALL or size == expected else f" (formula {expected:,})"
    return f"{size:,}{same}: {kinds}" if kinds else ""


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    case = Case(**result["case"])
    precisions = ("bf16", "bf16 masters", "fp32")
    return case.method != "loqt", precisions.index(case.precision), list(ENGINES).index(case.engine)


def _of_table(results: Results) -> list[dict[str, Any]]:
    """Those whose memory is told; options of re-initializations change none of it."""
    plain = [r for r in results if (r["case"]["subspace"], r["case"]["optimizer_state"]) == ("auto", "keep")]
    return sorted(plain, key=lambda result: (*_order(result), result["world_size"]))


def _who(result: dict[str, Any]) -> list[str]:
    case = Case(**result["case"])
    name = "LoQT" if case.method == "loqt" else "full rank"
    return [name, case.precision, ENGINES[case.engine], str(result["world_size"])]


def memory_table(results: Results) -> list[str]:
    """What the fullest rank keeps, measured (planned)."""
    rows = []
    for result in _of_table(results):
        parts, expected = largest(result["memory"]), result["planned"]["kept"]
        told = {**{name: (parts[name], expected[name]) for name in KEPT if name not in ("w", "p")}}
        told["frozen"] = (parts["w"] + parts["p"], expected["w"] + expected["p"])
        total, planned = (sum(pair[i] for pair in told.values()) for i in (0, 1))
        cells = [f"{found / MB:.2f} ({count / MB:.2f})" if found or count else "" for found, count in told.values()]
        rows.append(
            [*_who(result), *cells, f"{total / MB:.1f}", ratio(total, planned)]
            + [f"{parts['gradients cast'] / MB:.1f}" if parts["gradients cast"] else ""]
            + [f"{parts['gathered'] / MB:.1f}" if Case(**result["case"]).is_zero else ""]
            + [f"{parts['bucket when reduced'] / MB:.0f}" if parts["bucket when reduced"] else ""]
        )
    head = ["model", "precision", "engine", "ranks", "weights", "masters", "moments", "gradients", "W + P"]
    return table([*head, "sum", "ratio", "cast in the update", "gathered", "bucket"], rows)


def peaks_table(results: Results) -> list[str]:
    """The most that is alive at once, beside the plan."""
    rows = []
    for result in _of_table(results):
        found, expected = largest(result.get("peaks", [])), result["planned"]["peaks"]
        if not found or not expected:
            continue
        cells = []
        for part in PARTS_OF_RUN:
            measured, planned = found[part], expected.get(part)
            cells += (
                ["", ""] if planned is None else [f"{measured / MB:.1f} ({planned / MB:.1f})", ratio(measured, planned)]
            )
        rows.append([*_who(result), *cells])
    head = ["model", "precision", "engine", "ranks"]
    for part in PARTS_OF_RUN:
        head += [part, "ratio"]
    return table(head, rows)


def scaling_table(results: Results) -> list[str]:
    """W and P, and all that stays, over the number of ranks."""
    case = Case("loqt", "sharded")
    one = find(results, case, 1)
    if one is None:
        return []
    rows = []
    first = largest(one["memory"])
    groups = {"W + P": ("w", "p"), "trained values": ("weights",), "moments": ("moments",), "gradients": ("gradients",)}
    for n in (1, *worlds_of(results)):
        result = find(results, case, n)
        if result is None:
            continue
        parts = largest(result["memory"])
        cells = []
        total = total_expected = 0.0
        for names in groups.values():
            measured, expected = sum(parts[name] for name in names), sum(first[name] for name in names) / n
            total, total_expected = total + measured, total_expected + expected
            cells.append(f"{expected / MB:.3f} → {measured / MB:.3f}")
        cells.append(f"{total_expected / MB:.2f} → {total / MB:.2f}")
        rows.append([str(n), *cells, ratio(total, total_expected)])
    return table(["ranks", *groups, "all: one rank's / N → measured", "ratio"], rows)


def large_table(found: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [row["mode"], str(row["num_ranks"]), *(f"{row[name] / GIB:.2f}" for name in ("frozen", "stays", "total"))]
        + [row["largest"], "yes" if row["total"] / GIB < 23.4 else "no"]
        for row in found
    ]
    return table(["W and P", "ranks", "of these, W and P", "stays", "peak", "in", "below 23.4 GiB"], rows)


def beyond_design(results: Results) -> list[str]:
    """How much of a re-initialization is what it is for: sums of gradients or sketches; W, P and B."""
    lines = []
    for label, (base, name, engines) in SERIES.items():
        for engine in engines if name == "reinit" else ():
            result = find(results, Case(engine=engine, **base), worlds_of(results)[0])
            if result is None:
                continue
            found = purposes(of_step(result, name))
            added = sum(size for purpose, size in found.items() if purpose not in ("gradients", "parameters", "norms"))
            named = sum(found.get(purpose, 0) for purpose in ("sums", "w", "p", "scattered", "factors"))
            rest = [
                PURPOSES[purpose] for purpose in ("columns", "collected", "masters", "moments") if found.get(purpose)
            ]
            lines.append(
                f"- {label}, {ENGINES[engine]}: adds {added / MB:.2f} MB to an ordinary step. {named / added:.0%} are "
                f"the sums, W, P and B; the rest: {'; '.join(rest)}; messages."
            )
    return [*lines, ""]


def formula_table(found: dict[str, dict[str, int]]) -> list[str]:
    rows = [
        [name, str(row["rank"]), f"{row['ordinary'] / MB:,.0f}", f"{(row['reinit'] - row['ordinary']) / MB:,.0f}"]
        + [f"{row['full_rank'] / MB:,.0f}", f"{row['ordinary'] / row['full_rank']:.3f}"]
        + [f"{(row['ordinary'] + (row['reinit'] - row['ordinary']) / 100) / row['full_rank']:.3f}"]
        + [str(row["num_ranks"]), f"{row['sharded_ordinary'] / MB:,.0f}"]
        + [f"{(row['sharded_reinit'] - row['sharded_ordinary']) / MB:,.0f}"]
        for name, row in found.items()
    ]
    head = ["recipe", "rank", "ZeRO-2: ordinary step", "a re-initialization adds", "full rank"]
    head += ["ordinary / full rank", "with one re-initialization in 100 steps"]
    return table([*head, "ranks", "FSDP2, W and P sharded: ordinary step", "a re-initialization adds"], rows)


def check_lines(record: dict[str, Any]) -> list[str]:
    """What the independent counters say."""
    steps = [
        (result, step)
        for results in record["results"].values()
        for result in results
        for step in result["steps"]
        if result["world_size"] > 1
    ]
    differing = sum(abs(step["dispatched"][1] - sum(purposes(step).values())) > 1 for _, step in steps)
    unknown = sum(purposes(step).get("other", 0) for _, step in steps)
    lines = [
        f"- torch's dispatcher saw the same number of bytes in {len(steps) - differing} of {len(steps)} steps; "
        f"{unknown} bytes were of a purpose that was not recognized."
    ]
    for is_zero in (True, False):
        for name, what in (("ordinary", "ordinary steps"), ("reinit", "re-initializations")):
            over = [
                step["loopback"] / result["world_size"] / step["sent"]
                for result, step in steps
                if step["step"] == name and result["case"]["method"] == "loqt" and step["loopback"] > 0
                if Case(**result["case"]).is_zero == is_zero
            ]
            if over:
                lines.append(
                    f"- /proc/net/dev, loopback: in {what} under {'ZeRO' if is_zero else 'FSDP2'} {min(over):.3f} to "
                    f"{max(over):.3f} times the bytes that the ranks must send at least."
                )
    return lines


def report(record: dict[str, Any]) -> str:
    """README.md."""
    origin = record["provenance"]
    lines = ["# Several ranks: bytes on the wire and memory, counted", "", f"    {origin['command']}", "", INTRODUCTION]
    for shape, results in record["results"].items():
        some = {r["case"]["method"]: r["num_trained"] for r in results}
        told = f"{some['loqt']:,} trained parameters" + (f"; {some['dense']:,} in full rank" if "dense" in some else "")
        lines += ["", f"## {shape}", "", f"{told}. bf16, fp32 masters, 8-bit AdamW, one micro-batch a step:", ""]
        lines += [*bytes_table(results), *purposes_tables(results), *beyond_design(results)]
        lines += [MEMORY_TEXT, "", *memory_table(results), PEAKS_TEXT, "", *peaks_table(results)]
        if scaled := scaling_table(results):
            lines += [SCALING_TEXT, "", *scaled]
    lines += ["## 70B on eight cards of 24 GB, by the planner", "", LARGE_TEXT, "", *large_table(record["by_planner"])]
    lines += ["## Larger shapes, by the formulas", "", FORMULA_TEXT, "", *formula_table(record["by_formula"])]
    lines += ["## Was everything counted?", "", *check_lines(record), "", CHECK_TEXT, ""]
    lines += ["![bytes](bytes.png)", "", "![memory](memory.png)", ""]
    lines += [f"Machine: {origin['machine']}, shared with other work (no count depends on that); {origin['versions']}."]
    return "\n".join([*lines, "", f"Code: commit {origin['commit']}.", ""])


# ---------------------------------------------------------------- plots


def plot(record: dict[str, Any], output: Path) -> None:
    """bytes.png: payload by purpose; memory.png: by number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = record["results"]
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(8 * len(shapes), 5.5), layout="constrained", squeeze=False)
    shown: dict[str, Any] = {}
    for ax, (shape, results) in zip(axes[0], shapes.items(), strict=True):
        _plot_bytes(ax, results, pyplot.get_cmap("tab20"), shown)
        ax.set(title=f"{shape}, bf16, {worlds_of(results)[0]} ranks", ylabel="payload of a step, MB")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2 * len(shapes), fontsize=8)
    figure.savefig(output / "bytes.png", dpi=110)
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(8 * len(shapes), 5), layout="constrained", squeeze=False)
    for ax, (shape, results) in zip(axes[0], shapes.items(), strict=True):
        _plot_memory(ax, results)
        ax.set(title=f"{shape}, bf16, fp32 masters", ylabel="kept by the fullest rank, MB")
    axes[0][0].legend(fontsize=8)
    figure.savefig(output / "memory.png", dpi=110)


def _plot_bytes(ax: Any, results: Results, colors: Any, shown: dict[str, Any]) -> None:
    found = {
        f"{label},\n{ENGINES[engine]}": purposes(of_step(result, name))
        for label, (base, name, engines) in SERIES.items()
        for engine in engines
        if name != "first" and engine != "hybrid"
        if (result := find(results, Case(engine=engine, **base), worlds_of(results)[0])) is not None
    }
    bottom = [0.0] * len(found)
    for number, (name, label) in enumerate(PURPOSES.items()):
        heights = [sizes.get(name, 0) / MB for sizes in found.values()]
        if max(heights) > 0.001 * max(bottom):
            shown[label] = ax.bar(list(found), heights, bottom=bottom, color=colors(number))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    ax.set_xticks(range(len(found)), list(found))
    ax.tick_params(axis="x", labelsize=7, rotation=90)


def _plot_memory(ax: Any, results: Results) -> None:
    told = [r for r in _of_table(results) if r["case"]["precision"] == "bf16" and r["case"]["engine"] != "zero1"]
    ticks = ["{0}, ranks: {3}\n{2}".format(*_who(result)) for result in told]
    bottom = [0.0] * len(told)
    for name, label in KEPT.items():
        heights = [largest(result["memory"])[name] / MB for result in told]
        ax.bar(ticks, heights, bottom=bottom, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    ax.tick_params(axis="x", labelsize=7, rotation=90)
