"""Several processes under ZeRO-2: seconds and bytes of a step, LoQT beside full rank in the same processes.

    python tools/benchmark.py --suite scaling        # this is its last part
    python tools/benchmark_ranks.py --shape llama_9m:32 --work /tmp/mine

Real processes over gloo, one thread each, bf16 with float32 masters and 32-bit AdamW, both engines alive at once and
taking turns. *Strong*: the rows of a step are shared out; *weak*: every process has as many. Where there are more
processes than cores they share them, and the seconds say so; bytes do not depend on it. A result is a file for each
number of processes and way, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import measure_ranks
import torch
from benchmark_report import spread
from fit import machine
from measure_ranks import Case
from rivals import OnDemand, text_batch

WORLDS = (1, 2, 4)
LENGTH = 256
ROUNDS = 6
REINITS = 3
MB = 1e6
METHODS = {"loqt": "LoQT", "dense": "full rank"}


@dataclass(frozen=True)
class RankCell:
    """rows: of a step (strong), or of each process (weak)."""

    shape: str  # NAME:RANK
    world_size: int
    way: str  # strong or weak
    rows: int

    @property
    def name(self) -> str:
        return f"ranks_{Path(self.shape.partition(':')[0]).stem}_{self.way}_{self.world_size}"

    @property
    def own_rows(self) -> int:
        """Rows of one process."""
        return self.rows // self.world_size if self.way == "strong" else self.rows


def cells(shape: str) -> list[RankCell]:
    """One process is the same in both ways when it has the same rows: strong has 4 rows a step, weak 2 a process."""
    ways = (("strong", 4), ("weak", 2))
    return [RankCell(shape, world_size, way, rows) for way, rows in ways for world_size in WORLDS]


# ---------------------------------------------------------------- on every rank


def take_step(engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of forward, backward (with its reductions) and update on this rank."""
    marks = [time.perf_counter()]
    loss = engine(input_ids=batch["input_ids"], targets=batch["targets"], use_cache=False) / batch["targets"].numel()
    marks.append(time.perf_counter())
    engine.backward(loss)
    marks.append(time.perf_counter())
    engine.step()
    marks.append(time.perf_counter())
    names = ("forward", "backward", "update")
    return {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}


def measure(ranks: Any, cell: RankCell) -> dict[str, Any]:
    """Both methods, in turns. Collective; rank 0's answer counts."""
    from loqt_ds.method import head

    options = [*measure_ranks.shape_options(cell.shape), "optim.name=adamw", "loqt.compensation_steps=5"]
    options += [f"train.micro_batch_size={cell.own_rows}", f"data.sequence_length={LENGTH}"]
    engines: dict[str, Any] = {}
    demand = OnDemand("never", 1, 1.0)
    for method in METHODS:
        case = Case(method)
        engines[method] = measure_ranks.build(case, measure_ranks.make_config(case, options), ranks)
        head.install(engines[method].module)
    engines["loqt"].controller.schedule = demand

    def step(method: str, number: int) -> dict[str, Any]:
        batch = text_batch(cell.own_rows, LENGTH, number * ranks.world_size + ranks.rank)
        frozen = measure_ranks.packed_storages(engines[method]) if method == "loqt" else {}
        counter = measure_ranks.WireCounter(frozen)
        ranks.barrier()
        with counter.counting():
            mine = take_step(engines[method], batch)
            ranks.barrier()
        parts = ranks.gather_objects(mine)
        slowest = max(parts, key=lambda seconds: sum(seconds.values()))
        return {"seconds": slowest, "traffic": counter.by_purpose()}

    rounds: list[dict[str, Any]] = []
    for number in range(2 + ROUNDS):  # two that do not count; the first initializes all layers
        taken = {method: step(method, number) for method in METHODS}
        demand.asked[0] = False
        if number >= 2:
            rounds.append(taken)
    demand.asked[0] = True
    reinits = [step("loqt", 2 + ROUNDS + number) for number in range(REINITS)]
    return {"cell": asdict(cell), "rounds": rounds, "reinits": reinits, "load": os.getloadavg()}


def member(rank: int, world_size: int, port: int, wanted: Sequence[RankCell], work: str) -> None:
    """One process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from loqt_ds.engines.deepspeed import start_distributed

    ranks = start_distributed(timeout_seconds=600)
    for cell in wanted:
        result = measure(ranks, cell) | {"machine": machine(torch.device("cpu"))}
        if ranks.is_main:
            file = Path(work) / f"{cell.name}.json"
            partial = file.with_suffix(".part")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(partial, file)
            print(" | ".join(row(result)), flush=True)
    ranks.barrier()
    os._exit(0)  # without waiting for gloo's threads


def run(shape: str, work: Path, *, measures: bool = True) -> list[dict[str, Any]]:
    """Measures what is not there yet, if it `measures`; returns what there is then, in the order of `cells`."""
    from torch.multiprocessing.spawn import spawn

    wanted = cells(shape)
    for world_size in WORLDS if measures else ():
        missing = [c for c in wanted if c.world_size == world_size and not (work / f"{c.name}.json").is_file()]
        if not missing:
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(member, (world_size, port, missing, str(work)), nprocs=world_size)
    files = [work / f"{cell.name}.json" for cell in wanted]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def points(results: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(method and way, processes, tokens a second), for a plot."""
    found = []
    for result in results:
        cell = RankCell(**result["cell"])
        tokens = cell.own_rows * cell.world_size * LENGTH
        for method, label in METHODS.items():
            speed = tokens / median(total(taken[method]) for taken in result["rounds"])
            found.append((f"{label}, {cell.way}", float(cell.world_size), speed))
    return found


# ---------------------------------------------------------------- tables


HEAD = (
    "shape, way",
    "processes",
    "rows a process",
    "LoQT, ms a step",
    "full rank, ms a step",
    "LoQT / full rank [quartiles]",
    "LoQT, tokens/s",
    "payload of a step, MB: LoQT / full rank",
    "a rank sends ≥, MB: LoQT / full rank",
    "re-initialization adds, s",
    "and MB",
)


def total(taken: dict[str, Any]) -> float:
    return float(sum(taken["seconds"].values()))


def payload(taken: dict[str, Any]) -> float:
    """MB."""
    return sum(size for kinds in taken["traffic"].values() for _, size in kinds.values()) / MB


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    cell = RankCell(**result["cell"])
    times = {method: spread([total(taken[method]) for taken in result["rounds"]]) for method in METHODS}
    low, middle, high = spread([total(taken["loqt"]) / total(taken["dense"]) for taken in result["rounds"]])
    last = result["rounds"][-1]
    sends = {method: measure_ranks.sent_in(last[method], cell.world_size) / MB for method in METHODS}
    added = median(map(total, result["reinits"])) - median(total(taken["loqt"]) for taken in result["rounds"])
    tokens = cell.own_rows * cell.world_size * LENGTH
    return [
        f"{cell.shape}, {cell.way}",
        str(cell.world_size),
        str(cell.own_rows),
        *(f"{1000 * times[method][1]:,.0f}" for method in METHODS),
        f"{middle:.3f} [{low:.3f}, {high:.3f}]",
        f"{tokens / times['loqt'][1]:,.0f}",
        " / ".join(f"{payload(last[method]):.1f}" for method in METHODS),
        " / ".join(f"{sends[method]:.1f}" for method in METHODS),
        f"{added:.2f}",
        f"{payload(result['reinits'][-1]) - payload(last['loqt']):.1f}",
    ]


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    rows = [HEAD, ["---"] * len(HEAD), *map(row, results)]
    where = results[0]["machine"]
    return [
        "## Processes under ZeRO-2, over gloo",
        "",
        *("| " + " | ".join(cells_of_row) + " |" for cells_of_row in rows),
        "",
        f"{os.cpu_count()} cores of {where['device']}, one thread a process: more processes than cores share them. "
        f"torch {where['torch']}, commit {where['commit']}.",
        "",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama_35m:96", metavar="NAME:RANK", help="default: %(default)s")
    parser.add_argument("--work", type=Path, required=True, help="directory of the results")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    print("\n".join(table(run(options.shape, options.work))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
