"""Exact SVD, Gram eigendecomposition and sketch on the same gradients of a trained model: time and captured energy.

    python tools/export.py --checkpoint runs/llama_9m_c4-0001/checkpoints/step_300 --format bf16 --output /tmp/c4_9m
    python tools/benchmark_subspace.py --model /tmp/c4_9m --text ../shared/data/en/c4/c4_en_part1.jsonl.gz

The gradient of each adapted matrix is taken on batch after batch of the text, at fixed weights, and all methods see the
same one. Sketches differ in their columns Ω: Gaussian; orth([M, N]) with M the first moment of B that training would
have (P of an earlier batch, beta 0.9, 20 batches) and N Gaussian; and those that training uses, Gaussian ones iterated
on the first micro-batch, which is all of the batch, half or a quarter of it. "In sample" is the part of this gradient's
energy that P holds; "next step", of the gradient of the batch after it, which is what P is for. Times are of the
decompositions (for sketches with the product A Ω), as ratios to the exact SVD on the same machine; also on one matrix
of the 350M shape with an invented spectrum. Numbers go to benchmarks/results/subspace.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.config import load_config
from loqt_ds.core.subspace import (
    captured_energy,
    exact_basis,
    gram_basis,
    orthonormal,
    power_iterate,
    resolve_side,
    sketch_basis,
    test_matrix,
)
from loqt_ds.data import build_data, load_or_train_tokenizer
from loqt_ds.evaluation import model_inputs, num_predicted, summed_loss
from loqt_ds.method import head
from loqt_ds.method.controller import POWER_ITERATIONS
from loqt_ds.method.conversion import target_linears

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/subspace"
BETA, OVERSAMPLING, SEED = 0.9, 32, 0


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
        "sketch, iterated": sketch(iterated(whole)),
        **{f"sketch, iterated on {name} of the batch": sketch(iterated(part)) for name, part in parts.items()},
        "sketch, from the moment": sketch(seeded),
        "sketch, Gaussian": sketch(orthonormal(start(rank + OVERSAMPLING))),
    }


def seconds(function: Callable[[], Tensor], repeats: int = 5) -> float:
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


def invented(rank: int = 256, shape: tuple[int, int] = (1024, 2736)) -> dict[str, float]:
    """Seconds on one matrix of the 350M shape: singular values falling as 1/√i, a moment that is noisy A^T P."""
    generator = torch.Generator().manual_seed(SEED)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator))
    whole = (left * torch.arange(1, shape[0] + 1).rsqrt()) @ torch.randn(*shape, generator=generator)
    moment = whole.T @ left[:, :rank]
    moment += 0.3 * moment.std() * torch.randn(moment.shape, generator=generator)
    return {name: seconds(function, repeats=3) for name, function in methods(whole, moment, rank, {}).items()}


def report(record: dict[str, Any]) -> str:
    """README of the numbers."""
    rows = []
    for name, row in record["mean"].items():
        ratio = f"{row['time_ratio']:.2f}" if row["time_ratio"] else "–"
        rows.append(f"| {name} | {ratio} | {row['in_sample']:.4f} | {row['next_step']:.4f} |")
    large = record["seconds_1024x2736_rank256"]
    rows_large = [f"| {name} | {value:.3f} | {value / large['exact']:.2f} |" for name, value in large.items()]
    return (
        "# Subspaces: exact, Gram, sketch\n\n" + "\n".join((__doc__ or "").split("\n")[2:4]) + "\n\n"
        f"{record['num_matrices']} matrices of a trained model (smaller side {record['smaller_sides']}, rank "
        f"{record['rank']}, {record['num_tokens']:,} tokens a gradient); means over matrices:\n\n"
        "| method | time / exact | energy in sample | energy of the next step |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nOne 1024 × 2736 matrix, rank 256, invented spectrum (times only):\n\n"
        "| method | seconds | / exact |\n|---|---|---|\n" + "\n".join(rows_large) + "\n\n"
        f"Machine: {record['machine']}, {record['num_threads']} thread, torch {record['torch']}; the cores were shared "
        "with other work, so ratios\nare rough.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a dense (bf16) export of a trained run")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=20, help="batches that make the first moment")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM

    overrides = [f"model.path={options.model.resolve()}", f"data.tokenizer={options.model.resolve()}"]
    config = load_config(None, [*overrides, f"data.path={options.text.resolve()}", "train.micro_batch_size=8"])
    data = build_data(config, load_or_train_tokenizer(config))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    head.install(model)
    linears = target_linears(model, "all-linear")

    def on(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradient(model, linears, batch)

    bases = {name: exact_basis(a, options.rank).vectors for name, a in on(data.train.next_batch()).items()}
    moments = {name: torch.zeros(0) for name in bases}
    for step in range(options.num_steps):
        for name, a in on(data.train.next_batch()).items():
            share = (1 - BETA) * (a.T @ bases[name])  # (l, r): the gradient of B, canonical
            moments[name] = share if step == 0 else BETA * moments[name] + share
    batch = data.train.next_batch()
    now, following = on(batch), on(data.train.next_batch())
    size = config.train.micro_batch_size
    shares = {"half": size // 2, "a quarter": size // 4}
    partial = {name: on({key: tensor[:rows] for key, tensor in batch.items()}) for name, rows in shares.items()}
    by_matrix = {
        name: compare(
            now[name], following[name], moments[name], options.rank, {part: partial[part][name] for part in partial}
        )
        for name in linears
    }
    keys = next(iter(by_matrix.values()))
    means = {
        method: {
            "time_ratio": mean(m[method]["seconds"] / m["exact"]["seconds"] for m in by_matrix.values()),
            "in_sample": mean(m[method]["in_sample"] for m in by_matrix.values()),
            "next_step": mean(m[method]["next_step"] for m in by_matrix.values()),
        }
        for method in keys
    }
    record = {
        "mean": means,
        "seconds_1024x2736_rank256": invented(),
        "num_matrices": len(by_matrix),
        "smaller_sides": ", ".join(str(side) for side in sorted({a.shape[0] for a in now.values()})),
        "rank": options.rank,
        "num_tokens": config.train.micro_batch_size * config.data.sequence_length,
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matrices": by_matrix,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "README.md").write_text(report(record))
    print(report(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
