"""What several ranks exchange in a step, and what each of them keeps: counted, beside the formulas.

    python tools/measure_ranks.py                       # two shapes, 1, 2 and 4 processes on this machine, no data

Every case trains four steps on random tokens under ZeRO or FSDP2, in real processes over gloo: the first
initialization, an ordinary step, a re-initialization and an ordinary step of two micro-batches; so does the dense model
of the same shape with the same optimizer.

Bytes: see `ranks_wire`. A second counter sits in torch's dispatcher, a third is the loopback interface's.

Memory: tensors that are alive between the two micro-batches, each storage once; and the most that is alive at once
while the model is made and in the steps, beside the planner's phases. See `ranks_memory`.

Everything is per rank. Results go to benchmarks/results/ranks (`ranks_report`); options after `--` are overrides of all
cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ranks_cases import CASES, RECIPES, SHORT_CASES, STEPS, Case
from ranks_memory import LiveBytes, all_tensors, buckets, census, network_of, packed_tensors, planned, storages
from ranks_report import plot, report
from ranks_wire import DispatchCounter, WireCounter, formula, loopback_bytes, num_bytes, sent_in
from torch import nn

__all__ = ["Case", "WireCounter", "build", "make_config", "measure", "packed_storages", "sent_in", "shape_options"]

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results/ranks"
SHAPES = ("llama_9m:32", "llama_60m:128")
NUM_TOKENS = 16  # of a micro-batch; no byte counted here depends on it, or on loqt.compensation_steps
OPTIONS = f"""
    loqt.schedule=static loqt.interval=2 loqt.compensation_steps=1 optim.name=adamw8bit train.device=cpu
    train.micro_batch_size=1 train.max_steps=100 data.sequence_length={NUM_TOKENS} train.lean_activations=false
"""


# ---------------------------------------------------------------- one case, on every rank


def make_config(case: Case, overrides: Sequence[str]) -> Any:
    from loqt_ds.config import load_config

    return load_config(None, [*OPTIONS.split(), *case.options(), *overrides])


def zero_config(case: Case) -> dict[str, Any]:
    """Buckets of the shipped configurations; DeepSpeed's own are of 5e8 elements."""
    zero = {"stage": int(case.engine[-1]), "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    return {"zero_optimization": zero, "steps_per_print": 10**9}


def build(case: Case, config: Any, ranks: Any, *, description: Any = None) -> Any:
    """The engine of a case, of the shape that `config` or `description` says."""
    from loqt_ds.method.description import model_description

    description = description or model_description(config)
    return (build_zero if case.is_zero else build_fsdp)(case, config, ranks, description)


def build_zero(case: Case, config: Any, ranks: Any, description: Any) -> Any:
    import deepspeed

    from loqt_ds.engines.deepspeed import LoQTEngine
    from loqt_ds.engines.ds_config import check_deepspeed
    from loqt_ds.method import head
    from loqt_ds.method.conversion import build_model, initializer
    from loqt_ds.method.description import training_dtype
    from loqt_ds.optim import RoundingAdam, build_optimizer, parameter_groups

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(zero_config(case), file)
        file.flush()
        ds_config = check_deepspeed(file.name, config)
    if case.method == "loqt":
        model, source = build_model(description, config.loqt, initializer(0), dtype=training_dtype(config), ranks=ranks)
        head.install(model)
        return LoQTEngine(model, config, ds_config, ranks=ranks, original=source.weight)
    dense = dense_model(description, config)
    groups = [
        {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
        for group in parameter_groups(dense, config.optim)
    ]

    def optimizer(given: Any) -> torch.optim.Optimizer:
        rounds = config.optim.master == "bf16"
        return RoundingAdam(given, config.optim, seed=0) if rounds else build_optimizer(given, config.optim)

    return deepspeed.initialize(model=dense, optimizer=optimizer, model_parameters=groups, config=ds_config)[0]


def build_fsdp(case: Case, config: Any, ranks: Any, description: Any) -> Any:
    from loqt_ds.engines.fsdp import FSDPEngine, Sharding
    from loqt_ds.method import head
    from loqt_ds.method.conversion import build_model, initializer
    from loqt_ds.method.description import training_dtype
    from loqt_ds.method.structure import blocks

    sharding = Sharding(config, ranks)
    if case.method == "loqt":
        options: dict[str, Any] = {"dtype": training_dtype(config), "ranks": ranks, "shard": sharding.shard}
        model, source = build_model(description, config.loqt, initializer(0), **options)
        original = source.weight
    else:
        model, original = dense_model(description, config), None
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for block in blocks(model, linears).values():
            sharding.shard(model, block)
    head.install(model)
    return FSDPEngine(model, config, sharding, original=original, rebuild=lambda: nn.Module())


def dense_model(description: Any, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from loqt_ds.method import head
    from loqt_ds.method.description import training_dtype

    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(description, dtype=training_dtype(config)).train()
    head.install(dense)
    return dense


def meta_model(case: Case, config: Any, description: Any) -> nn.Module:
    """The model of a case without its weights."""
    from loqt_ds.method.conversion import build_meta
    from loqt_ds.method.description import training_dtype

    if case.method == "loqt":
        return build_meta(description, config.loqt, dtype=training_dtype(config))
    with torch.device("meta"):
        return dense_model(description, config)


def accumulate(engine: Any, num_steps: int) -> None:
    """Makes the next step one of that many micro-batches."""
    if hasattr(engine, "set_train_batch_size"):
        engine.set_train_batch_size(num_steps * engine.world_size)
        engine.micro_steps = num_steps * engine.global_steps
    else:
        engine._config.train.gradient_accumulation_steps = num_steps


def train_step(engine: Any, num_steps: int, after_backward: Callable[[], None]) -> Any:
    """One step on random tokens; what the engine reports. `after_backward`: called after each micro-batch's."""
    report = None
    described: Any = network_of(engine).config
    for _ in range(num_steps):
        ids = torch.randint(0, described.vocab_size, (1, NUM_TOKENS + 1), device=engine.device)
        engine.backward(engine(input_ids=ids[:, :-1], targets=ids[:, 1:], use_cache=False) / NUM_TOKENS)
        del ids
        after_backward()
        report = engine.step()
    return report


def packed_storages(engine: Any) -> dict[int, str]:
    """Storage address -> "w" or "p", of what holds them whole."""
    found = packed_tensors(engine).items()
    return {address: name for name, tensors in found for address in storages(tensors)}


def measure(ranks: Any, case: Case, overrides: Sequence[str], *, description: Any = None) -> dict[str, Any]:
    """Trains a case for a few steps on every rank. Collective; the same result on all ranks."""
    from loqt_ds.memory import division_of
    from loqt_ds.method.description import model_description

    gc.collect()
    before = set(storages(all_tensors()))
    config = make_config(case, overrides)
    description = description or model_description(config)
    ds_config = zero_config(case) if case.is_zero else None
    division = division_of(config, world_size=ranks.world_size, ds_config=ds_config)
    with LiveBytes() as live:
        engine = build(case, config, ranks, description=description)
        peaks = {"start": live.peak}
        torch.manual_seed(ranks.rank)
        steps, memory = take_steps(case, engine, ranks, before, live)
        peaks |= {"step": steps[1].pop("peak"), "re-initialization": steps[2].pop("peak")}
    config = make_config(case, overrides)  # of one micro-batch
    empty = meta_model(case, config, description)
    result = {
        "case": asdict(case),
        "world_size": ranks.world_size,
        "num_trained": sum(parameter.numel() for parameter in empty.parameters() if parameter.requires_grad),
        "steps": steps,
        "formula": formula(empty, config, division),
        "memory": ranks.gather_objects(memory),
        "peaks": ranks.gather_objects(peaks),
        "planned": planned(empty, description, config, division),
    }
    if case.is_zero:
        engine.release() if case.method == "loqt" else engine.destroy()
    return result


def take_steps(
    case: Case, engine: Any, ranks: Any, before: set[int], live: LiveBytes
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What is exchanged in each of STEPS, and what this rank keeps between the micro-batches of the last."""
    cast: list[int] = [0]  # bytes of the gradients that each call of ZeRO's optimizer is given
    if case.is_zero:
        engine.optimizer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: cast.append(
                sum(num_bytes(t.grad) for g in optimizer.param_groups for t in g["params"] if t.grad is not None)
            )
        )
    steps: list[dict[str, Any]] = []
    alive: list[dict[str, int]] = []  # after each backward
    bucket: list[int] = []  # bytes of buckets when gradients are about to be exchanged
    num_groups = 2 if case.engine == "hybrid" else 1
    for name in STEPS:
        num_micro_batches = 2 if name == "accumulated" else 1
        if num_micro_batches > 1:
            accumulate(engine, num_micro_batches)
        counter = WireCounter(packed_storages(engine), lambda: bucket.append(sum(storages(buckets(engine)).values())))
        second = DispatchCounter(ranks.world_size // num_groups)
        live.restart()
        ranks.barrier()
        bytes_before = loopback_bytes()
        with counter.counting(), second:
            report = train_step(engine, num_micro_batches, lambda: alive.append(census(engine, before)))
        ranks.barrier()
        on_loopback = loopback_bytes() - bytes_before
        if case.method == "loqt":
            assert (report.reinit is not None) == (name in ("first", "reinit")), "a step is not what it should be"
        record = {"step": name, "traffic": counter.by_purpose(), "dispatched": second.total, "sent": counter.sent}
        records = ranks.gather_objects(record)
        if num_groups == 1:
            assert all(other == record for other in records), "the ranks do not count the same"
        steps.append(mean_of(records) | {"loopback": on_loopback, "peak": live.peak})
    memory = alive[3] | {
        "gradients at the end": alive[1]["gradients"],
        "bucket when reduced": max(bucket, default=0),
        "gradients cast": max(cast),
        "gathered": alive[2]["other"] - alive[1]["other"],  # for the re-initialization, when its backward is over
    }
    for step in (steps[0], steps[3]):
        del step["peak"]
    return steps, memory


def mean_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks have counted in a step, averaged: of a layer's bytes in shards only its owner's group counts the
    exchange."""
    traffic: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for purpose, kinds in record["traffic"].items():
            for kind, (number, size) in kinds.items():
                entry = traffic.setdefault(purpose, {}).setdefault(kind, [0, 0])
                entry[0] += number
                entry[1] += size
    num = len(records)
    for kinds in traffic.values():
        for entry in kinds.values():
            entry[:] = [value // num if value % num == 0 else value / num for value in entry]
    dispatched = [sum(record["dispatched"][index] for record in records) / num for index in (0, 1)]
    sent_bytes = sum(record["sent"] for record in records) / num
    return {"step": records[0]["step"], "traffic": traffic, "dispatched": dispatched, "sent": sent_bytes}


# ---------------------------------------------------------------- processes


def _member(rank: int, world_size: int, port: int, shapes: Sequence[str], overrides: Sequence[str], path: str) -> None:
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
    results: dict[str, list[dict[str, Any]]] = {}
    for number, shape in enumerate(shapes):
        for case in CASES if number == 0 else SHORT_CASES:
            if world_size < case.least_ranks:
                continue
            result = measure(ranks, case, [*shape_options(shape), *overrides])
            results.setdefault(shape.replace(":", ", rank "), []).append(result)
            if ranks.is_main:
                told = ", ".join(str(value) for value in asdict(case).values())
                print(f"{world_size} ranks, {shape}: {told}", flush=True)
    if ranks.is_main:
        Path(path).write_text(json.dumps(results))
    ranks.barrier()
    os._exit(0)  # without waiting for gloo's threads


def shape_options(shape: str) -> list[str]:
    """The overrides of `NAME:RANK`."""
    name, _, rank = shape.partition(":")
    return [f"model.shape={name}", f"loqt.rank={rank or 32}"]


def run_ranks(world_size: int, shapes: Sequence[str], overrides: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """All cases of all shapes in `world_size` new processes."""
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        path = Path(folder) / "results.json"
        spawn(_member, (world_size, port, tuple(shapes), tuple(overrides), str(path)), nprocs=world_size)
        return json.loads(path.read_text())


def by_formula() -> dict[str, dict[str, int]]:
    """Of recipes too large to run here, and of those that were run: bytes by the formulas, which hold to the byte."""
    from loqt_ds.config import load_config
    from loqt_ds.memory import Division
    from loqt_ds.method.conversion import build_empty
    from loqt_ds.method.description import model_description

    found = {}
    for recipe, num_ranks in RECIPES.items():
        config = load_config(recipe, ["train.dtype=bf16"])
        description = model_description(config)
        model = meta_model(Case("loqt"), config, description)
        zero2 = Division(num_ranks, "flat", num_ranks, gradients=True)
        sharded = Division(num_ranks, "rows", num_ranks, gradients=True, frozen=True)
        steps = {name: sum(sizes.values()) for name, sizes in formula(model, config, zero2).items()}
        rows = {name: sum(sizes.values()) for name, sizes in formula(model, config, sharded).items()}
        found[recipe] = {
            "rank": config.loqt.rank,
            "num_ranks": num_ranks,
            "ordinary": steps["ordinary"],
            "reinit": steps["reinit"],
            "full_rank": 2 * 2 * sum(parameter.numel() for parameter in build_empty(description).parameters()),
            "sharded_ordinary": rows["ordinary"],
            "sharded_reinit": rows["reinit"],
        }
    return found


def by_planner() -> list[dict[str, Any]]:
    """What a rank of the largest recipe needs, with W and P on every rank and in shards."""
    from loqt_ds.config import load_config
    from loqt_ds.memory import describe, division_of, plan

    found = []
    for is_sharded in (False, True):
        config = load_config("fsdp2_70b_8x24gb", [f"fsdp.shard_frozen={str(is_sharded).lower()}"])
        facts = describe(config)
        for num_ranks in (1, 2, 4, 8):
            planned = plan(config, facts=facts, division=division_of(config, world_size=num_ranks))
            found.append(
                {
                    "mode": "sharded" if is_sharded else "on every rank",
                    "num_ranks": num_ranks,
                    "frozen": planned.entries["weights_w"] + planned.entries["projections_p"],
                    "stays": planned.persistent_bytes,
                    "total": planned.total_bytes,
                    "largest": max(planned.phases, key=planned.phase_bytes),
                }
            )
    return found


def provenance() -> dict[str, str]:
    """Where and with what this was measured."""
    from importlib.metadata import version

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": f"{os.cpu_count()} cores of {models[0].split(':')[1].strip() if models else platform.processor()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "bitsandbytes")),
        "commit": git("rev-parse", "--short", "HEAD"),
        "command": shlex.join(["python", "tools/measure_ranks.py", *sys.argv[1:]]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="NAME:RANK", help="of configs/models")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    record: dict[str, Any] = {"provenance": provenance(), "results": {}}
    for world_size in options.ranks:
        for shape, results in run_ranks(world_size, options.shape, options.overrides).items():
            record["results"].setdefault(shape, []).extend(results)
    record |= {"by_formula": by_formula(), "by_planner": by_planner()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "README.md").write_text(report(record))
    plot(record, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
