"""What goes wrong on one of several processes is said once and ends all of them: `failures.Voice`, with real processes.

Each scenario is what one rank does; whatever it raises goes to `Voice.end`, as in `train.main`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ranks as processes
import torch

from loqt_ds.engines.deepspeed import start_distributed
from loqt_ds.failures import Voice, is_broken_connection
from loqt_ds.ranks import PeerFailed
from loqt_ds.stopping import Interrupted

TIMEOUT_SECONDS = 4  # of collectives
ADVICE = "Go on from step_7."


def member(rank: int, world_size: int, port: int, folder: Path, scenario: Callable[[Voice], None]) -> None:
    log = os.open(folder / f"log_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    voice = Voice(start_distributed(timeout_seconds=TIMEOUT_SECONDS), timeout_seconds=TIMEOUT_SECONDS)
    voice.advice, voice.directory = lambda: ADVICE, folder
    voice.ranks.barrier()
    (folder / f"ready_{rank}").touch()
    try:
        scenario(voice)
    except Interrupted as error:
        voice.end(error, str(error), status=128 + error.signum)
    except ValueError as error:
        voice.end(error, f"error: {error}", status=2)
    except Exception as error:
        voice.end(error, f"error: {type(error).__name__}: {error}")
    os._exit(0)


@dataclass
class Ended:
    statuses: list[int]
    said: list[str]  # lines, of all ranks
    seconds: float
    left: list[str]  # names of files that are left behind


def together(world_size: int, scenario: Callable[[Voice], None], folder: Path) -> Ended:
    processes.start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    members = [context.Process(target=member, args=(r, world_size, port, folder, scenario)) for r in range(world_size)]
    for process in members:
        process.start()
    deadline = time.monotonic() + 90
    while len(list(folder.glob("ready_*"))) < world_size and time.monotonic() < deadline:
        time.sleep(0.02)
    began = time.monotonic()
    try:
        for process in members:
            if process.exitcode is None:
                process.join(max(0.1, deadline - time.monotonic()))
        stopped = [process for process in members if process.exitcode is None]
        seconds = time.monotonic() - began
    finally:
        for process in members:
            process.kill()
            process.join()
    logs = [(folder / f"log_{rank}").read_text() for rank in range(world_size)]
    assert not stopped, logs
    # Without what torch tells of connections, in C++: the command line silences it before torch is loaded.
    said = [line for log in logs for line in log.splitlines() if line.startswith(("error", "stopped", "Traceback"))]
    left = [path.name for path in folder.iterdir() if not path.name.startswith(("log_", "ready_"))]
    return Ended([process.exitcode or 0 for process in members], said, seconds, left)


def wait_for_others(voice: Voice) -> None:
    while True:
        voice.ranks.barrier()
        time.sleep(0.05)


# ---------------------------------------------------------------- scenarios


def one_fails(voice: Voice) -> None:
    if voice.ranks.rank == 2:
        raise ValueError("the disk of this node is full")
    wait_for_others(voice)


def all_fail(voice: Voice) -> None:
    raise ValueError("there is no such recipe")


def two_fail(voice: Voice) -> None:
    if voice.ranks.rank:
        raise ValueError(f"mistake number {voice.ranks.rank}")
    wait_for_others(voice)


def agreed_failure(voice: Voice) -> None:
    voice.ranks.agree(OSError("unreadable") if voice.ranks.rank == 1 else None)


def nobody_listens(voice: Voice) -> None:
    """Rank 0 works on without a collective; its thread hears of the failure."""
    if voice.ranks.rank == 1:
        raise ValueError("a mistake")
    if voice.ranks.rank == 0:
        time.sleep(60)
    wait_for_others(voice)


@pytest.mark.parametrize(
    ("scenario", "said", "status"),
    [
        (one_fails, "error (rank 2): the disk of this node is full", 2),
        (all_fail, "error (rank 0): there is no such recipe", 2),
        (agreed_failure, "error (rank 1): OSError: unreadable", 1),
        (nobody_listens, "error (rank 1): a mistake", 2),
    ],
)
def test_an_error_is_said_once(tmp_path: Path, scenario: Callable[[Voice], None], said: str, status: int) -> None:
    ended = together(3, scenario, tmp_path)
    assert ended.said == [said]
    assert ended.statuses == [status] * 3
    assert ended.seconds < 20


def test_of_two_errors_one_is_said(tmp_path: Path) -> None:
    ended = together(3, two_fail, tmp_path)
    assert len(ended.said) == 1 and "mistake number" in ended.said[0] and ended.statuses == [2, 2, 2]


def killed_1(voice: Voice) -> None:
    if voice.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_others(voice)


def killed_0(voice: Voice) -> None:
    if voice.ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_others(voice)


def killed_0_and_nobody_calls(voice: Voice) -> None:
    if voice.ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(("scenario", "victim"), [(killed_1, 1), (killed_0, 0), (killed_0_and_nobody_calls, 0)])
def test_a_rank_that_is_killed_is_missed_once(tmp_path: Path, scenario: Callable[[Voice], None], victim: int) -> None:
    """Rank 0 takes the store with it."""
    ended = together(4, scenario, tmp_path)
    (line,) = ended.said
    assert line.startswith(f"error: rank {victim} vanished: it was killed") and line.endswith(ADVICE)
    assert ended.statuses == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)]
    assert ended.seconds < 25 and not ended.left


def slow(voice: Voice) -> None:
    if voice.ranks.rank == 1:
        time.sleep(60)
    wait_for_others(voice)


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    ended = together(3, slow, tmp_path)
    (line,) = ended.said
    assert line.startswith(f"error: rank 1 did not answer within train.collective_timeout_seconds={TIMEOUT_SECONDS}")
    assert line.endswith(ADVICE) and ended.statuses == [1, 1, 1]


def stopped_0(voice: Voice) -> None:
    if voice.ranks.rank == 0:
        if os.fork() == 0:  # wakes it up in the end
            time.sleep(25)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_others(voice)


@pytest.mark.slow
def test_a_rank_0_that_is_stopped_keeps_nobody(tmp_path: Path) -> None:
    ended = together(3, stopped_0, tmp_path)
    (line,) = ended.said
    assert line.startswith("error: rank 0 does not answer: it hangs") and ended.statuses == [-signal.SIGKILL, 1, 1]


# ---------------------------------------------------------------- ends that are no failures


def asked_to_stop(voice: Voice) -> None:
    raise Interrupted(signal.SIGTERM, "stopped by SIGTERM after step 7.", everywhere=True)


def asked_at_once(voice: Voice) -> None:
    if voice.ranks.rank == 1:
        raise Interrupted(signal.SIGINT, "stopped at once by SIGINT.")
    wait_for_others(voice)


@pytest.mark.parametrize(
    ("scenario", "said", "status"),
    [
        (asked_to_stop, "stopped by SIGTERM after step 7.", 143),
        (asked_at_once, "stopped at once by SIGINT.", 130),
    ],
)
def test_a_stop_is_said_once(tmp_path: Path, scenario: Callable[[Voice], None], said: str, status: int) -> None:
    ended = together(3, scenario, tmp_path)
    assert ended.said == [said] and ended.statuses == [status] * 3


def done(voice: Voice) -> None:
    """Rank 0 leaves at once, and the store with it; the others take their time."""
    voice.close()
    time.sleep(3 * voice.ranks.rank)


def test_nobody_is_missed_after_the_end(tmp_path: Path) -> None:
    ended = together(3, done, tmp_path)
    assert ended.said == [] and ended.statuses == [0, 0, 0]


def slow_store(voice: Voice) -> None:
    """The watching thread is inside the store when the run ends."""
    answer, inside = voice._report, threading.Event()

    def slowly(*store: Any) -> Any:
        inside.set()
        time.sleep(1.5)
        return answer(*store)

    voice._report = slowly  # type: ignore[method-assign]
    assert inside.wait(10)
    voice.close()
    if [thread for thread in threading.enumerate() if thread.name == "failures"]:
        raise ValueError("the end of the interpreter would meet the thread in the store")


def test_the_watch_ends_with_the_run(tmp_path: Path) -> None:
    ended = together(2, slow_store, tmp_path)
    assert ended.said == [] and ended.statuses == [0, 0]


# ---------------------------------------------------------------- waiting without a limit


def patient(voice: Voice) -> None:
    """Ranks 0 and 2 go first, for longer than a collective waits."""
    is_first = voice.ranks.rank != 1

    def action() -> float:
        time.sleep(TIMEOUT_SECONDS + voice.ranks.rank if is_first else 0)
        return time.time()

    own = voice.in_turn(is_first, action)
    times = voice.ranks.gather_objects(own)
    assert times[1] > max(times[0], times[2])
    assert voice.on_main(lambda: time.sleep(TIMEOUT_SECONDS + 1) or voice.ranks.rank) == 0
    voice.close()


def impatient(voice: Voice) -> None:
    def action() -> None:
        raise ValueError("the corpus is empty")

    voice.in_turn(voice.ranks.rank == 2, action)


@pytest.mark.slow
def test_turns_have_no_time_limit(tmp_path: Path) -> None:
    ended = together(3, patient, tmp_path)
    assert ended.said == [] and ended.statuses == [0, 0, 0]


def test_a_failure_ends_the_wait_for_a_turn(tmp_path: Path) -> None:
    ended = together(3, impatient, tmp_path)
    assert ended.said == ["error (rank 2): the corpus is empty"] and ended.statuses == [2, 2, 2]


def test_what_is_a_broken_connection() -> None:
    broken = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert is_broken_connection(broken) and is_broken_connection(torch.distributed.DistBackendError("NCCL error"))
    wrapped = OSError("x")
    wrapped.__cause__ = broken
    assert is_broken_connection(wrapped)
    assert not is_broken_connection(PeerFailed(1, "x")) and not is_broken_connection(ConnectionError("hub"))
