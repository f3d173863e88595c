"""Training runs in processes that can be killed; they are forked from a server that has the imports done."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["killable", "loqt_ds.run", "loqt_ds.finish", "loqt_ds.engines.deepspeed"]


def _train(arguments: list[str], deepspeed: bool, log: str, variables: dict[str, str]) -> None:
    from loqt_ds.train import main

    os.environ |= variables
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    raise SystemExit(main(arguments, launched=deepspeed))


def start(arguments: list[str], *, log: Path, deepspeed: bool = False, **variables: str) -> ForkServerProcess:
    """Begins `loqt_ds.train.main` in a process of its own; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_train, args=(arguments, deepspeed, str(log), variables))
    process.start()
    return process


def run_ranks(arguments: list[list[str]], *, folder: Path) -> tuple[list[int], list[str]]:
    """Runs one process of `launch/pretrain.py` for each list of arguments, as ranks of one run, to the end; statuses
    and what was printed, by rank."""
    port = free_port()
    logs = [folder / f"rank_{rank}.log" for rank in range(len(arguments))]
    processes = [
        start(
            own,
            log=logs[rank],
            deepspeed=True,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(len(arguments)),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            DS_ACCELERATOR="cpu",
        )
        for rank, own in enumerate(arguments)
    ]
    try:
        return [finish(process) for process in processes], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], process: ForkServerProcess, *, seconds: float = 120) -> None:
    """Returns when the condition holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.005)


def finish(process: ForkServerProcess, *, seconds: float = 240) -> int:
    """Waits for the end; the exit status (negative: the signal)."""
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode
