"""Wishes to stop: signals, signals that come twice, and a launcher that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loqt_ds import stopping
from loqt_ds.stopping import Interrupted, StopRequests, Terminated, signal_of, sigterm_raises


def test_a_signal_is_noted_and_the_first_one_counts() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequests() as requests:
        assert requests.reason is None
        signal.raise_signal(signal.SIGTERM)
        assert requests.reason == "SIGTERM"
        signal.raise_signal(signal.SIGINT)
        assert requests.reason == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_same_again_means_now_unless_it_comes_at_once(signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with StopRequests() as requests:
        signal.raise_signal(signum)
        now += 0.2
        signal.raise_signal(signum)
        assert requests.reason == signal.Signals(signum).name
        now += 1
        with pytest.raises(Interrupted, match=f"stopped at once by {signal.Signals(signum).name}") as caught:
            signal.raise_signal(signum)
        assert caught.value.signum == signum and not caught.value.everywhere


def test_sigterm_outside_of_training() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_statuses() -> None:
    assert [int(signal_of(reason)) for reason in stopping.REASONS] == [2, 15, 15]


RANK = """
import os, sys, time
from loqt_ds.stopping import StopRequests
with StopRequests() as requests:
    print("ready", flush=True)
    for _ in range(200):
        if requests.reason:
            open(sys.argv[1], "w").write(requests.reason)
            break
        time.sleep(0.05)
"""
PARENT = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
process.stdout.readline()
print("ready", flush=True)
process.wait()
"""
RUNNER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, LAUNCHER, *sys.argv[1:]], stdout=subprocess.PIPE)
process.stdout.readline()
print("ready", flush=True)
process.wait()
"""


@pytest.mark.parametrize(
    ("parent", "runner", "noticed"),
    [
        ("torchrun", None, True),
        ("deepspeed.launcher.launch", None, True),
        ("deepspeed.launcher.launch", "bin_deepspeed", True),  # the runner ends, the launcher proper lives on
        ("shell", None, False),  # `nohup python ... &`, and the shell is closed
    ],
)
def test_the_end_of_a_launcher(tmp_path: Path, parent: str, runner: str | None, noticed: bool) -> None:
    said = tmp_path / "said"
    launcher = tmp_path / parent
    launcher.write_text(PARENT)
    command = [sys.executable, str(launcher), RANK, str(said)]
    if runner is not None:
        (tmp_path / runner).write_text(RUNNER.replace("LAUNCHER", repr(str(launcher))))
        command = [sys.executable, str(tmp_path / runner), RANK, str(said)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    deadline = time.monotonic() + (5 if noticed else 0.5)
    while not (said.exists() and said.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (said.read_text() if said.exists() else None) == ("the end of its launcher" if noticed else None)
