"""When a run is asked to stop: SIGTERM, SIGINT (Ctrl-C), or the end of the launcher that started it.

While training, a wish to stop is noted and granted between two steps, after a checkpoint. The same signal again means
now, unless it comes at once: launchers pass on a Ctrl-C that the terminal has already sent to every process, and send
SIGTERM more than once.

A launcher that is killed leaves its processes behind; `deepspeed` does so at SIGTERM too (its first process dies, the
second, which started this one, does not hear of it). That is taken as a wish to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

REPEATED_AT_ONCE_SECONDS = 1.0

# In order of precedence, where ranks were asked in different ways.
REASONS = ("SIGINT", "SIGTERM", "the end of its launcher")

_DEEPSPEED = "deepspeed.launcher.launch"


class Interrupted(RuntimeError):
    """The run was asked to stop and did; `signum` is the signal.

    everywhere: whether all ranks stop for it, after the same step.
    """

    def __init__(self, signum: int, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.signum, self.everywhere = signum, everywhere


class Terminated(KeyboardInterrupt):
    """SIGTERM, outside of training."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated`, as SIGINT raises KeyboardInterrupt."""

    def handler(signum: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequests:
    """Inside `with`, a signal is noted instead of ending the process; see `reason`."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._came = 0.0
        self._launcher = _Launcher()

    def __enter__(self) -> StopRequests:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum == self._signal and now - self._came >= REPEATED_AT_ONCE_SECONDS:
            raise Interrupted(signum, f"stopped at once by {signal.Signals(signum).name}.")
        if self._signal is None:
            self._signal, self._came = signum, now

    @property
    def reason(self) -> str | None:
        """Why to stop, of REASONS; None: go on."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return REASONS[2] if self._launcher.is_gone() else None


def signal_of(reason: str) -> int:
    """The signal that the exit status names."""
    return signal.SIGINT if reason == "SIGINT" else signal.SIGTERM


class _Launcher:
    """The processes that started this one, where they are a launcher's that is known to wait for it."""

    def __init__(self) -> None:
        self._parent: int | None = None
        self._grandparent: int | None = None
        parent = os.getppid()
        command = _command(parent)
        if any(name in command for name in (_DEEPSPEED, "torchrun", "torch.distributed.run")):
            self._parent = parent
        # `deepspeed` starts deepspeed.launcher.launch, which starts the ranks.
        if _DEEPSPEED in command and (grandparent := _parent_of(parent)) is not None:
            command = _command(grandparent)
            if "deepspeed" in command and _DEEPSPEED not in command:
                self._grandparent = grandparent

    def is_gone(self) -> bool:
        if self._parent is None:
            return False
        if os.getppid() != self._parent:
            return True
        return self._grandparent is not None and _parent_of(self._parent) != self._grandparent


def _command(pid: int) -> str:
    """The command line of a process; empty where it cannot be known."""
    if sys.platform != "linux":
        return ""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent_of(pid: int) -> int | None:
    try:
        # pid (name) state ppid ...; the name may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
