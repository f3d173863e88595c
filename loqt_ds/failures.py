"""One voice for many processes: what went wrong is said once, and ends the run on all ranks.

A rank that fails writes a report to the store of the process group; whoever is the first to do so speaks. The others,
whose connections break next, find the report and end without a word. Each rank watches the store from a thread, so that
it ends even while it waits inside a collective for a rank that will not come.

A rank that finds no report behind its broken connection asks who is left. One of those that answer says which ranks
vanished (killed by the kernel for want of memory, a node that is gone). Rank 0 usually hosts the store: if the store is
gone so is rank 0, and the survivors settle who speaks by creating a file that only one of them can create.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from loqt_ds.ranks import ALONE, PeerFailed, Ranks
from loqt_ds.stopping import Interrupted

T = TypeVar("T")

FAILED = 1

_POLL_SECONDS = 0.5
_MAIN_FIRST_SECONDS = 0.5  # an error that all ranks have is rank 0's to tell
_REPORT_SECONDS = 1.0  # to wait for the report of a rank whose connection broke
_ROLL_CALL_SECONDS = 3.0  # to wait for the answers of the others
_LINGER_SECONDS = 10.0  # of rank 0, which hosts the store, for the others to read it
_END_SECONDS = 5.0  # for the main thread to end by itself once there is a report
_STORE_SECONDS = 10.0  # for the store to answer a rank that has failed
_GONE = "was killed (by the system, for want of memory?), crashed, or its node is gone"


@dataclass
class Report:
    """What the speaking rank leaves for the others."""

    rank: int
    status: int
    text: str
    missing: list[int]


class Voice:
    """Says what went wrong, once, and ends the process.

    Args:
        ranks: the processes that train together; with one, this only prints.
        timeout_seconds: of a collective, as the user set it.
    """

    def __init__(self, ranks: Ranks = ALONE, *, timeout_seconds: int | None = None) -> None:
        self.ranks = ranks
        self.directory: Path | None = None  # of the run, where a file can be seen by all ranks
        self.advice: Callable[[], str] = lambda: ""  # where to go on from
        self._timeout = timeout_seconds
        self._num_turns = 0
        self._heard: Report | None = None  # the report, once this rank has read it
        self._lock = threading.RLock()
        self._failing, self._closed = threading.Event(), threading.Event()
        if ranks.world_size > 1:
            from torch.distributed.distributed_c10d import _get_default_store

            store: Any = _get_default_store()
            # Connections of their own: an operation that waits blocks the others of its connection.
            self._store: Any = store.clone()
            self._token = ranks.on_main(lambda: uuid.uuid4().hex)
            self._watcher = threading.Thread(target=self._watch, args=(store.clone(),), name="failures", daemon=True)
            self._watcher.start()

    # ---------------------------------------------------------------- waiting without a limit

    def in_turn(self, is_first: bool, action: Callable[[], T]) -> T:
        """All ranks do `action`; those with `is_first` before the others. However long they take, no collective waits
        for them. Raises PeerFailed if another rank has failed meanwhile."""
        if self.ranks.world_size == 1:
            return action()
        key, self._num_turns = f"turn/{self._num_turns}", self._num_turns + 1
        (num_first,) = self.ranks.sum_numbers(int(is_first))
        result: list[T] = []
        if is_first:
            result.append(action())
            self._store.add(_key(key), 1)
        while self._store.add(_key(key), 0) < num_first:
            if (report := self._report()) is not None:
                raise PeerFailed(report.rank, report.text)
            time.sleep(0.05)
        return result[0] if is_first else action()

    def on_main(self, action: Callable[[], T]) -> T:
        """`Ranks.on_main` for what may take longer than a collective waits."""
        result: list[T] = []
        if self.ranks.world_size == 1:
            return action()
        self.in_turn(self.ranks.is_main, lambda: result.append(action()) if self.ranks.is_main else None)
        return self.ranks.on_main(lambda: result[0])

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """The run is over for all ranks, and well: from here on nobody is missed. Collective."""
        if self.ranks.world_size > 1 and not self._closed.is_set():
            self._closed.set()  # before the others can leave
            with contextlib.suppress(Exception):  # whoever is late finds the others gone, which is no harm any more
                self.ranks.barrier()
            # A thread that the interpreter's end meets inside the store takes the process down with it.
            self._watcher.join(_STORE_SECONDS)

    def end(self, error: BaseException, text: str, *, status: int = FAILED, with_traceback: bool = False) -> int:
        """Tells of an error and returns the status to exit with; with several ranks it does not return, but ends the
        process, in which other threads may still wait for ranks that are gone.

        Args:
            error: what was caught. PeerFailed, and errors of a broken connection, are another rank's to tell.
            text: what to say if this rank is the one to speak, without "error: " where it is none.
        """
        if self.ranks.world_size == 1 or self._closed.is_set():
            self._print(text, with_traceback)
            return status
        self._failing.set()
        self._store = _Patient(self._store)
        for signum in (signal.SIGTERM, signal.SIGINT):  # the launcher's, for this very failure
            signal.signal(signum, signal.SIG_IGN)
        if isinstance(error, Interrupted) and error.everywhere:
            if self.ranks.is_main:
                self._print(text, False)
            self.close()
            self._exit(status)
        try:
            if not isinstance(error, PeerFailed) and is_broken_connection(error):
                report = self._lost(error)
            else:
                report = self._tell(text, status, own=not isinstance(error, PeerFailed), with_traceback=with_traceback)
            self._linger(report)
        except Exception as store_error:
            if not is_broken_connection(store_error):
                raise
            if self._heard is None:  # else rank 0 has just ended in good order
                self._host_is_gone(silent=isinstance(store_error, _SilentStore))
        self._exit(status if self._heard is None else self._heard.status)

    def _tell(self, text: str, status: int, *, own: bool, with_traceback: bool = False) -> Report | None:
        """Speaks, unless another rank has or is about to."""
        wait = (0 if self.ranks.is_main else _MAIN_FIRST_SECONDS) if own else _REPORT_SECONDS + _END_SECONDS
        if (report := self._wait_for_report(wait)) is None:
            report = Report(self.ranks.rank, status, text, [])
            if self._claim(report):
                self._print(text, with_traceback)
            else:
                report = self._wait_for_report(_END_SECONDS)
        return report

    def _lost(self, error: BaseException) -> Report | None:
        """The connection to other ranks broke, or they did not answer: theirs is the word, if they have any."""
        self._store.set(_key("lost"), "1")
        self._store.set(_key(f"here/{self.ranks.rank}"), "waits")
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        if (report := self._wait_for_report(_REPORT_SECONDS)) is not None:
            return report
        while len(self._roll()) < self.ranks.world_size and time.monotonic() < deadline:
            if (report := self._report()) is not None:
                return report
            time.sleep(0.05)
        here = self._roll()
        missing = [rank for rank in range(self.ranks.world_size) if rank not in here]
        busy = [rank for rank, state in here.items() if state == "busy"]
        text = f"error: {self._what_was_lost(error, missing, busy)}. {self.advice()}".strip()
        report = Report(self.ranks.rank, FAILED, text, missing)
        if self._claim(report):
            self._print(text, False, of_all=True)
            return report
        return self._wait_for_report(_END_SECONDS)

    def _what_was_lost(self, error: BaseException, missing: list[int], busy: list[int]) -> str:
        timed_out = any(word in str(error).lower() for word in ("timed out", "timeout"))
        limit = f"within train.collective_timeout_seconds={self._timeout}"
        if missing:
            who = _names(missing)
            return f"{who} did not answer {limit}: it hangs, or {_GONE}" if timed_out else f"{who} vanished: it {_GONE}"
        if timed_out:
            who = _names(busy) if busy else "a rank"
            return f"{who} did not answer {limit}: it hangs, or needs more time (then raise the option)"
        first_line = str(error).strip().splitlines()[0]
        return f"the connection between the ranks broke ({first_line})"

    def _host_is_gone(self, *, silent: bool = False) -> None:
        """The store is gone, and with it rank 0 (or the launcher, where that one hosts it); or it is silent."""
        with self._lock:
            directory = self.directory if self.directory is not None else Path(tempfile.gettempdir())
            file = directory / f".last-word-{self._token}"
            try:
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except OSError:  # another rank speaks
                return
            who = "the launcher" if "TORCHELASTIC_USE_AGENT_STORE" in os.environ else "rank 0"
            how = f"does not answer: it hangs, or {_GONE}" if silent else f"vanished: it {_GONE}"
            self._print(f"error: {who} {how}. {self.advice()}".strip(), False, of_all=True)
            time.sleep(_END_SECONDS)  # until the other ranks have tried to create the file
            with contextlib.suppress(OSError):
                file.unlink()

    def _linger(self, report: Report | None) -> None:
        """Rank 0 takes the store with it when it ends: not before all that are left have read the report."""
        self._store.set(_key(f"heard/{self.ranks.rank}"), "1")
        missing = report.missing if report is not None else []
        others = [rank for rank in range(1, self.ranks.world_size) if rank not in missing]
        deadline = time.monotonic() + _LINGER_SECONDS
        while self.ranks.is_main and time.monotonic() < deadline:
            if self._store.check([_key(f"heard/{rank}") for rank in others]):
                return
            time.sleep(0.05)

    def _print(self, text: str, with_traceback: bool, *, of_all: bool = False) -> None:
        if with_traceback:
            traceback.print_exc()
        if self.ranks.world_size > 1 and text.startswith("error: ") and not of_all:
            text = f"error (rank {self.ranks.rank}): {text.removeprefix('error: ')}"
        print(text, file=sys.stderr, flush=True)

    def _exit(self, status: int) -> NoReturn:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Interpreter and libraries would wait for threads that wait for ranks that are gone.
        os._exit(status)

    # ---------------------------------------------------------------- the store

    def _claim(self, report: Report) -> bool:
        """Whether this rank is the one to speak; its report is then there for the others."""
        if self._store.add(_key("claims"), 1) != 1:
            return False
        self._store.set(_key("report"), json.dumps(asdict(report)))
        self._heard = report
        return True

    def _report(self, store: Any = None) -> Report | None:
        store = self._store if store is None else store
        if self._heard is None and store.check([_key("report")]):
            self._heard = Report(**json.loads(store.get(_key("report"))))
        return self._heard

    def _wait_for_report(self, seconds: float) -> Report | None:
        deadline = time.monotonic() + seconds
        while (report := self._report()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return report

    def _roll(self) -> dict[int, str]:
        """Which ranks have answered, and what they do: "waits" for others, or is "busy"."""
        found = {}
        for rank in range(self.ranks.world_size):
            if self._store.check([_key(f"here/{rank}")]):
                found[rank] = self._store.get(_key(f"here/{rank}")).decode()
        return found

    def _watch(self, store: Any) -> None:
        """The thread: answers the roll call, and ends the process when the run has failed and its main thread does not
        notice. A store that is silent but not gone is waited for: its node may only be slow."""
        answered = False
        try:
            while not self._closed.wait(_POLL_SECONDS) and not self._failing.is_set():
                if (report := self._report(store)) is not None:
                    store.set(_key(f"heard/{self.ranks.rank}"), "1")
                    if not self._failing.wait(_END_SECONDS) and not self._closed.is_set():
                        self._exit(report.status)
                    return
                if not answered and store.check([_key("lost")]):
                    answered = True
                    if not self._failing.is_set():
                        store.set(_key(f"here/{self.ranks.rank}"), "busy")
        except Exception:  # the store is gone
            if not self._failing.wait(_END_SECONDS) and not self._closed.is_set():
                self._host_is_gone()
                self._exit(FAILED)


class _SilentStore(RuntimeError):
    """The store did not answer in time."""


class _Patient:
    """A store whose operations end after _STORE_SECONDS: its own wait as long as its host is stopped."""

    def __init__(self, store: Any) -> None:
        self._store, self._is_silent = store, False

    def add(self, key: str, amount: int) -> int:
        return self._do(lambda: self._store.add(key, amount))

    def set(self, key: str, value: str) -> None:
        self._do(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        return self._do(lambda: self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        return self._do(lambda: self._store.check(keys))

    def _do(self, action: Callable[[], T]) -> T:
        result: list[T] = []
        failure: list[Exception] = []

        def work() -> None:
            try:
                result.append(action())
            except Exception as error:
                failure.append(error)

        if not self._is_silent:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(_STORE_SECONDS)
        if failure:
            raise failure[0]
        if not result:
            self._is_silent = True
            raise _SilentStore("the store does not answer")
        return result[0]


def is_broken_connection(error: BaseException) -> bool:
    """Whether an exception says no more than that other ranks are gone or do not answer."""
    import torch.distributed as dist

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError | _SilentStore):
            return True
        # gloo's errors are plain RuntimeErrors
        if isinstance(seen, RuntimeError) and any(word in str(seen) for word in ("gloo/transport", "NCCL")):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def _key(name: str) -> str:
    return f"loqt_ds/{name}"


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
