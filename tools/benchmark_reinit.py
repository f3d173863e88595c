"""What a re-initialization costs, part by part, and what its ways to P are worth.

    python tools/benchmark_reinit.py                                    # the parts: shapes, then 1, 2, 4 processes
    python tools/benchmark_reinit.py --shapes llama_350m:256 --ranks    # one shape only, no processes
    python tools/benchmark_reinit.py --model DIR --text FILE --rank 32  # the ways to P, on a trained model's gradients
    python tools/benchmark_reinit.py --loss FILE                        # what compare_option.py found, into the report

DIR is a dense export (tools/export.py --format bf16), FILE a text that the model may read.

The parts are what a step that re-initializes does more than an ordinary one: gathering gradients in the backward,
finding P, quantizing it, merging, compensating, installing. They are timed by the controller itself, in training steps
of 8 × 256 random tokens of a model with random weights (fp32; NF4; C = 5); between several processes, under ZeRO-2 with
one thread each, the 8 rows are shared out. Time on a GPU is not measured here; for the 7B shape operations are counted.

The ways to P see the same gradients, of batch after batch at fixed weights. "In sample" is the part of a gradient's
energy that P holds; "next step", of the gradient of the batch after it, which is what P is for. Sketches differ in
their columns Ω: Gaussian; orth([M, N]) with M the first moment of B that training would have (P of an earlier batch,
beta 0.9, 20 batches) and N Gaussian; and those that training uses, Gaussian ones iterated on the first micro-batch,
which is all of the batch, half or a quarter of it. Times are of the decompositions (for sketches with the product A Ω).

Everything goes to benchmarks/results/reinit; what is there already and not measured again stays.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.config import load_config
from loqt_ds.core.subspace import (
    POWER_ITERATIONS,
    captured_energy,
    exact_basis,
    gram_basis,
    iterated_basis,
    orthonormal,
    power_iterate,
    resolve_side,
    sketch_basis,
    test_matrix,
)
from loqt_ds.data import build_data, load_or_train_tokenizer
from loqt_ds.evaluation import model_inputs, num_predicted, summed_loss
from loqt_ds.method import head
from loqt_ds.method.conversion import target_linears

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/reinit"
BETA, OVERSAMPLING, SEED = 0.9, 32, 0
SHAPES = ("llama_9m:32", "llama_35m:96", "llama_60m:128", "llama_130m:256", "llama_350m:256")
ROWS, LENGTH = 8, 256
COUNTED = ("llama_60m:128", "llama_350m:256", "llama_1b:512", "llama_7b:256", "llama_7b:1024")
NUM_TOKENS_COUNTED = 131_072  # of a step, as in the paper
OPTIONS = f"""
    loqt.schedule=static loqt.interval=2 loqt.compensation_steps=5 optim.name=adamw train.device=cpu
    train.max_steps=100 data.sequence_length={LENGTH}
"""
PARTS = {
    "gather": "gathering gradients",
    "columns": "columns of sketches",
    "sum": "sums over ranks",
    "decompose": "finding P",
    "quantize P": "quantizing P",
    "read B": "reading B",
    "merge": "merging",
    "compensate": "compensating",
    "install": "installing",
    "exchange": "waiting for others",
}


# ---------------------------------------------------------------- the parts


def shape_options(shape: str, num_rows: int) -> list[str]:
    """The overrides of `NAME:RANK`."""
    name, _, rank = shape.partition(":")
    return [*OPTIONS.split(), f"model.shape={name}", f"loqt.rank={rank or 32}", f"train.micro_batch_size={num_rows}"]


def steps(engine: Any, num_rows: int, num_reinits: int, between: Callable[[], Any]) -> dict[str, Any]:
    """Trains on random tokens: the first initialization, then ordinary steps and re-initializations in turn. Returns
    medians of their seconds, and of the parts of a re-initialization. `between`: called before every step."""
    model = engine.network
    generator = torch.Generator().manual_seed(SEED)
    ordinary, whole, by_part = [], [], []
    for step in range(1 + 2 * num_reinits):
        ids = torch.randint(0, model.config.vocab_size, (num_rows, LENGTH + 1), generator=generator)
        between()
        started = time.perf_counter()
        loss = summed_loss(engine, {"input_ids": ids[:, :-1]}, ids[:, 1:]) / ids[:, 1:].numel()
        engine.backward(loss)
        report = engine.step()
        seconds_taken = time.perf_counter() - started
        if report.reinit is None:
            ordinary.append(seconds_taken)
        elif step:
            whole.append(seconds_taken)
            by_part.append(report.reinit.seconds)
    names = [name for name in PARTS if any(name in parts for parts in by_part)]
    return {
        "ordinary_step": median(ordinary),
        "reinit_step": median(whole),
        "parts": {name: median(parts.get(name, 0.0) for parts in by_part) for name in names},
        "methods": sorted({layer.method for layer in report.reinit.layers}),
        "num_layers": len(report.reinit.layers),
    }


def one_process(shape: str, overrides: Sequence[str], num_reinits: int) -> dict[str, Any]:
    """The parts on one device, with all threads there are."""
    from loqt_ds.engines.single import SingleEngine
    from loqt_ds.method.conversion import build_model, initializer
    from loqt_ds.method.description import model_description

    config = load_config(None, [*shape_options(shape, ROWS), *overrides])
    model, source = build_model(model_description(config), config.loqt, initializer(SEED), dtype=torch.float32)
    head.install(model)
    engine = SingleEngine(model, config, original=source.weight)
    return steps(engine, ROWS, num_reinits, lambda: None) | {"num_threads": torch.get_num_threads()}


def _member(rank: int, world_size: int, port: int, shape: str, overrides: Sequence[str], path: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    from measure_ranks import Case, build

    from loqt_ds.engines.deepspeed import start_distributed

    ranks = start_distributed(timeout_seconds=600)
    num_rows = ROWS // world_size
    config = load_config(None, [*shape_options(shape, num_rows), *overrides])
    engine = build(Case("loqt", precision="fp32"), config, ranks)
    head.install(engine.network)
    mine = steps(engine, num_rows, 1, ranks.barrier)
    owned = [name for name, owner in engine.controller.owners.items() if owner == rank]
    mine["owned"] = len(owned)
    every = ranks.gather_objects(mine)
    if ranks.is_main:
        Path(path).write_text(json.dumps(every))
    ranks.barrier()
    os._exit(0)  # without waiting for gloo's threads


def several_processes(world_size: int, shape: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The parts on each of `world_size` new processes of one thread."""
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        path = Path(folder) / "results.json"
        spawn(_member, (world_size, port, shape, tuple(overrides), str(path)), nprocs=world_size)
        every: list[dict[str, Any]] = json.loads(path.read_text())
        return every


def count_operations(shape: str) -> dict[str, float]:
    """Operations of a re-initialization by part, and of an ordinary step of NUM_TOKENS_COUNTED tokens under "step"."""
    from loqt_ds.operations import reinit_work, step_work

    accumulated = NUM_TOKENS_COUNTED // (ROWS * LENGTH)
    options = [*shape_options(shape, ROWS), f"train.gradient_accumulation_steps={accumulated}", "train.dtype=bf16"]
    config = load_config(None, options)
    counted = {name: float(work.operations) for name, work in reinit_work(config).items() if work.operations}
    return counted | {"step": float(sum(work.operations for work in step_work(config).values()))}


# ---------------------------------------------------------------- the ways to P


def gradient(model: nn.Module, linears: dict[str, nn.Linear], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical gradient A (k, l) of each matrix on a batch."""
    inputs, targets = model_inputs(batch, torch.device("cpu"))
    (summed_loss(model, inputs, targets) / num_predicted(batch)).backward()
    found = {}
    for name, linear in linears.items():
        assert linear.weight.grad is not None
        right = resolve_side("auto", linear.out_features, linear.in_features) == "right"
        found[name] = linear.weight.grad.T.contiguous() if right else linear.weight.grad.clone()
    model.zero_grad()
    return found


def methods(whole: Tensor, moment: Tensor, rank: int, parts: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Name -> function that gives P (k, r). `parts`: gradients of parts of the batch, by name."""

    length, identity = whole.shape[1], torch.eye(whole.shape[0])

    def sketch(omega: Tensor) -> Callable[[], Tensor]:
        # The columns are made once a re-initialization, before the batches: not timed.
        return lambda: sketch_basis(whole @ omega, rank).vectors

    def start(num_columns: int) -> Tensor:
        return test_matrix(length=length, num_columns=min(num_columns, *whole.shape), seed=SEED, device="cpu")

    def iterated(first: Tensor) -> Tensor:
        return power_iterate(start(rank + OVERSAMPLING), identity, first, iterations=POWER_ITERATIONS)

    unit = moment / moment.norm(dim=0).clamp_min(1e-30)
    seeded = orthonormal(torch.cat([unit, start(OVERSAMPLING) / length**0.5], dim=1))
    return {
        "exact": lambda: exact_basis(whole, rank).vectors,
        "gram": lambda: gram_basis(whole, rank).vectors,
        "iterated": lambda: iterated_basis(whole, rank, oversampling=OVERSAMPLING, seed=SEED).vectors,
        "sketch, iterated": sketch(iterated(whole)),
        **{f"sketch, iterated on {name} of the batch": sketch(iterated(part)) for name, part in parts.items()},
        "sketch, from the moment": sketch(seeded),
        "sketch, Gaussian": sketch(orthonormal(start(rank + OVERSAMPLING))),
    }


def seconds(function: Callable[[], Tensor], repeats: int = 3) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return median(times)


def compare(
    whole: Tensor, following: Tensor, moment: Tensor, rank: int, parts: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Per method: seconds, and the energy that P holds of this gradient and of the following one."""
    result = {}
    for name, function in methods(whole, moment, rank, parts).items():
        basis = function()
        result[name] = {
            "seconds": seconds(function),
            "in_sample": captured_energy(whole, basis),
            "next_step": captured_energy(following, basis),
        }
    best = exact_basis(following, rank).vectors
    result["bound: exact of the next"] = {
        "seconds": 0.0,
        "in_sample": captured_energy(whole, best),
        "next_step": captured_energy(following, best),
    }
    return result


def ways(folder: Path, text: Path, rank: int, num_steps: int) -> dict[str, Any]:
    """All ways to P on the gradients of a trained model: means over its matrices."""
    from transformers import AutoModelForCausalLM

    overrides = [f"model.path={folder.resolve()}", f"data.tokenizer={folder.resolve()}"]
    config = load_config(None, [*overrides, f"data.path={text.resolve()}", f"train.micro_batch_size={ROWS}"])
    data = build_data(config, load_or_train_tokenizer(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head.install(model)
    linears = target_linears(model, "all-linear")

    def on(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradient(model, linears, batch)

    bases = {name: exact_basis(a, rank).vectors for name, a in on(data.train.next_batch()).items()}
    moments = {name: torch.zeros(0) for name in bases}
    for step in range(num_steps):
        for name, a in on(data.train.next_batch()).items():
            share = (1 - BETA) * (a.T @ bases[name])  # (l, r): the gradient of B, canonical
            moments[name] = share if step == 0 else BETA * moments[name] + share
    batch = data.train.next_batch()
    now, following = on(batch), on(data.train.next_batch())
    shares = {"half": ROWS // 2, "a quarter": ROWS // 4}
    partial = {name: on({key: tensor[:rows] for key, tensor in batch.items()}) for name, rows in shares.items()}
    by_matrix = {
        name: compare(now[name], following[name], moments[name], rank, {part: partial[part][name] for part in partial})
        for name in linears
    }
    found = {
        method: {key: mean(m[method][key] for m in by_matrix.values()) for key in ("seconds", "in_sample", "next_step")}
        for method in next(iter(by_matrix.values()))
    }
    return {
        "mean": found,
        "num_matrices": len(by_matrix),
        "smaller_sides": sorted({a.shape[0] for a in now.values()}),
        "rank": rank,
        "num_tokens": ROWS * config.data.sequence_length,
    }


# ---------------------------------------------------------------- the report


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)] + [""]


def part_rows(by_name: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each measurement: seconds of each part, their sum, and the sum as a share of an ordinary step."""
    rows = []
    for name, found in by_name.items():
        total = sum(found["parts"].values())
        cells = [f"{found['parts'].get(part, 0.0):.3f}" for part in PARTS]
        more = found["reinit_step"] - found["ordinary_step"]
        rows.append([name, *cells, f"{total:.2f}", f"{more:.2f}", f"{found['ordinary_step']:.2f}"])
        rows[-1].append(f"{total / found['ordinary_step']:.2f}")
    return rows


def report(record: dict[str, Any]) -> str:
    """README of the numbers."""
    lines = [
        "# Re-initialization: what it costs, and what its ways to P are worth",
        "",
        *(__doc__ or "").split("\n")[1:],
    ]
    heads = [*PARTS.values(), "sum", "step longer by", "ordinary step", "sum / step"]
    if shapes := record.get("shapes"):
        threads = {found["num_threads"] for found in shapes.values()}
        how = f"one process, {', '.join(map(str, sorted(threads)))} threads"
        lines += [f"## The parts, in seconds ({how})", ""]
        named = {f"{name} ({', '.join(found['methods'])})": found for name, found in shapes.items()}
        lines += table(["shape:rank", *heads], part_rows(named))
    if ranks := record.get("ranks"):
        lines += [f"## Over processes: {ranks['shape']}, one thread each, ZeRO-2, {ROWS} rows in all", ""]
        named = {
            f"{size}, rank {number}: {found['owned']} of {found['num_layers']} matrices": found
            for size, every in ranks["worlds"].items()
            for number, found in enumerate(every)
        }
        lines += table(["processes", *heads], part_rows(named))
    if counted := record.get("operations"):
        lines += ["## Operations, by the formulas of loqt_ds/operations.py (time: not measured)", ""]
        lines += [f"A step of {NUM_TOKENS_COUNTED:,} tokens in micro-batches of {ROWS * LENGTH:,}; products only.", ""]
        names = list(next(iter(counted.values())))
        rows = [[recipe, *(f"{parts[name]:.3g}" for name in names)] for recipe, parts in counted.items()]
        lines += table(["shape:rank", *(name if name != "step" else "an ordinary step" for name in names)], rows)
    for name, found in record.get("ways", {}).items():
        sides = ", ".join(map(str, found["smaller_sides"]))
        lines += [f"## Ways to P: {name}", ""]
        lines += [
            f"{found['num_matrices']} matrices (smaller side {sides}), rank {found['rank']}, {found['num_tokens']:,} "
            "tokens a gradient; means over matrices.",
            "",
        ]
        exact = found["mean"]["exact"]["seconds"]
        rows = [
            [method, f"{row['seconds'] / exact:.2f}" if row["seconds"] else "–"]
            + [f"{row['in_sample']:.4f}", f"{row['next_step']:.4f}"]
            for method, row in found["mean"].items()
        ]
        lines += table(["method", "time / exact", "energy in sample", "energy of the next step"], rows)
    if loss := record.get("loss"):
        lines += ["## Effect on the loss (tools/compare_option.py loqt.subspace ...)", ""]
        lines += [f"Overrides: {' '.join(loss['overrides']) or 'none'}.", ""]
        rows = [
            [value, f"{row['validation_loss_mean']:.4f} ± {row['validation_loss_std']:.4f}"]
            + [f"{row['minus_first_mean']:+.4f} ± {row['minus_first_std']:.4f}"]
            for value, row in loss["summary"].items()
        ]
        lines += table(["loqt.subspace", f"held-out loss, {loss['num_seeds']} seeds", "less the first's"], rows)
    where = record["machine"]
    lines += [
        "![parts](parts.png)",
        "",
        f"Machine: {where['device']}; torch {where['torch']}; commit {where['commit']};",
    ]
    return "\n".join([*lines, f"load average at the last measurement: {where['load']}.", ""])


def plot(record: dict[str, Any], path: Path) -> None:
    """Parts of a re-initialization as shares of an ordinary step, one bar for each shape and rank."""
    import matplotlib.pyplot as plt

    bars = dict(record.get("shapes", {}))
    for size, every in record.get("ranks", {}).get("worlds", {}).items():
        bars |= {f"{record['ranks']['shape']}\n{size} processes, rank {i}": found for i, found in enumerate(every)}
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(bars) + 1.6))
    start = [0.0] * len(bars)
    for part, label in PARTS.items():
        widths = [found["parts"].get(part, 0.0) / found["ordinary_step"] for found in bars.values()]
        axes.barh(list(bars), widths, left=start, label=label)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    axes.set_xlabel("seconds of a re-initialization / seconds of an ordinary step")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(record: dict[str, Any], output: Path) -> None:
    """The record, its README and its plot; a record that is half written never takes the place of another."""
    from fit import machine

    record["machine"] = machine(torch.device("cpu")) | {"load": round(os.getloadavg()[0], 1)}
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / "results.json.new"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(output / "results.json")
    (output / "README.md").write_text(report(record))
    plot(record, output / "parts.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="NAME:RANK")
    parser.add_argument("--num-reinits", type=int, default=2, help="re-initializations after the first, of each shape")
    parser.add_argument("--ranks", type=int, nargs="*", default=(1, 2, 4), metavar="N", help="numbers of processes")
    parser.add_argument("--ranks-shape", default="llama_60m:128")
    parser.add_argument("--model", type=Path, help="a dense export of a trained run: the ways to P, and nothing else")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=20, help="batches that make the first moment")
    parser.add_argument("--loss", type=Path, help="results.json of compare_option.py, and nothing else")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", help="options of all runs (after --)")
    options = parser.parse_intermixed_args(arguments)
    if options.model is not None and options.text is None:
        parser.error("--model needs --text: what the model reads")
    stored = options.output / "results.json"
    record: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {}
    if options.loss is not None:
        compared = json.loads(options.loss.read_text())
        overrides = [word for word in compared["options"] if word.startswith("train.max_steps")]
        num_seeds = len(next(iter(compared["runs"].values())))
        record["loss"] = {"summary": compared["summary"], "overrides": overrides, "num_seeds": num_seeds}
    elif options.model is not None:
        found = ways(options.model, options.text, options.rank, options.num_steps)
        record.setdefault("ways", {})[f"{options.model.name}, rank {options.rank}"] = found
    else:
        record["operations"] = {name: count_operations(name) for name in COUNTED}
        for shape in options.shapes:
            record.setdefault("shapes", {})[shape] = one_process(shape, options.overrides, options.num_reinits)
            write(record, options.output)
            print(f"{shape} done", flush=True)
        for size in options.ranks:
            every = several_processes(size, options.ranks_shape, options.overrides)
            if record.get("ranks", {}).get("shape") != options.ranks_shape:
                record["ranks"] = {"shape": options.ranks_shape, "worlds": {}}
            record["ranks"]["worlds"][str(size)] = every
            write(record, options.output)
            print(f"{size} processes done", flush=True)
    write(record, options.output)
    print(report(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
