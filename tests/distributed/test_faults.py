"""Things that happen to one rank of a run, under the real launchers: each ends the run on all ranks, soon, with one
message and no process left behind, and the run goes on from its checkpoint as if nothing had happened.

A launch is twenty seconds of starting up. So the faults of one kind happen to one run, one after another: each launch
goes on from what the one before it left, and in the end every loss is that of a run nothing happened to, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faulty
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ZERO2 = REPOSITORY / "configs" / "zero2.json"

MARK = "LOQT_TEST_MARK"  # in the environment of every process of a launch
START_SECONDS = 240  # for the launcher and its ranks to come as far as the fault, on a busy machine
END_SECONDS = 120  # from the fault to the end of the last process, on a busy machine
PATIENCE = 600  # train.collective_timeout_seconds where nothing should wait for it
SHORT_PATIENCE = 20  # and where something should

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
        (directory / "shape.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(120)]
        with (directory / "corpus.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(60):
                file.write(json.dumps({"text": " ".join(draw.choices(words, k=80))}) + "\n")

    def arguments(self, run: Path, **changes: Any) -> list[str]:
        values = {"model.shape": self.directory / "shape.json", "data.path": self.directory / "corpus.jsonl"}
        values |= TINY | {"output_dir": run} | {name.replace("__", "."): value for name, value in changes.items()}
        as_text = [
            f"{name}={str(value).lower() if value in (True, False) else value}" for name, value in values.items()
        ]
        return ["--ds_config", str(ZERO2), *as_text]

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

    def undisturbed(self, run: Path, *faults: dict[str, Any], **changes: Any) -> None:
        """Trains to the end on two ranks that are forked, which is faster; fails if the run does."""
        log, printed = self.directory / f"log-{uuid.uuid4().hex}", self.directory / f"printed-{uuid.uuid4().hex}"
        common = self.environment(list(faults), log) | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = str(free_port())
        context = multiprocessing.get_context("forkserver")
        processes = [
            context.Process(
                target=_train,
                args=(self.arguments(run, **changes), common | {"RANK": str(r), "LOCAL_RANK": str(r)}, str(printed)),
            )
            for r in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(START_SECONDS)
        statuses = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert statuses == [0, 0], f"{statuses}\n{printed.read_text()}"

    def launch(
        self,
        run: Path,
        *faults: dict[str, Any],
        launcher: str = "deepspeed",
        num_ranks: int = 2,
        then: Callable[[subprocess.Popen[bytes]], None] | None = None,
        **changes: Any,
    ) -> Outcome:
        """A run in which something happens, until the last of its processes is gone; fails the test if one is not.

        then: done to the launcher once the fault has struck.
        """
        mark = uuid.uuid4().hex
        log, printed = self.directory / f"log-{mark}", self.directory / f"printed-{mark}"
        command = [launcher, "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
        if launcher == "torchrun":
            command = [launcher, "--nproc_per_node", str(num_ranks), "--master_port", str(free_port())]
        command += [str(REPOSITORY / "tests" / "distributed" / "faulty.py"), *self.arguments(run, **changes)]
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
            while not log.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            assert log.exists(), f"nothing happened\n{printed.read_text()}"
            if then is not None:
                then(process)

            def seconds_since() -> float:
                return time.time() - json.loads(log.read_text().splitlines()[-1])["time"]

            while not (gone := process.poll() is not None and not processes_of(mark)):
                if seconds_since() > END_SECONDS:
                    break
                time.sleep(0.1)
            seconds = seconds_since()
            left = {pid: command_of(pid) for pid in processes_of(mark)}
            text = printed.read_text()
            assert gone, f"after {seconds:.0f} s there are still {left or 'the launcher'}\n{text}"
            assert process.returncode is not None
            print(f"{faults}: {seconds:.1f} s, status {process.returncode}\n{text}")  # shown if the test fails
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


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def straight(workshop: Workshop) -> Iterator[Path]:
    """A run nothing happens to."""
    run = workshop.directory / "straight"
    workshop.undisturbed(run)
    assert sorted(losses(run)) == list(range(1, NUM_STEPS + 1))
    assert len(set(losses(run).values())) == NUM_STEPS, "a constant loss would show nothing"
    assert [event["step"] for event in events(run, "reinit")] == [1, 4, 7, 10, 13, 16]
    yield run


# ---------------------------------------------------------------- ranks that are killed


def killed(workshop: Workshop, run: Path, what: str, rank: int, step: int, launcher: str = "deepspeed") -> None:
    """One rank is killed by SIGKILL, as the kernel does when memory runs out."""
    before = saved(run) if (run / "checkpoints").exists() else []
    outcome = workshop.launch(run, {"what": what, "rank": rank, "step": step}, launcher=launcher)
    newest = step - step % 2  # the save of step + 1 is the one that fails
    assert saved(run) == sorted({*before, *range(0, newest + 1, 2)})
    ended_well(outcome, f"rank {rank} vanished", resume=run / "checkpoints" / f"step_{newest}")


def test_ranks_killed_in_a_step_in_a_re_initialization_and_in_a_save(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed(workshop, run, "killed in a step", rank=0, step=4)
    killed(workshop, run, "killed in a re-initialization", rank=1, step=9)
    killed(workshop, run, "killed in a save", rank=1, step=13)
    workshop.undisturbed(run)
    assert [event["step"] for event in events(run, "resume")] == [4, 8, 12]
    assert losses(run) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_other_rank_killed_at_the_same_moments(
    workshop: Workshop, straight: Path, tmp_path: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    killed(workshop, run, "killed in a step", rank=1, step=4, launcher=launcher)
    killed(workshop, run, "killed in a re-initialization", rank=0, step=6, launcher=launcher)
    killed(workshop, run, "killed in a save", rank=0, step=9, launcher=launcher)
    killed(workshop, run, "killed before the rename", rank=0, step=11, launcher=launcher)
    workshop.undisturbed(run)
    assert losses(run) == losses(straight)


# ---------------------------------------------------------------- launchers that are stopped


def terminate(process: subprocess.Popen[bytes]) -> None:
    time.sleep(0.2)
    process.terminate()


def stopped(workshop: Workshop, run: Path, step: int, launcher: str) -> None:
    """SIGTERM to the launcher alone, as a scheduler sends it."""
    slow = {"what": "slow", "rank": 1, "step": step, "count": 4}
    outcome = workshop.launch(run, slow, launcher=launcher, then=terminate)
    done = max(losses(run))
    assert step <= done < step + 4
    error = ended_well(outcome, f"after step {done}.", resume=run / "checkpoints" / f"step_{done}")
    assert error.startswith(("stopped by SIGTERM", "stopped by the end of its launcher"))


def flipped(outcome: Outcome, layer: int = 0, *, resume: Path) -> None:
    ended_well(
        outcome,
        "the ranks no longer hold the same model",
        f"model.layers.0.self_attn.{'qk'[layer]}_proj.w_codes differ (between ranks 0, 1;",
        resume=resume,
    )


@pytest.mark.slow
def test_a_stopped_launcher_then_a_flipped_bit_then_a_rank_that_hangs(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped(workshop, run, 1, "deepspeed")
    assert max(losses(run)) < 6
    # No save comes before the re-initialization, after which all ranks would hold what the owner merged or broadcast.
    bit = {"what": "one bit", "rank": 1, "step": 6}
    flipped(workshop.launch(run, bit), resume=run / "checkpoints" / "step_6")
    hang = {"what": "hangs in a step", "rank": 1, "step": 9}
    outcome = workshop.launch(run, hang, train__collective_timeout_seconds=SHORT_PATIENCE)
    ended_well(
        outcome,
        f"rank 1 did not answer within train.collective_timeout_seconds={SHORT_PATIENCE}",
        resume=run / "checkpoints" / "step_8",
    )
    assert outcome.seconds > SHORT_PATIENCE - 1
    workshop.undisturbed(run)
    assert losses(run) == losses(straight)


@pytest.mark.slow
def test_a_flipped_bit_is_seen_by_the_next_re_initialization_or_save(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    """Whichever rank re-initializes the layer, before it merges the weight."""
    run = tmp_path / "run"
    for rank, layer, step in ((1, 0, 3), (1, 1, 6), (0, 0, 9), (0, 1, 13)):
        bit = {"what": "one bit", "rank": rank, "step": step, "layer": layer}
        outcome = workshop.launch(run, bit, launcher="torchrun")
        flipped(outcome, layer, resume=run / "checkpoints" / f"step_{step - step % 2}")
    workshop.undisturbed(run)
    assert losses(run) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_other_ranks_that_do_not_answer(workshop: Workshop, straight: Path, tmp_path: Path, launcher: str) -> None:
    """A rank that waits for something else; and one that is stopped altogether: it hears no signal, until the launcher
    kills it."""
    run = tmp_path / "run"
    moments = (("hangs between steps", 0, 3), ("frozen in a step", 1, 7), ("frozen in a step", 0, 10))
    for what, rank, step in moments:
        outcome = workshop.launch(
            run,
            {"what": what, "rank": rank, "step": step},
            launcher=launcher,
            train__collective_timeout_seconds=SHORT_PATIENCE,
        )
        said = f"rank {rank} did not answer within train.collective_timeout_seconds={SHORT_PATIENCE}"
        if launcher == "deepspeed" and (what, rank) == ("frozen in a step", 0):
            said = "rank 0 does not answer: it hangs"  # nor does the store, which is in that process
        ended_well(outcome, said, resume=run / "checkpoints" / f"step_{step - step % 2}")
    stopped(workshop, run, 12, launcher)
    workshop.undisturbed(run)
    assert losses(run) == losses(straight)


# ---------------------------------------------------------------- ranks that fail


def test_steps_that_one_rank_spoils_are_skipped_and_counted_and_then_its_data_ends(
    workshop: Workshop, tmp_path: Path
) -> None:
    """The second of them would have been a re-initialization, which is made up for after them."""
    run, without = tmp_path / "run", tmp_path / "without"
    spoiled = {"what": "NaN", "rank": 1, "step": 5, "count": 2}
    outcome = workshop.launch(run, spoiled, {"what": "out of data", "rank": 1, "step": 10})
    error = ended_well(outcome, "step 11: the data ended", resume=run / "checkpoints" / "step_10")
    assert error.startswith("error (rank 1): ")
    assert outcome.text.count("the gradient is not finite") == 2 and "(2 in a row)" in outcome.text
    assert [event["step"] for event in events(run, "skipped_step")] == [6, 7]
    assert [event["step"] for event in events(run, "reinit")] == [1, 4, 8, 10]
    counts = {record["step"]: record["num_skipped"] for record in records(run) if "event" not in record}
    assert [counts[step] for step in range(4, 11)] == [0, 0, 1, 2, 2, 2, 2]
    assert saved(run) == [0, 2, 4, 8, 10], "no checkpoint of a skipped step"
    workshop.undisturbed(run)
    workshop.undisturbed(without, spoiled)
    assert json.dumps(losses(run)) == json.dumps(losses(without))
    assert all(math.isfinite(float(loss)) == (step not in (6, 7)) for step, loss in losses(run).items())


def test_ten_steps_in_a_row_that_one_rank_spoils_end_the_run(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = workshop.launch(run, {"what": "NaN", "rank": 1, "step": 4, "count": 10}, launcher="torchrun")
    good = run / "checkpoints" / "step_2"  # after that of step 4 no step was a good one
    assert outcome.status != 0
    (error,) = outcome.errors
    assert "10 steps in a row had a gradient that is not finite (up to step 14)" in error and "optim.lr" in error
    assert f"The last good checkpoint is {good}; go on from it with checkpoint.resume={good}." in error
    assert outcome.text.count("(10 in a row)") == 1
    workshop.undisturbed(run, checkpoint__resume=good)
    assert losses(run) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_raises(workshop: Workshop, straight: Path, tmp_path: Path, launcher: str) -> None:
    """Between steps, and while the others wait in a reduction."""
    run = tmp_path / "run"
    for what, rank, step, said, tracebacks in (
        ("unreadable file", 0, 3, "Input/output error", 0),
        ("bug", 1, 5, "KeyError: 'no such thing'", 1),
        ("out of memory", 1, 8, "out of memory", 0),
        ("out of memory", 0, 10, "out of memory", 0),
    ):
        outcome = workshop.launch(run, {"what": what, "rank": rank, "step": step}, launcher=launcher)
        checkpoint = run / "checkpoints" / f"step_{step - step % 2}"
        error = ended_well(outcome, said, resume=checkpoint, tracebacks=tracebacks)
        assert error.startswith(f"error (rank {rank}): ")
    workshop.undisturbed(run)
    assert losses(run) == losses(straight)


@pytest.mark.slow
def test_of_three_ranks_the_one_that_differs_is_named(workshop: Workshop, tmp_path: Path) -> None:
    """Two others agree: theirs is the right model."""
    run = tmp_path / "run"
    outcome = workshop.launch(run, {"what": "one bit", "rank": 2, "step": 4}, num_ranks=3)
    ended_well(outcome, "rank 2 from the others", resume=run / "checkpoints" / "step_4")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_of_three_ranks_one_is_killed_and_one_speaks(workshop: Workshop, tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    outcome = workshop.launch(run, {"what": "killed in a step", "rank": rank, "step": 4}, num_ranks=3)
    ended_well(outcome, f"rank {rank} vanished", resume=run / "checkpoints" / "step_4")
