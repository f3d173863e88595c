"""Launches of `faulty.py` under the real launchers, what they did and what they left. No tests here."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faulty

REPOSITORY = Path(__file__).resolve().parents[2]
ZERO2 = REPOSITORY / "configs" / "zero2.json"

MARK = "LOQT_TEST_MARK"  # in the environment of every process of a launch
START_SECONDS = 240  # for the launcher and its ranks to come as far as the fault, on a busy machine
END_SECONDS = 120  # from the fault to the end of the last process, on a busy machine
PATIENCE = 600  # train.collective_timeout_seconds where nothing should wait for it
SHORT_PATIENCE = 20  # and where something should

ENGINES: dict[str, tuple[str, ...]] = {
    "zero2": ("--ds_config", str(ZERO2)),
    "fsdp2": ("engine=fsdp2",),
    "fsdp2 sharded": ("engine=fsdp2", "fsdp.shard_frozen=true"),
    "hybrid": ("engine=fsdp2", "fsdp.shard_frozen=true", "fsdp.num_replicas=2"),
}

NUM_STEPS = 16
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Checkpoints after 0, 2, 4, ... steps; re-initializations in the steps 0, 3, 6, ..., counted from 0.
TINY: dict[str, Any] = {
    "model.vocab_size": "auto",
    "data.tokenizer_vocab_size": 400,
    "data.sequence_length": 32,
    "data.num_processes": 1,
    "loqt.rank": 16,
    "loqt.schedule": "static",
    "loqt.interval": 3,
    "train.max_steps": NUM_STEPS,
    "train.micro_batch_size": 4,
    "train.device": "cpu",
    "train.dtype": "fp32",
    "train.collective_timeout_seconds": PATIENCE,
    "eval.every": 0,
    "eval.max_tokens": 256,
    "eval.num_samples": 0,
    "checkpoint.every": 2,
    "checkpoint.keep": 0,
    "checkpoint.resume": "auto",
    "logging.tensorboard": "false",
    "export.format": "none",
}


# ---------------------------------------------------------------- a place, and processes


@dataclass(frozen=True)
class Start:
    """Who starts the ranks, and what they train with."""

    launcher: str  # deepspeed, or torchrun
    engine: str  # of ENGINES

    def __str__(self) -> str:
        return f"{self.launcher}-{self.engine.replace(' ', '-')}"


@dataclass
class Outcome:
    """How a launch ended."""

    status: int  # of the launcher
    text: str  # what it and all ranks printed
    seconds: float  # from the fault until the last process was gone

    @property
    def errors(self) -> list[str]:
        """What was said of the fault, by whichever rank."""
        return [line for line in self.text.splitlines() if re.match(r"error|stopped by", line)]


class Workshop:
    """A tiny model's shape and a tiny corpus, and launches of runs on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._straight: dict[str, Path] = {}
        (directory / "shape.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(120)]
        with (directory / "corpus.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(60):
                file.write(json.dumps({"text": " ".join(draw.choices(words, k=80))}) + "\n")

    def arguments(self, run: Path, engine: str, **changes: Any) -> list[str]:
        values = {"model.shape": self.directory / "shape.json", "data.path": self.directory / "corpus.jsonl"}
        values |= TINY | {"output_dir": run} | {name.replace("__", "."): value for name, value in changes.items()}
        as_text = [
            f"{name}={str(value).lower() if value in (True, False) else value}" for name, value in values.items()
        ]
        return [*ENGINES[engine], *as_text]

    def environment(self, faults: list[dict[str, Any]], log: Path) -> dict[str, str]:
        """Variables of the processes of one launch, besides those of this one."""
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(REPOSITORY),
            "LOQT_CACHE": str(self.directory / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "DS_ACCELERATOR": "cpu",
            "LOQT_FAULTS": json.dumps(faults),
            "LOQT_FAULT_LOG": str(log),
        }

    def straight(self, engine: str) -> Path:
        """A run nothing happens to, the same one for all who ask."""
        if engine not in self._straight:
            run = self.directory / f"straight-{engine.replace(' ', '-')}"
            self.undisturbed(run, engine)
            assert sorted(losses(run)) == list(range(1, NUM_STEPS + 1))
            assert len(set(losses(run).values())) == NUM_STEPS, "a constant loss would show nothing"
            assert [event["step"] for event in events(run, "reinit")] == [1, 4, 7, 10, 13, 16]
            self._straight[engine] = run
        return self._straight[engine]

    def undisturbed(self, run: Path, engine: str, *faults: dict[str, Any], num_ranks: int = 2, **changes: Any) -> None:
        """Trains to the end on ranks that are forked, which is faster; fails if the run does."""
        log, printed = self.directory / f"log-{uuid.uuid4().hex}", self.directory / f"printed-{uuid.uuid4().hex}"
        common = self.environment(list(faults), log) | {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = str(free_port())
        context = multiprocessing.get_context("forkserver")
        processes = [
            context.Process(
                target=_train,
                args=(
                    self.arguments(run, engine, **changes),
                    common | {"RANK": str(r), "LOCAL_RANK": str(r)},
                    str(printed),
                ),
            )
            for r in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(START_SECONDS)
        statuses = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert statuses == [0] * num_ranks, f"{statuses}\n{printed.read_text()}"

    def launch(
        self,
        run: Path,
        start: Start,
        *faults: dict[str, Any],
        num_ranks: int = 2,
        then: Callable[[subprocess.Popen[bytes]], None] | None = None,
        **changes: Any,
    ) -> Outcome:
        """A run in which something happens, until the last of its processes is gone; fails the test if one is not.

        then: done to the launcher once the fault has struck.
        """
        mark = uuid.uuid4().hex
        log, printed = self.directory / f"log-{mark}", self.directory / f"printed-{mark}"
        count = {"deepspeed": "--num_gpus", "torchrun": "--nproc_per_node"}[start.launcher]
        command = [start.launcher, count, str(num_ranks), "--master_port", str(free_port())]
        command += [str(Path(faulty.__file__).resolve()), *self.arguments(run, start.engine, **changes)]
        variables = os.environ | self.environment(list(faults), log) | {MARK: mark}
        with printed.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Where a process is stopped and its shell ends, the kernel hangs up the whole group: not this one.
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not strikes(log) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            assert strikes(log), f"nothing happened\n{printed.read_text()}"
            if then is not None:
                then(process)

            def seconds_since() -> float:
                return time.time() - strikes(log)[-1]["time"]

            while not (gone := process.poll() is not None and not processes_of(mark)):
                if seconds_since() > END_SECONDS:
                    break
                time.sleep(0.1)
            seconds = seconds_since()
            left = {pid: command_of(pid) for pid in processes_of(mark)}
            text = printed.read_text()
            assert gone, f"after {seconds:.0f} s there are still {left or 'the launcher'}\n{text}"
            assert process.returncode is not None
            print(f"{start}, {faults}: {seconds:.1f} s, status {process.returncode}\n{text}")  # shown if the test fails
            return Outcome(process.returncode, text, seconds)
        finally:
            for pid in processes_of(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _train(arguments: list[str], variables: dict[str, str], printed: str) -> None:
    os.environ |= variables
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    raise SystemExit(faulty.main(arguments))


def strikes(log: Path) -> list[dict[str, Any]]:
    """What `faulty.strike` has noted so far: whole lines only, since the file is there before its first line is."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(mark: str) -> list[int]:
    """The processes that have `mark` in their environment, whoever started them, but for those that have ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it is gone, or another user's
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return ""


# ---------------------------------------------------------------- what a run wrote


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in records(run) if record.get("event") == kind]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, of the last line of each step."""
    return {record["step"]: record["loss"] for record in records(run) if "event" not in record}


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints that have their name."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def ended_well(outcome: Outcome, *said: str, resume: Path, tracebacks: int = 0) -> str:
    """Checks what each fault has in common; returns the one thing that was said. `resume`: the checkpoint it names."""
    assert outcome.status != 0
    (error,) = outcome.errors
    for text in said:
        assert text in error
    assert f"The last good checkpoint is {resume};" in error and "checkpoint.resume=auto" in error
    # Neither peers nor libraries say how they felt about it.
    of_torchrun = len(re.findall(r"^torch\.distributed\.elastic\.\S+: ", outcome.text, flags=re.MULTILINE))
    assert outcome.text.count("Traceback") == tracebacks + of_torchrun
    for noise in ("terminate called", "gloo", "NCCL", "c10", "Connection reset", "Aborted", "Fatal Python"):
        assert noise not in outcome.text
    return error
