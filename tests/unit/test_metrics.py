"""Metrics: valid JSON lines that survive a crash, TensorBoard events another package reads, progress on any stream."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loqt_ds.metrics import MetricsLogger, format_duration, repair_last_line


def record(step: int, **changes: Any) -> dict[str, Any]:
    base = {"step": step, "loss": 5.0 - step / 100, "lr": 0.01, "tokens": 10 * step, "tokens_per_second": 123.0}
    return base | {"peak_memory_gib": 0.5, "grad_norm": 1.0} | changes


def strict(line: str) -> Any:
    """JSON as the standard has it: Python alone would accept NaN."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    return json.loads(line, parse_constant=refuse)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [strict(line) for line in text.splitlines()]


def quiet(run_dir: Path | None, **options: Any) -> MetricsLogger:
    return MetricsLogger(run_dir, **{"max_steps": 10, "every": 1, "tensorboard": False, "progress": "none"} | options)


def test_lines_are_flushed_and_valid(tmp_path: Path) -> None:
    logger = quiet(tmp_path)
    logger.step(record(1))
    logger.step(record(2, loss=math.nan, grad_norm=math.inf))
    logger.event("reinit", {"step": 2, "layers": [{"name": "q", "error_after": -math.inf}], "path": tmp_path})
    logger.event("eval", {"loss": torch.tensor(1.5), "perplexity": math.exp(1.5)})
    got = lines(tmp_path)  # before close: a killed run has them
    assert got[0] == record(1)
    assert (got[1]["loss"], got[1]["grad_norm"]) == ("nan", "inf")
    assert math.isnan(float(got[1]["loss"]))
    assert got[2] == {
        "event": "reinit",
        "step": 2,
        "layers": [{"name": "q", "error_after": "-inf"}],
        "path": str(tmp_path),
    }
    assert got[3] == {"event": "eval", "step": 2, "loss": 1.5, "perplexity": math.exp(1.5)}
    logger.close()
    logger.close()


def test_what_has_no_place_in_json_is_refused(tmp_path: Path) -> None:
    with quiet(tmp_path) as logger, pytest.raises(TypeError, match="object"):
        logger.event("odd", {"value": object()})


def test_every_thins_out_but_not_what_went_wrong(tmp_path: Path) -> None:
    with quiet(tmp_path, every=4) as logger:
        for step in range(1, 11):
            logger.step(record(step, grad_norm=math.nan if step == 7 else 1.0))
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 7, 8, 10]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_half_written_line_is_repaired_on_resume(tmp_path: Path, cut: int) -> None:
    with quiet(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.step(record(step))
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with quiet(tmp_path, resumed_step=2) as logger:
        logger.step(record(3))
    got = lines(tmp_path)
    resume = next(index for index, line in enumerate(got) if line.get("event") == "resume")
    assert [line["step"] for line in got[:resume]] == ([1, 2, 3] if cut == 1 else [1, 2])
    assert got[resume]["step"] == 2
    assert got[resume + 1 :] == [record(3)]


@pytest.mark.parametrize(
    "content, kept",
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b', b'{"a": 1}\n'),
        (b'{"b', b""),
        (b'{"a": 1}\n\x00\x00\x00', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b": \xff\xfe', b'{"a": 1}\n'),
        (b"\x00\x00", b""),
    ],
)
def test_repair(tmp_path: Path, content: bytes, kept: bytes) -> None:
    file = tmp_path / "m.jsonl"
    file.write_bytes(content)
    repair_last_line(file)
    assert file.read_bytes() == kept


def test_a_process_that_is_killed_leaves_its_lines(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom loqt_ds.metrics import MetricsLogger\n"
        f"log = MetricsLogger({str(tmp_path)!r}, max_steps=9, tensorboard=False, progress='none')\n"
        "[log.step({'step': n, 'loss': 1.0}) for n in range(1, 6)]\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    def scalars() -> EventAccumulator:
        return EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    with quiet(tmp_path, tensorboard=True) as logger:
        for step in (1, 2, 3, 4):
            logger.step(record(step))
        logger.event("eval", {"step": 2, "loss": 1.25, "nested": {"a": 1}})
    read = scalars()
    assert [(event.step, event.value) for event in read.Scalars("eval/loss")] == [(2, 1.25)]
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2, 3, 4]
    assert read.Scalars("train/loss")[2].value == pytest.approx(record(3)["loss"])
    with quiet(tmp_path, tensorboard=True, resumed_step=2) as logger:
        logger.step(record(3, loss=9.0))
    curve = [(event.step, round(event.value, 3)) for event in scalars().Scalars("train/loss")]
    assert curve == [(1, 4.99), (2, 4.98), (3, 9.0)]  # what came after the checkpoint is not drawn twice


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricsLogger(tmp_path, max_steps=3, progress="lines", is_main=False)
    logger.step(record(1))
    logger.event("eval", {"loss": 1.0})
    logger.say("hello")
    logger.flush()
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("max_steps", [1, 3, 59, 300, 1000])
@pytest.mark.parametrize("every", [1, 7])
def test_plain_lines_when_piped(max_steps: int, every: int, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(None, max_steps=max_steps, every=every, progress="auto") as logger:
        for step in range(1, max_steps + 1):
            if step % every == 0 or step == max_steps:  # as the loop calls it
                logger.step(record(step))
        logger.say("done")
    out = capsys.readouterr().out
    shown = out.splitlines()
    assert shown[-1] == "done"
    first = every if every <= max_steps else max_steps
    assert shown[0].startswith(f"step {first}/{max_steps}  loss {record(first)['loss']:.4f}  lr 1.00e-02  123 tokens/s")
    assert shown[-2].startswith(f"step {max_steps}/{max_steps} ") and shown[-2].endswith("00:00 left")
    assert len(shown) - 1 <= 40
    assert "\r" not in out and "\x1b" not in out
    if max_steps >= 300:
        assert len(shown) - 1 >= 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    with MetricsLogger(None, max_steps=3, progress="auto") as logger:
        for step in (1, 2, 3):
            logger.step(record(step))
        logger.say("re-initialized")
    text = screen.getvalue()
    assert "3/3" in text and "loss 4.9700" in text and "lr 1.00e-02" in text and "123 tok/s" in text
    assert "re-initialized\n" in text


def test_a_bar_goes_on_where_the_run_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with MetricsLogger(tmp_path, max_steps=10, tensorboard=False, progress="bar", resumed_step=7) as logger:
        assert "7/10" in screen.getvalue()
        logger.step(record(8))
    assert "8/10" in screen.getvalue()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    logger = quiet(tmp_path)
    with pytest.raises(OSError, match="metrics.jsonl"):
        logger.step(record(1))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="metrics.jsonl"):
        quiet(tmp_path / "file")


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "00:00"), (61, "01:01"), (3723, "1:02:03"), (2 * 86400 + 3 * 3600 + 240, "2d 03:04"), (math.inf, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
