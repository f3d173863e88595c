"""Which products should a layer make? Factored or merged, apart or concatenated, for layers that share their input.

    python tools/benchmark_products.py

q, k and v, or gate and up, get the same x. Their way forward and back, but for the gradients of B, in four forms, on
random matrices, taking turns:

    factored      for each layer  y = x W_qᵀ + s (x P) Bᵀ,   dx += dy W_q + s (dy B) Pᵀ
    concatenated  the same with x [P1 P2 ...] as one product, and [dy1 B1, dy2 B2, ...] [P1 P2 ...]ᵀ as one
    merged        for each layer  W_eff = W_q + s B Pᵀ, twice,  y = x W_effᵀ,  dx += dy W_eff;  x P, for B's gradient
    dense         for each layer  y = x Wᵀ,  dx += dy W;  and the gradient of W, dyᵀ x

W_q and P are there already dequantized, and P1 P2 ... side by side: what it would take to have them so is not counted
against concatenation. Medians over rounds, and ratios to `factored` of the same round, go to
benchmarks/results/products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fit import machine
from torch import Tensor

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/products"
# Width, its layers' output, how many share the input, rank: q k v and gate up of 60M, 350M and 7B.
GROUPS = [
    *((512, 512, 3, 32), (512, 512, 3, 128), (512, 1376, 2, 32), (512, 1376, 2, 128)),
    *((1024, 1024, 3, 128), (1024, 1024, 3, 256), (1024, 2736, 2, 128), (1024, 2736, 2, 256)),
]
SCALE = 0.5


def forms(
    width: int, length: int, num: int, rank: int, tokens: int, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """The forms of one group, over the same tensors."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).div_(shape[-1] ** 0.5).to(dtype)

    x = random(tokens, width)
    weights, factors = [random(length, width) for _ in range(num)], [random(length, rank) for _ in range(num)]
    side_by_side = random(width, num * rank)
    bases = [part.contiguous() for part in side_by_side.split(rank, dim=1)]
    dys = [random(tokens, length) for _ in range(num)]
    buffer = torch.empty_like(weights[0])
    layers = list(zip(weights, bases, factors, dys, strict=True))

    def factored() -> None:
        for w, p, b, _ in layers:
            (x @ w.t()).addmm_(x @ p, b.t(), alpha=SCALE)
        dx = torch.zeros_like(x)
        for w, p, b, dy in layers:
            dx.addmm_(dy, w).addmm_(dy @ b, p.t(), alpha=SCALE)

    def concatenated() -> None:
        projected = (x @ side_by_side).split(rank, dim=1)
        for (w, _, b, _), part in zip(layers, projected, strict=True):
            (x @ w.t()).addmm_(part, b.t(), alpha=SCALE)
        dx, inner = torch.zeros_like(x), x.new_empty(tokens, num * rank)
        for (w, _, b, dy), part in zip(layers, inner.split(rank, dim=1), strict=True):
            dx.addmm_(dy, w)
            torch.mm(dy, b, out=part)
        dx.addmm_(inner, side_by_side.t(), alpha=SCALE)

    def merged() -> None:
        for w, p, b, _ in layers:
            x @ torch.addmm(w, b, p.t(), alpha=SCALE, out=buffer).t()
            x @ p
        dx = torch.zeros_like(x)
        for w, p, b, dy in layers:
            dx.addmm_(dy, torch.addmm(w, b, p.t(), alpha=SCALE, out=buffer))

    def dense() -> None:
        for w, *_ in layers:
            x @ w.t()
        dx = torch.zeros_like(x)
        for w, _, _, dy in layers:
            dx.addmm_(dy, w)
            dy.t() @ x

    return {"factored": factored, "concatenated": concatenated, "merged": merged, "dense": dense}


def measure(group: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, and of the ratios to `factored`."""
    with torch.no_grad():
        contenders = forms(*group, tokens, dtype)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 2):
            for name, function in contenders.items():
                started = time.perf_counter()
                function()
                if number >= 2:  # the first ones pay for new memory
                    times[name].append(1e3 * (time.perf_counter() - started))
    first = times["factored"]
    ratios = {name: [t / f for t, f in zip(values, first, strict=True)] for name, values in times.items()}
    return {
        "group": list(group),
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
    }


def report(record: dict[str, Any]) -> str:
    """The README."""
    lines = [
        "# Products of a layer: factored, concatenated, merged",
        "",
        "    python tools/benchmark_products.py",
        "",
        "Layers that share their input, forward and back, but for the gradients of B; what each form computes is in",
        "the script. Milliseconds of `factored`, and the others as ratios to it (medians over rounds, taking turns).",
        "",
        "| layers (in, out) | rank | tokens | dtype | factored | concatenated | merged | dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        width, length, num, rank = row["group"]
        ratio = row["ratio"]
        lines.append(
            f"| {num} x ({width}, {length}) | {rank} | {row['tokens']:,} | {row['dtype']} "
            f"| {row['milliseconds']['factored']:.1f} ms | {ratio['concatenated']:.3f} | {ratio['merged']:.3f} "
            f"| {ratio['dense']:.3f} |"
        )
    about = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    lines += ["", f"Machine: {about}. Time on CUDA: not measured.", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.tokens) < 1:
        parser.error(f"--rounds {options.rounds} and --tokens {options.tokens} must be at least 1")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in options.tokens:
            for group in GROUPS:
                rows.append(measure(group, tokens, dtype, options.rounds))
                print(json.dumps(rows[-1]), flush=True)
    record = {"rows": rows, "machine": machine(torch.device("cpu"))}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "README.md").write_text(report(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
