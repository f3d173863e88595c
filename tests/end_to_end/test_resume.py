"""Stopping and going on: the losses are those of the run that was never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killable import finish, start, wait_until
from workshop import ZERO2, Workshop, environment, events, losses, records

# Re-initializations before updates 0, 2, 4, 6: every second stop falls right behind one.
OFTEN: dict[str, Any] = {"loqt__schedule": "static", "loqt__interval": 2, "train__max_steps": 7}

SINGLE: dict[str, dict[str, Any]] = {
    "adamw8bit-fp32": {"optim__name": "adamw8bit", "train__dtype": "fp32"},
    "adamw8bit-bf16-project": {
        "optim__name": "adamw8bit",
        "train__dtype": "bf16",
        "loqt__optimizer_state": "project",
    },
    "layerwise-bf16-master": {
        "optim__layerwise": True,
        "optim__master": "bf16",
        "train__dtype": "bf16",
        "train__max_grad_norm": None,
    },
    "adamw-fp32-sketch-masked-accumulation": {
        "optim__name": "adamw",
        "train__dtype": "fp32",
        "loqt__subspace": "sketch",
        "loqt__sketch_oversampling": 8,
        "data__mask_documents": True,
        "train__activation_checkpointing": True,
        "train__gradient_accumulation_steps": 2,
        "train__micro_batch_size": 2,
    },
    "reset-rewarmup-truncated-int4": {
        "train__dtype": "fp32",
        "loqt__optimizer_state": "reset",
        "loqt__quantize_w": "int4",
        "loqt__double_quant": "both",
        "optim__schedule": "cosine_rewarmup",
        "optim__rewarmup_steps": 2,
        "data__packing": "truncated",
    },
}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "adamw8bit-bf16": {"optim__name": "adamw8bit", "train__dtype": "bf16"},
    "adamw-fp32-accumulation-project": {
        "optim__name": "adamw",
        "train__dtype": "fp32",
        "loqt__optimizer_state": "project",
        "train__gradient_accumulation_steps": 2,
        "train__micro_batch_size": 2,
    },
}


def stop_after_every_step(workshop: Workshop, folder: Path, options: dict[str, Any], *, deepspeed: bool) -> None:
    straight, saving = folder / "straight", folder / "saving"
    options = OFTEN | options
    num_steps = options["train__max_steps"]
    workshop.train(output_dir=straight, deepspeed=deepspeed, **options).ok()
    workshop.train(
        output_dir=saving, deepspeed=deepspeed, checkpoint__every=1, checkpoint__keep=0, eval__every=2, **options
    ).ok()
    expected = losses(straight)
    assert sorted(expected) == list(range(1, num_steps + 1))
    assert len(set(expected.values())) == num_steps, "a constant loss would show nothing"
    assert len(events(straight, "reinit")) == 4
    assert losses(saving) == expected, "checkpoints and evaluations change nothing"
    last = events(straight, "eval")[-1]["loss"]
    for stop in range(num_steps + 1):
        gone_on = folder / f"from_{stop}"
        workshop.train(
            output_dir=gone_on,
            deepspeed=deepspeed,
            checkpoint__resume=saving / "checkpoints" / f"step_{stop}",
            **options,
        ).ok()
        assert losses(gone_on) == {step: loss for step, loss in expected.items() if step > stop}
        assert events(gone_on, "eval")[-1]["loss"] == last
        tokens = [record["tokens"] for record in records(gone_on) if "event" not in record]
        whole = [record["tokens"] for record in records(straight) if "event" not in record]
        assert tokens == whole[stop:]


def some_slow(cases: dict[str, Any], *quick: str) -> list[Any]:
    """Names of cases; all but the quick ones are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in cases]


@pytest.mark.parametrize(
    "case",
    some_slow(SINGLE, "adamw8bit-bf16-project", "layerwise-bf16-master", "adamw-fp32-sketch-masked-accumulation"),
)
def test_stop_after_every_step(workshop: Workshop, tmp_path: Path, case: str) -> None:
    stop_after_every_step(workshop, tmp_path, SINGLE[case], deepspeed=False)


@pytest.mark.parametrize("case", some_slow(DEEPSPEED, "adamw8bit-bf16"))
def test_stop_after_every_step_under_deepspeed(workshop: Workshop, tmp_path: Path, case: str) -> None:
    stop_after_every_step(workshop, tmp_path, DEEPSPEED[case], deepspeed=True)


# ---------------------------------------------------------------- signals


LONG: dict[str, Any] = {"train__max_steps": 25, "checkpoint__every": 1, "eval__every": 7, "train__dtype": "fp32"}


@pytest.fixture(scope="module")
def uninterrupted(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    workshop.train(output_dir=run, **(LONG | {"checkpoint__every": 1000})).ok()
    yield run


def test_killed_at_random_moments(workshop: Workshop, tmp_path: Path, uninterrupted: Path) -> None:
    """SIGKILL, four times into one run that saves after every step; each time it goes on with resume=auto."""
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = workshop.overrides(output_dir=run, checkpoint__resume="auto", **LONG)
    seed = time.time_ns()  # another moment each time; the seed is in the message
    draw = random.Random(seed)
    num_killed = 0
    for attempt in range(4):
        before = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
        process = start(arguments, log=log)
        wait_until(lambda size=before: _size(run / "metrics.jsonl") > size, process)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        status = finish(process)
        assert status in (0, -signal.SIGKILL), f"seed {seed}, attempt {attempt}\n{log.read_text()}"
        num_killed += status != 0
    assert num_killed >= 2, "too fast to be killed: make it longer"
    assert finish(start(arguments, log=log)) == 0, f"seed {seed}\n{log.read_text()}"
    assert losses(run) == losses(uninterrupted), f"seed {seed}"
    assert events(run, "eval")[-1]["loss"] == events(uninterrupted, "eval")[-1]["loss"]
    assert len(events(run, "resume")) >= 1
    left = [path.name for path in (run / "checkpoints").iterdir()]
    assert all(re.fullmatch(r"step_\d+|latest", name) for name in left), f"temporary files stay behind: {left}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_sigterm_stops_the_command_after_the_step_and_saves(
    workshop: Workshop, tmp_path: Path, uninterrupted: Path
) -> None:
    """The real command; it goes on into another directory."""
    run, gone_on = tmp_path / "run", tmp_path / "gone_on"
    options = LONG | {"checkpoint__every": 1000}
    with subprocess.Popen(
        [sys.executable, "-m", "loqt_ds.train", *workshop.overrides(output_dir=run, **options)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not losses(run):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    last = stopped_cleanly(run, errors, "SIGTERM")
    workshop.train(output_dir=gone_on, checkpoint__resume=last, **options).ok()
    assert losses(run) | losses(gone_on) == losses(uninterrupted)
    assert not losses(run).keys() & losses(gone_on).keys()


def test_control_c_stops_after_the_step_and_saves(workshop: Workshop, tmp_path: Path, uninterrupted: Path) -> None:
    """It goes on in the same directory."""
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = workshop.overrides(output_dir=run, checkpoint__resume="auto", **(LONG | {"checkpoint__every": 1000}))
    process = start(arguments, log=log)
    wait_until(lambda: (run / "metrics.jsonl").exists() and bool(losses(run)), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 128 + signal.SIGINT
    stopped_cleanly(run, log.read_text(), "SIGINT")
    assert finish(start(arguments, log=log)) == 0
    assert losses(run) == losses(uninterrupted)


def stopped_cleanly(run: Path, errors: str, name: str) -> Path:
    """The checkpoint that the message names, which must be of the last step that was taken."""
    done = max(losses(run))
    assert done < 25
    last = run / "checkpoints" / f"step_{done}"
    assert f"stopped by {name} after step {done}" in errors and str(last) in errors
    assert "Traceback" not in errors
    return last


def test_a_signal_during_the_last_step_is_a_finished_run(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to go on with: the run ends as if there had been no signal. A step earlier, it stops."""
    from loqt_ds.trainer import Trainer

    record = Trainer._record

    def and_signal(self: Trainer, report: Any, *rest: Any) -> None:
        record(self, report, *rest)
        if report.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_record", and_signal)
    before = signal.getsignal(signal.SIGTERM)
    stopped = workshop.train(output_dir=tmp_path / "stopped", train__max_steps=4)
    assert stopped.status == 143 and "step_3" in stopped.errors
    finished = workshop.train(output_dir=tmp_path / "finished", train__max_steps=3, export__format="bf16").ok()
    assert "exported model" in finished.output
    assert signal.getsignal(signal.SIGTERM) is before, "the handlers are given back"


@pytest.mark.parametrize(
    ("signals", "apart", "saved", "said"),
    [
        ((signal.SIGINT, signal.SIGTERM), 0, ["step_0", "step_3"], "stopped by SIGINT after step 3"),
        ((signal.SIGINT, signal.SIGINT), 0, ["step_0", "step_3"], "stopped by SIGINT after step 3"),
        ((signal.SIGINT, signal.SIGINT), 1.1, ["step_0"], "stopped at once by SIGINT"),
    ],
    ids=["deepspeed", "torchrun", "impatient"],
)
def test_two_signals(
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: tuple[signal.Signals, ...],
    apart: float,
    saved: list[str],
    said: str,
) -> None:
    """Ctrl-C in the terminal of a launcher reaches the program twice at once: from the terminal, and as what the
    launcher makes of it. It still saves. Who presses Ctrl-C twice wants to be out."""
    from loqt_ds.trainer import Trainer

    record = Trainer._record

    def and_signals(self: Trainer, report: Any, *rest: Any) -> None:
        record(self, report, *rest)
        if report.step == 2:
            for number in signals:
                signal.raise_signal(number)
                time.sleep(apart)

    monkeypatch.setattr(Trainer, "_record", and_signals)
    stopped = workshop.train(output_dir=tmp_path / "run", train__max_steps=5)
    assert stopped.status == 128 + signal.SIGINT and said in stopped.errors
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == saved
    assert "checkpoint.resume=auto" in stopped.errors


@pytest.mark.slow
def test_killed_under_deepspeed(workshop: Workshop, tmp_path: Path) -> None:
    run, log, straight = tmp_path / "run", tmp_path / "log", tmp_path / "straight"
    options = LONG | {"train__dtype": "bf16"}
    ours = ["--ds_config", str(ZERO2)]
    workshop.train(output_dir=straight, deepspeed=True, **options).ok()
    arguments = [*ours, *workshop.overrides(output_dir=run, checkpoint__resume="auto", **options)]
    draw = random.Random(time.time_ns())
    for _ in range(3):
        before = _size(run / "metrics.jsonl")
        process = start(arguments, log=log, deepspeed=True)
        wait_until(lambda size=before: _size(run / "metrics.jsonl") > size, process)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        finish(process)
    assert finish(start(arguments, log=log, deepspeed=True)) == 0, log.read_text()
    assert losses(run) == losses(straight)


# ---------------------------------------------------------------- what may change, and which checkpoint is taken


def test_auto_passes_over_a_damaged_checkpoint(workshop: Workshop, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    options: dict[str, Any] = {"checkpoint__every": 2, "train__max_steps": 6}
    workshop.train(output_dir=whole, **options).ok()
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "step_6" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content))
    done = workshop.train(output_dir=run, checkpoint__resume="auto", **options).ok()
    assert "step_6" in done.output and "model.safetensors" in done.output, "the damage is told"
    assert events(run, "resume")[0]["step"] == 4
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("deepspeed", [False, True], ids=["single", "deepspeed"])
def test_a_finished_run_can_be_made_longer(workshop: Workshop, tmp_path: Path, deepspeed: bool) -> None:
    run = tmp_path / "run"
    workshop.train(deepspeed=deepspeed, output_dir=run, train__max_steps=3).ok()
    longer = workshop.train(deepspeed=deepspeed, output_dir=run, checkpoint__resume="auto", train__max_steps=5).ok()
    assert "train.max_steps was 3 and is 5" in longer.output
    assert sorted(losses(run)) == [1, 2, 3, 4, 5]
