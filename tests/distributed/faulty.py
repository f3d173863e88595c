"""`launch/pretrain.py`, in which something goes wrong on one rank: what LOQT_FAULTS says, as JSON.

    LOQT_FAULTS='[{"what": "killed in a step", "rank": 1, "step": 5}]' deepspeed tests/distributed/faulty.py ...

Functions of the real program are wrapped; nothing in it knows of this. `step` counts from 0, as the engine does. When a
fault strikes, a line with the time is added to the file LOQT_FAULT_LOG.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

Act = Callable[..., None]


class Moment:
    """Where the run is."""

    step = -1
    trainer: Any = None


def strike(what: str) -> None:
    """Notes that a fault happens now; once for each, however long it lasts."""
    with Path(os.environ["LOQT_FAULT_LOG"]).open("a", encoding="utf-8") as log:
        log.write(json.dumps({"what": what, "rank": int(os.environ["RANK"]), "time": time.time()}) + "\n")


def before(owner: Any, name: str, step: int, act: Act, *, call: int = 1) -> None:
    """Does `act(*arguments)` before call number `call` of a function in step `step`."""
    original, num_calls = getattr(owner, name), 0

    @wraps(original)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += Moment.step == step
        if Moment.step == step and num_calls == call:
            act(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, wrapper)


def end_by(signum: int, what: str) -> Act:
    def act(*_: Any) -> None:
        strike(what)
        os.kill(os.getpid(), signum)

    return act


def raise_(error: Exception, what: str) -> Act:
    def act(*_: Any) -> None:
        strike(what)
        raise error

    return act


def sleep(what: str, seconds: float) -> Act:
    def act(*_: Any) -> None:
        strike(what)
        time.sleep(seconds)

    return act


def engine_class(arguments: list[str]) -> Any:
    """Of the engine that a command line asks for."""
    if "engine=fsdp2" in arguments:
        from loqt_ds.engines.fsdp import FSDPEngine

        return FSDPEngine
    from loqt_ds.engines.deepspeed import LoQTEngine

    return LoQTEngine


def plant(engine: Any, what: str, *, step: int, count: int = 1, layer: int = 0) -> None:
    """Makes `what` happen in step `step` of this process, which trains with an `engine` of that class."""
    import torch

    import loqt_ds.checkpoint.saving as saving
    import loqt_ds.trainer
    from loqt_ds.data.prefetch import StepBatches
    from loqt_ds.method.controller import Controller

    if what == "killed in a step":  # the others are in the engine's reduction
        before(engine, "backward", step, end_by(signal.SIGKILL, what))
    elif what == "killed in a re-initialization":  # one layer of this rank is new already
        before(Controller, "_rebuild", step, end_by(signal.SIGKILL, what), call=2)
    elif what == "killed in a save":  # one group of its part is written
        before(saving, "write_safetensors", step, end_by(signal.SIGKILL, what), call=2)
    elif what == "killed before the rename":  # everything is written, and has no name yet
        before(saving, "_put_in_place", step, end_by(signal.SIGKILL, what))
    elif what == "frozen in a step":  # all its threads
        before(engine, "backward", step, end_by(signal.SIGSTOP, what))
    elif what == "hangs between steps":  # the others are in a sum of ours
        before(StepBatches, "take", step, sleep(what, 3600))
    elif what == "hangs in a step":  # the others are in the engine's reduction
        before(engine, "backward", step, sleep(what, 3600))
    elif what == "out of data":
        before(StepBatches, "take", step, raise_(StopIteration(), what))
    elif what == "unreadable file":
        before(StepBatches, "take", step, raise_(OSError(errno.EIO, "Input/output error", "data.bin"), what))
    elif what == "full disk":  # one group of its part is written
        no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
        before(saving, "write_safetensors", step, raise_(no_space, what), call=2)
    elif what == "bug":
        before(StepBatches, "take", step, raise_(KeyError("no such thing"), what))
    elif what == "out of memory":  # the others are in the engine's reduction
        before(engine, "backward", step, raise_(torch.OutOfMemoryError("CUDA out of memory"), what))
    elif what == "one bit":
        before(StepBatches, "take", step, lambda *_: flip(what, layer))
    elif what == "slow":  # so that a test can do something while steps are taken
        for later in range(step, step + count):
            before(StepBatches, "take", later, sleep(what, 0.5))
    elif what == "NaN":
        summed_loss = loqt_ds.trainer.summed_loss

        def spoiled(*batch: Any) -> torch.Tensor:
            loss = summed_loss(*batch)
            if not step <= Moment.step < step + count:
                return loss
            strike(what)
            return loss * math.nan

        loqt_ds.trainer.summed_loss = spoiled
    else:
        raise ValueError(what)


def flip(what: str, layer: int) -> None:
    """Changes one bit of a layer's 4-bit weights, or of this rank's shard of them."""
    import torch
    from torch.distributed.tensor import DTensor

    from loqt_ds.method.conversion import loqt_layers

    strike(what)
    found = loqt_layers(Moment.trainer._engine.network)
    codes = list(found.values())[layer].w_codes
    local = codes.to_local() if isinstance(codes, DTensor) else codes
    local.view(-1).view(torch.uint8)[7] ^= 16


def watch_steps() -> None:
    from loqt_ds.trainer import Trainer

    begin = Trainer._begin_step

    @wraps(begin)
    def begin_step(self: Any, requests: Any) -> Any:
        Moment.trainer, Moment.step = self, self._engine.step_index
        return begin(self, requests)

    Trainer._begin_step = begin_step  # type: ignore[method-assign]


def main(arguments: list[str] | None = None) -> int:
    from loqt_ds.train import main as train
    from loqt_ds.train import set_environment

    arguments = sys.argv[1:] if arguments is None else arguments
    set_environment()
    watch_steps()
    for fault in json.loads(os.environ.get("LOQT_FAULTS", "[]")):
        if fault.pop("rank") == int(os.environ["RANK"]):
            plant(engine_class(arguments), fault.pop("what"), **fault)
    return train(arguments, launched=True)


if __name__ == "__main__":
    sys.exit(main())
