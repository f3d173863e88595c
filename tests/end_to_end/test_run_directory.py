"""What a run leaves behind and what it shows: files, metrics, names of directories, help, progress."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from workshop import REPOSITORY, Workshop, command, environment, events, files_below, losses, main, records

from loqt_ds.config import Config, load_config
from loqt_ds.config.parsing import field_docs, field_types, option_names
from loqt_ds.metrics import MetricsLogger

STEP_KEYS = {"step", "loss", "lr", "tokens", "tokens_per_second", "peak_memory_gib", "grad_norm"}
NUM_ADAPTED = 14  # seven linears in each of two blocks


@pytest.fixture(scope="module")
def finished(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(directory, output) of one complete run: six steps, two re-initializations, everything that can be written."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = workshop.train(
        output_dir=run,
        train__max_steps=6,
        eval__every=3,
        eval__num_samples=2,
        eval__sample_tokens=5,
        checkpoint__every=2,
        logging__tensorboard=True,
        export__format="nf4",
    ).ok()
    return run, done.output


def test_a_run_directory_holds_what_was_promised(finished: tuple[Path, str]) -> None:
    run, _ = finished
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer",
        "checkpoints",
        "export",
    }
    # checkpoint.keep is 2 unless told otherwise, and step 6 is both a multiple of 2 and the end
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_4", "step_6"]
    suffixes = {path.suffix for path in (run / "checkpoints" / "step_6").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".model"}, "a checkpoint holds safetensors and JSON only"
    assert (run / "export" / "model.safetensors").is_file() and (run / "export" / "config.json").is_file()


def test_every_step_is_recorded_with_every_key(finished: tuple[Path, str]) -> None:
    run, _ = finished
    steps = [record for record in records(run) if "event" not in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for number, record in enumerate(steps, start=1):
        assert record.keys() >= STEP_KEYS
        assert record["tokens"] == number * 4 * 32  # rows of full length: every token is predicted
        assert record["tokens_per_second"] > 0 and record["peak_memory_gib"] > 0 and record["grad_norm"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1


def test_re_initializations_are_recorded_layer_by_layer(finished: tuple[Path, str]) -> None:
    run, _ = finished
    reinits = events(run, "reinit")
    assert [record["step"] for record in reinits] == [1, 5]  # before updates 0 and 4, told with the step they end
    for record in reinits:
        layers = record["layers"]
        assert len({layer["name"] for layer in layers}) == NUM_ADAPTED
        for layer in layers:
            assert 0.3 < layer["captured_energy"] <= 1 + 1e-6, layer
            assert 0 < layer["error_after"] < layer["error_before"] < 0.15, layer
            assert layer["kept"] is None


def test_a_page_is_written_of_it(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Of a run in nf4, which has no adapter, and whose shape file need not be there any more."""
    run = tmp_path / "moved"
    shutil.copytree(finished[0], run)
    config = run / "config.yaml"
    config.write_text(re.sub(r"shape: .*", "shape: /gone/shape.json", config.read_text()))
    command(sys.executable, REPOSITORY / "tools/report_run.py", run, "--output", tmp_path / "page", cwd=tmp_path).ok()
    page = (tmp_path / "page" / "REPORT.md").read_text()
    (evaluated,) = {f"{event['loss']:.4f}" for event in events(run, "eval")[-1:]}
    assert "nf4, loaded again" in page and evaluated in page and 'model.shape="shape.json"' in page


def test_evaluations_checkpoints_and_the_export_are_recorded(finished: tuple[Path, str]) -> None:
    run, _ = finished
    evaluations = events(run, "eval")
    assert [record["step"] for record in evaluations] == [3, 6]
    for record in evaluations:
        assert record["perplexity"] == pytest.approx(2.718281828459045 ** record["loss"])
        assert 0 < record["num_tokens"] <= 256
    saved = events(run, "checkpoint")
    assert [record["step"] for record in saved] == [0, 2, 4, 6], "the first checkpoint is written at step 0"
    assert [Path(record["path"]).name for record in saved] == ["step_0", "step_2", "step_4", "step_6"]
    (export,) = events(run, "export")
    assert export["step"] == 6 and export["format"] == "nf4" and Path(export["path"]) == run / "export"
    assert export["perplexity_trained"] == evaluations[-1]["perplexity"]
    assert export["perplexity"] == pytest.approx(export["perplexity_trained"], rel=0.05)


def test_tensorboard_has_the_same_curve(finished: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = finished
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    curve = {event.step: event.value for event in board.Scalars("train/loss")}
    assert curve == pytest.approx(losses(run))
    assert [event.step for event in board.Scalars("reinit/captured_energy")] == [1, 5]
    assert [event.step for event in board.Scalars("eval/perplexity")] == [3, 6]


def test_the_output_says_what_happened_and_what_to_do_next(finished: tuple[Path, str]) -> None:
    run, output = finished
    for text in (
        "step 1/6  loss ",
        "tokens/s",
        "left",
        "step 5: re-initialized 14 layers",
        "step 3: validation loss",
        "trained model:   validation loss",
        "exported model:  validation loss",
        "token frequencies alone: loss",
        "--- sample 2",
        f"run directory:   {run}",
        f"tensorboard --logdir {run}/tensorboard",
        f"tools/export.py --checkpoint {run}/checkpoints/step_6 --format bf16",
    ):
        assert text in output, f"{text!r} is not in\n{output}"


def test_the_export_command_it_names_works(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The last lines of a run are commands to copy; this is the one that writes."""
    run, output = finished
    (line,) = [line.strip() for line in output.splitlines() if "tools/export.py" in line]
    words = line.split()
    assert words[:2] == ["python", "tools/export.py"]
    script = Path(__file__).resolve().parents[2] / words[1]
    done = command(sys.executable, script, *words[2:], cwd=tmp_path).ok()
    assert (tmp_path / "exported" / "model.safetensors").is_file(), done.output
    assert "reloaded with transformers" in done.output
    assert done.errors == "", "warnings of other packages are noise in every user's terminal"


# ---------------------------------------------------------------- names of directories


def test_numbered_runs_and_a_refused_directory(workshop: Workshop, here: Path) -> None:
    quick: dict[str, Any] = {"train__max_steps": 1}
    workshop.train(**quick).ok()
    workshop.train(**quick).ok()
    workshop.train(name="other", **quick).ok()
    (here / "runs" / "default-0007").mkdir()
    workshop.train(**quick).ok()
    assert sorted(path.name for path in (here / "runs").iterdir()) == [
        "default-0001",
        "default-0002",
        "default-0007",
        "default-0008",
        "other-0001",
    ]
    taken = here / "runs" / "default-0001"
    before = files_below(taken)
    refused = workshop.train(output_dir=taken, **quick)
    assert refused.status == 2
    assert "output_dir=" in refused.errors and str(taken) in refused.errors
    assert "checkpoint.resume=auto" in refused.errors and "another directory" in refused.errors
    assert files_below(taken) == before
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    refused = workshop.train(output_dir=here / "mine", **quick)
    assert (
        refused.status == 2 and "holds other files and no run" in refused.errors and "empty directory" in refused.errors
    )
    (here / "empty").mkdir()
    workshop.train(output_dir=here / "empty", **quick).ok()


def test_resume_auto_goes_on_with_the_newest_numbered_run(workshop: Workshop, here: Path) -> None:
    started = workshop.train(checkpoint__resume="auto", train__max_steps=2).ok()
    assert "there is no run named default" in started.output
    workshop.train(train__max_steps=2).ok()
    gone_on = workshop.train(checkpoint__resume="auto", train__max_steps=2).ok()
    assert f"going on from {here}/runs/default-0002/checkpoints/step_2" in gone_on.output
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["default-0001", "default-0002"]


# ---------------------------------------------------------------- the configuration that is written


@pytest.mark.parametrize("deepspeed", [False, True], ids=["single", "deepspeed"])
def test_the_written_configuration_alone_repeats_the_run(workshop: Workshop, here: Path, deepspeed: bool) -> None:
    first = here / "first"
    workshop.train(
        deepspeed=deepspeed,
        output_dir=first,
        loqt__optimizer_state="project",
        loqt__double_quant="both",
        optim__betas="[0.8, 0.95]",
    ).ok()
    written = first / "config.yaml"
    content = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert content["train"]["dtype"] in ("bf16", "fp32"), "what `auto` meant is written down"
    alone = ["--config", str(written)]
    if deepspeed:
        alone += ["--ds_config", str(first / "ds_config.json")]
    repeated = main(alone, deepspeed=deepspeed).ok()
    second = here / "runs" / "default-0001"
    assert f"run directory: {second}" in repeated.output, "in a directory of its own"
    assert losses(first) == losses(second)
    assert load_config(second / "config.yaml") == load_config(written)
    # and a changed seed is another run, so that the equality above means something
    main([*alone, "train.seed=1"], deepspeed=deepspeed).ok()
    assert losses(here / "runs" / "default-0002") != losses(first)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("deepspeed", [False, True], ids=["single", "deepspeed"])
def test_help_prints_every_option_with_default_and_meaning(deepspeed: bool) -> None:
    shown = main(["--help"], deepspeed=deepspeed)
    assert shown.status == 0
    assert ("[--ds_config DS_CONFIG]" in " ".join(shown.output.split())) == deepspeed
    words = " ".join(shown.output.split())
    names = option_names()
    assert len(names) > 60
    for name in names:
        assert f"  {name}=" in shown.output, name
        section, _, field = name.rpartition(".")
        owner = field_types(Config)[section] if section else Config
        meaning = field_docs(owner)[field]
        assert meaning in words, f"{name}: {meaning}"
    assert "loqt.growth=1.2" in shown.output and "loqt.max_gap=null" in shown.output


# ---------------------------------------------------------------- the terminal


def test_the_command_in_a_pipe_prints_lines_and_nothing_odd(workshop: Workshop, tmp_path: Path) -> None:
    done = command(
        sys.executable,
        *("-m", "loqt_ds.train"),
        *workshop.overrides(train__max_steps=4, export__format="nf4", eval__num_samples=1, eval__sample_tokens=3),
        cwd=tmp_path,
    ).ok()
    lines = done.output.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ") and "/4 " in line] == [
        "1/4",
        "2/4",
        "3/4",
        "4/4",
    ]
    assert "\r" not in done.output and "\x1b" not in done.output
    assert done.errors == "", "warnings of other packages are noise in every user's terminal"


def terminal(*, columns: int) -> tuple[int, int]:
    """Two ends of a pseudo-terminal of this width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50 if columns else 0, columns))
    return ours, theirs


def test_the_command_on_a_terminal_shows_a_bar(workshop: Workshop, tmp_path: Path) -> None:
    ours, theirs = terminal(columns=160)
    with subprocess.Popen(
        [sys.executable, "-m", "loqt_ds.train", *workshop.overrides(train__max_steps=6)],
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = read_terminal(ours, process)
    assert process.returncode == 0, shown
    bars = [piece for piece in shown.replace("\n", "\r").split("\r") if piece.startswith("train")]
    last = bars[-1]
    assert "6/6" in last and "|" in last and "loss " in last and "lr " in last and "tok/s" in last, shown
    assert any("<" in bar for bar in bars), "elapsed<left"
    assert "re-initialized 14 layers" in shown
    for line in shown.replace("\r\n", "\n").split("\n"):
        after_bar = line.rsplit("\r", 1)[-1]
        assert not ("re-initialized" in after_bar and "train:" in after_bar), f"a message inside the bar: {line!r}"


def test_a_terminal_that_tells_no_width_has_a_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers, `script` and serial lines have 0 columns, which tqdm takes for an order to draw nothing."""
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = terminal(columns=0)
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        with MetricsLogger(None, max_steps=2) as logger:
            for step in (1, 2):
                logger.step({"step": step, "loss": 1.25, "lr": 0.5, "tokens_per_second": 8.0})
        monkeypatch.undo()
    shown = read_terminal(ours)
    assert "2/2" in shown and "loss 1.2500" in shown


def test_samples_are_no_longer_than_learned_positions(workshop: Workshop, tmp_path: Path) -> None:
    """32 tokens and 64 more would leave the 48 positions of this GPT-2; a row that is longer is refused before."""
    shape = tmp_path / "gpt2.json"
    content = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}
    shape.write_text(json.dumps(content))
    options: dict[str, Any] = {"model__shape": shape, "train__max_steps": 1, "loqt__rank": 8}
    options |= {"eval__num_samples": 1, "eval__sample_tokens": 64, "train__micro_batch_size": 1}
    refused = workshop.train(output_dir=tmp_path / "long", data__sequence_length=49, **options)
    assert refused.status == 2 and "data.sequence_length=49 is more than n_positions=48" in refused.errors
    done = workshop.train(output_dir=tmp_path / "run", data__sequence_length=48, **options).ok()
    assert "--- sample 1" in done.output


def read_terminal(descriptor: int, process: subprocess.Popen[bytes] | None = None, *, seconds: float = 300) -> str:
    """Everything written to a pseudo-terminal until its process ends, or, without one, until the other end is closed.

    What was written arrives a little later and in pieces: one read is not all of it.
    """
    collected, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        ready, _, _ = select.select([descriptor], [], [], 0.2)
        if ready:
            try:
                piece = os.read(descriptor, 65536)
            except OSError:  # the other end is closed
                piece = b""
            if not piece:
                break
            collected += piece
        elif process is not None and process.poll() is not None:
            break
    else:
        if process is not None:
            process.kill()
    os.close(descriptor)
    return collected.decode(errors="replace")
