"""Real processes over gloo that run one function, and the engine they train with. Nothing here computes a reference.

    results = launch(2, function, steps=3)      # function(ranks, steps=3) in two processes; its results by rank

The processes are forked from a server that has the imports done (six seconds a process otherwise). A rank that fails
fails the test with its traceback; one that hangs is killed, and where it hung is shown.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, llama_config, lm_loss
from torch import Tensor, nn

from loqt_ds.checkpoint import load_checkpoint, save_checkpoint
from loqt_ds.config import Config, FSDPConfig
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.deepspeed import LoQTEngine, start_distributed
from loqt_ds.engines.ds_config import check_deepspeed
from loqt_ds.engines.fsdp import FSDPEngine, Sharding
from loqt_ds.engines.state import whole_tensors
from loqt_ds.method.conversion import build_meta, build_model, initializer
from loqt_ds.ranks import Ranks

COLLECTIVE_TIMEOUT_SECONDS = 30
GRACE_SECONDS = 10  # for the other ranks to fail as well, once one has
PRELOADED = [
    "pytest",
    "transformers.models.llama.modeling_llama",
    "bitsandbytes",
    "loqt_ds.engines.deepspeed",
    "loqt_ds.engines.fsdp",
    "loqt_ds.run",
    "loqt_ds.finish",
]


# ---------------------------------------------------------------- processes


def start_server() -> None:
    """Starts the process that others are forked from, if it does not run yet."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch loads, in the server
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def launch(
    world_size: int,
    function: Callable[..., Any],
    *,
    timeout_seconds: float = 120,
    collective_timeout_seconds: int = COLLECTIVE_TIMEOUT_SECONDS,
    **arguments: Any,
) -> list:
    """What `function(ranks, **arguments)` returns on each of `world_size` ranks; it must be a function of a module.

    Results may hold what JSON holds, and tensors. Fails the test if a rank raises, dies, or is not done in time.
    """
    start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            multiprocessing.get_context("forkserver").Process(
                target=_member,
                args=(
                    rank,
                    world_size,
                    port,
                    folder,
                    timeout_seconds,
                    collective_timeout_seconds,
                    function,
                    arguments,
                ),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_seconds + GRACE_SECONDS
        running = list(processes)
        while running and time.monotonic() < deadline:
            wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
            for process in [p for p in running if p.exitcode is not None]:
                running.remove(process)
                if process.exitcode:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for process in running:
            process.kill()
            process.join()
        if any(process.exitcode for process in processes):
            pytest.fail(_failures(folder, [process.exitcode for process in processes]), pytrace=False)
        return [torch.load(folder / f"result_{rank}", weights_only=True) for rank in range(world_size)]


def _failures(folder: Path, statuses: list[int | None]) -> str:
    """What the ranks that failed left behind, the first to fail first."""
    found = []
    for rank, status in enumerate(statuses):
        if not status:
            continue
        parts = [folder / f"error_{rank}", folder / f"hang_{rank}", folder / f"output_{rank}"]
        texts = [path.read_text(errors="replace")[-6000:] for path in parts if path.exists()]
        when = parts[0].stat().st_mtime if parts[0].exists() else time.time()
        found.append((when, rank, f"---- rank {rank} ended with status {status}\n" + "\n".join(filter(None, texts))))
    return "\n".join(text for _, _, text in sorted(found))


def _member(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    timeout_seconds: float,
    collective_timeout_seconds: int,
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    """One rank: its exit status is 0 if its result is there."""
    with (folder / f"output_{rank}").open("wb", buffering=0) as output, (folder / f"hang_{rank}").open("w") as hang:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # Also ends a process whose test was killed.
        faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=hang)
        status = 1
        try:
            torch.set_num_threads(1)
            torch.manual_seed(rank)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
            }
            ranks = start_distributed(timeout_seconds=collective_timeout_seconds)
            torch.save(function(ranks, **arguments), folder / f"result_{rank}")
            ranks.barrier()
            status = 0
        except BaseException:
            (folder / f"error_{rank}").write_text(traceback.format_exc())
        os._exit(status)  # without waiting for peers that may be dead


def caught(action: Callable[[], Any]) -> str:
    """ "Type: message" of what `action` raises; empty if it does not."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---------------------------------------------------------------- an engine, and its steps


def lesson(step: int, *, rows: int = 8, length: int = 16) -> Tensor:
    """(rows, length + 1) token ids of a rule that can be learned, a function of the step alone: of three tokens, two
    follow from the one before."""
    draw = torch.Generator().manual_seed(5000 + step)
    ids = torch.randint(0, VOCAB, (rows, length + 1), generator=draw)
    follow = torch.rand(rows, length + 1, generator=draw) < 2 / 3
    for position in range(1, length + 1):
        ids[:, position] = torch.where(follow[:, position], (3 * ids[:, position - 1] + 1) % VOCAB, ids[:, position])
    return ids


def build(
    ranks: Ranks,
    config: Config,
    *,
    stage: int = 2,
    zero: dict[str, Any] | None = None,
    fsdp: dict[str, Any] | None = None,
    shape: dict[str, Any] | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    seed: int = 0,
    description: Any = None,
    **ds_config: Any,
) -> Any:
    """A tiny converted Llama of two layers, or a model of another description, under ZeRO, or, with options of `fsdp`,
    under FSDP2.

    At rank 7 its factors have 5404 elements; of four ranks ZeRO gives each 1351, which ends inside of a layer. `zero`
    is added to the section of that name, other names to the whole. `fsdp` may ask for more groups than there are ranks.
    """
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    description = description or llama_config(**({"num_hidden_layers": 2} | (shape or {})))
    if fsdp is not None:
        return _build_fsdp(ranks, config, fsdp, description, prepare=prepare, seed=seed)
    model, source = build_model(description, config.loqt, initializer(seed), dtype=dtype)
    if prepare is not None:
        prepare(model)
    buckets = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}  # several of each in a step
    given = {"zero_optimization": buckets | {"stage": stage} | (zero or {}), "steps_per_print": 10**9} | ds_config
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(given, file)
        file.flush()
        complete = check_deepspeed(file.name, config)
    return LoQTEngine(model, config, complete, ranks=ranks, original=source.weight)


def _build_fsdp(
    ranks: Ranks,
    config: Config,
    fsdp: dict[str, Any],
    description: Any,
    *,
    prepare: Callable[[nn.Module], None] | None,
    seed: int,
) -> FSDPEngine:
    """As `run.build_engine` has it: the blocks are sharded as they are made, the rest by the engine."""
    options = FSDPConfig(**fsdp)
    options.num_replicas = min(options.num_replicas, ranks.world_size)
    config = replace(config, engine="fsdp2", fsdp=options)
    sharding = Sharding(config, ranks)
    dtype, shard = sharding.dtype, sharding.shard
    model, source = build_model(description, config.loqt, initializer(seed), dtype=dtype, ranks=ranks, shard=shard)
    if prepare is not None:
        prepare(model)

    def rebuild() -> nn.Module:
        return build_meta(description, config.loqt, dtype=dtype)

    return FSDPEngine(model, config, sharding, original=source.weight, rebuild=rebuild)


def _config(engine: Any) -> Config:
    config: Config = engine._loqt_config if isinstance(engine, LoQTEngine) else engine._config
    return config


def step_on(
    engine: Any,
    ids: Tensor,
    *,
    poison: Callable[[int], float] | None = None,
    between: Callable[[int], None] | None = None,
) -> tuple[float, StepReport]:
    """One step on the global batch `ids` (rows, tokens): split over the micro-batches, then over the ranks. Returns the
    mean loss of all, and the report.

    poison: (rank) -> what the loss is multiplied by. between: called after each micro-batch's backward.
    """
    ranks: Ranks = engine.ranks
    num, losses, report = _config(engine).train.gradient_accumulation_steps, [], None
    for number, part in enumerate(ids.chunk(num)):
        own = part.chunk(ranks.world_size)[ranks.rank]
        loss = lm_loss(engine, own)
        engine.backward(loss if poison is None else loss * poison(ranks.rank))
        if between is not None:
            between(number)
        report = engine.step()
        losses.append(loss.item())
    assert report is not None
    every = ranks.gather_objects(losses)
    return sum(map(sum, every)) / (num * ranks.world_size), report


# ---------------------------------------------------------------- what a rank holds


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def held(engine: Any) -> dict[str, str]:
    """Fingerprints of all W, P and B, and of everything else of the model; of what is sharded, whole. Collective."""
    dtype = torch.bfloat16 if _config(engine).train.dtype == "bf16" else torch.float32
    state = dict(engine.network.named_buffers()) | dict(whole_tensors(engine.network, dtype))
    return {name: fingerprint(tensor) for name, tensor in state.items()}


def held_factors(engine: Any) -> dict[str, str]:
    """Fingerprints of W, P and B only."""
    layers = tuple(f"{name}." for name in engine.controller.layers)
    return {name: value for name, value in held(engine).items() if name.startswith(layers)}


def own_state(engine: Any) -> dict[str, str]:
    """Fingerprints of what this rank alone keeps: masters and moments."""
    return {name: fingerprint(tensor) for name, tensor in engine.saved_tensors()["optimizer"].items()}


# ---------------------------------------------------------------- checkpoints


def save(engine: Any, root: Path) -> Path:
    """A checkpoint of all ranks, as the trainer writes one."""
    return save_checkpoint(
        root,
        engine.step_index,
        tensors=engine.saved_tensors(),
        metadata={"engine_state": engine.saved_state()},
        keep=0,
        ranks=engine.ranks,
    )


def restore(engine: Any, path: Path) -> Any:
    engine.restore(load_checkpoint(path))
    return engine
