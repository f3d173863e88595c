"""Operations of a contender's step: what the counts promise beside what `tools/benchmark.py` measures."""

from __future__ import annotations

from functools import cache
from typing import Any

from rivals import Setup, parse, run_options

from loqt_ds.memory import describe
from loqt_ds.operations import step_work, total

PROJECTIONS = {"galore": 2, "qgalore": 2, "apollo": 1, "apollomini": 1}  # of each gradient, a step
ADAPTERS = ("lora", "qlora", "loftq", "relora")


@cache
def operations(setup: Setup, name: str) -> int:
    """Of the matrix products of one ordinary step of one micro-batch, head and attention included.

    LoQT and full rank are `loqt_ds.operations`'. Beside full rank, GaLore and Q-GaLore project every gradient forth and
    its update back, 4 m n r, and APOLLO forth, 2 m n r (r is 1 for APOLLO-Mini), once a step. LoRA and its kin have no
    gradient of W, which saves 2 m n a token, and adapters A (r, n) and B (m, r), 6 r (m + n) a token.
    """
    method, rank = parse(name)
    config = setup.config(f"loqt.rank={rank or 1}", *run_options(name))
    facts = describe(config)
    ours = method.startswith("loqt")
    count = total(step_work(config, facts=facts, full_rank=not ours).values()).operations
    if ours:
        return count
    for layer in facts.layers:
        m, n = layer.weight_shape
        if method in PROJECTIONS:
            count += 2 * PROJECTIONS[method] * m * n * (rank or 1)
        elif method in ADAPTERS:
            assert rank is not None
            count += setup.rows * setup.length * (6 * rank * (m + n) - 2 * m * n)
    return count


def promised(cell: dict[str, Any], name: str, base: str) -> float | None:
    """The ratio of a contender's operations to those of `base`; None where the shape is not there any more."""
    names = ("shape", "dtype", "rows", "length", "num_layers")
    setup = Setup(**{name: cell[name] for name in names})
    try:
        own, other = operations(setup, name), operations(setup, base)
    except ValueError:
        return None
    return own / other
