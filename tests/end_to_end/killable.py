"""Training runs in processes that can be killed; they are forked from a server that has the imports done."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["killable", "loqt_ds.run", "loqt_ds.finish", "loqt_ds.engines.deepspeed"]


def _train(arguments: list[str], deepspeed: bool, log: str) -> None:
    from loqt_ds.train import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    raise SystemExit(main(arguments, deepspeed=deepspeed))


def start(arguments: list[str], *, log: Path, deepspeed: bool = False) -> ForkServerProcess:
    """Begins `loqt_ds.train.main` in a process of its own; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_train, args=(arguments, deepspeed, str(log)))
    process.start()
    return process


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
