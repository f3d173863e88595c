"""What goes wrong while a run is under way: a full disk, gradients that are not finite. The last good checkpoint stays,
its name is told, and the run goes on from it."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killable import finish, start, wait_until
from workshop import Workshop, events, losses, records

from loqt_ds.trainer import Trainer

EVERY_STEP: dict[str, Any] = {"checkpoint__every": 1, "checkpoint__keep": 0, "train__max_steps": 12}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB: room for a few checkpoints of the tiny model and the margin they are asked to leave."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system of its own cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    # lazily: tensors of a checkpoint that a run went on from may still be mapped
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


def last_good(errors: str) -> Path:
    """The checkpoint that the message names."""
    (message,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    found = re.search(r"last good checkpoint is (\S+/step_\d+)", message)
    assert found, message
    good = Path(found[1])
    newest = max(good.parent.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    assert message.endswith(f"checkpoint.resume={'auto' if good == newest else good}."), message
    return good


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    workshop: Workshop, tmp_path: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    workshop.train(output_dir=tmp_path / "whole", **EVERY_STEP).ok()
    stopped = workshop.train(output_dir=run, **EVERY_STEP)
    assert stopped.status == 1, stopped.output + stopped.errors
    assert "Traceback" not in stopped.errors and "GiB" in stopped.errors and "free" in stopped.errors
    good = last_good(stopped.errors)
    done = int(good.name.removeprefix("step_"))
    assert 0 < done < 12 and good.parent == run / "checkpoints"
    kept = sorted(path.name for path in good.parent.glob("step_*"))
    assert kept == sorted(f"step_{step}" for step in range(done + 1))
    enlarge(small_disk)
    workshop.train(output_dir=run, checkpoint__resume="auto", **EVERY_STEP).ok()
    assert events(run, "resume")[0]["step"] == done
    assert losses(run) == losses(tmp_path / "whole")


def test_a_disk_too_full_for_a_line_of_metrics(
    workshop: Workshop, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_disk / "run"
    record = Trainer._record

    def fill_first(self: Trainer, report: Any, *rest: Any) -> None:
        if report.step == 2:
            with (small_disk / "ballast").open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass  # full
        record(self, report, *rest)

    # no checkpoint comes between: what does not fit is a line
    options: dict[str, Any] = {"train__max_steps": 12, "checkpoint__every": 1000, "logging__tensorboard": True}
    workshop.train(output_dir=tmp_path / "whole", **options).ok()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", fill_first)
        stopped = workshop.train(output_dir=run, **options)
    assert stopped.status == 1, stopped.output + stopped.errors
    assert "Traceback" not in stopped.errors and "No space left" in stopped.errors
    assert last_good(stopped.errors) == run / "checkpoints" / "step_0"
    (small_disk / "ballast").unlink()
    enlarge(small_disk)
    workshop.train(output_dir=run, checkpoint__resume="auto", **options).ok()
    assert losses(run) == losses(tmp_path / "whole")
    assert len(records(run)) > 12  # each of its lines is JSON: the half line was cut off


def test_a_disk_too_full_to_begin(workshop: Workshop, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(3_400_000))
    stopped = workshop.train(output_dir=small_disk / "run")
    assert stopped.status == 1
    assert (
        "step 0" in stopped.errors and "GiB" in stopped.errors and "There is no checkpoint before it" in stopped.errors
    )
    assert "Traceback" not in stopped.errors


# ---------------------------------------------------------------- gradients that are not finite


def test_ten_bad_steps_in_a_row_end_the_run(workshop: Workshop, tmp_path: Path) -> None:
    """A rate no model survives: its first update makes the next losses infinite or not a number."""
    run = tmp_path / "run"
    stopped = workshop.train(
        output_dir=run, optim__lr=1e30, optim__warmup_steps=0, train__max_steps=40, checkpoint__every=4
    )
    assert stopped.status == 1, stopped.output + stopped.errors
    assert "10 steps in a row" in stopped.errors and "optim.lr" in stopped.errors
    skipped = events(run, "skipped_step")
    assert [event["in_a_row"] for event in skipped] == list(range(1, 11))
    assert stopped.output.count("the gradient is not finite") == 10
    final = [record for record in records(run) if "event" not in record][-1]
    assert final["num_skipped"] == 10 and final["step"] == skipped[-1]["step"]
    assert last_good(stopped.errors).is_dir()


@pytest.mark.parametrize("deepspeed", [False, True], ids=["single", "deepspeed"])
def test_a_bad_step_is_skipped_and_counted_and_the_run_goes_on(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deepspeed: bool
) -> None:
    """Nine in a row, twice, are survived; the re-initialization that was due in the first streak comes after it."""
    import loqt_ds.trainer

    summed_loss, calls = loqt_ds.trainer.summed_loss, iter(range(10**6))
    bad = {*range(4, 13), *range(14, 23)}  # the schedule's second re-initialization is due before update 4

    def spoiled(*batch: Any) -> torch.Tensor:
        loss = summed_loss(*batch)
        return loss * math.nan if next(calls) in bad else loss

    monkeypatch.setattr(loqt_ds.trainer, "summed_loss", spoiled)
    run = tmp_path / "run"
    done = workshop.train(output_dir=run, deepspeed=deepspeed, train__max_steps=25, train__dtype="fp32").ok()
    assert [event["step"] for event in events(run, "skipped_step")] == sorted(step + 1 for step in bad)
    assert "(9 in a row)" in done.output and "(10 in a row)" not in done.output
    reinits = [event["step"] for event in events(run, "reinit")]
    assert reinits[:2] == [1, 14], "due at the skipped step 5, made up for at the first good one"
    after = losses(run)
    assert all(math.isnan(float(after[step + 1])) for step in bad)
    assert all(math.isfinite(after[step]) for step in after if step - 1 not in bad)
    assert math.isfinite(events(run, "eval")[-1]["loss"])


def test_checkpoints_of_bad_steps_do_not_push_out_the_good_ones(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 leaves a spoiled weight behind, which shows in step 7 only. With two checkpoints kept, those of the ten
    bad steps would leave none to go on from; the one that is named is from before."""
    run = tmp_path / "run"
    record = Trainer._record

    def poison(self: Trainer, report: Any, *rest: Any) -> None:
        record(self, report, *rest)
        if report.step == 5:
            with torch.no_grad():
                next(self._engine.network.parameters()).fill_(math.nan)

    options: dict[str, Any] = {"train__max_steps": 30, "checkpoint__every": 1, "checkpoint__keep": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", poison)
        stopped = workshop.train(output_dir=run, **options)
    assert stopped.status == 1 and "10 steps in a row" in stopped.errors
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_5", "step_6"]
    good = last_good(stopped.errors)
    assert good == run / "checkpoints" / "step_5"
    gone_on = workshop.train(output_dir=run, checkpoint__resume=good, **options).ok()
    assert sorted(losses(run)) == list(range(1, 31)) and all(math.isfinite(v) for v in losses(run).values())
    assert "not finite" not in gone_on.output


def test_no_signal_or_failure_leaves_a_lock_behind(workshop: Workshop, tmp_path: Path) -> None:
    """A run that failed can be gone on with at once, in the same process too."""
    run = tmp_path / "run"
    workshop.train(output_dir=run, optim__lr=1e30, optim__warmup_steps=0, train__max_steps=40)
    again = workshop.train(
        output_dir=run, checkpoint__resume="auto", optim__lr=1e30, optim__warmup_steps=0, train__max_steps=40
    )
    assert again.status == 1 and "10 steps in a row" in again.errors
    assert os.listdir(run / "checkpoints")


def test_two_processes_in_one_directory(workshop: Workshop, tmp_path: Path) -> None:
    """The second would write over the first one's checkpoints; it is told, and nothing of the first is touched."""
    run = tmp_path / "run"
    options: dict[str, Any] = {"output_dir": run, "train__max_steps": 400, "checkpoint__resume": "auto"}
    first = start(workshop.overrides(**options), log=tmp_path / "log")
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists() and bool(losses(run)), first)
        assert first.is_alive(), (tmp_path / "log").read_text()
        written = (run / "config.yaml").stat().st_mtime_ns
        second = workshop.train(**options)
        assert second.status == 2
        assert f"output_dir={run}" in second.errors and "still running" in second.errors
        assert (run / "config.yaml").stat().st_mtime_ns == written
        assert first.is_alive(), "long enough to have been there all the time"
    finally:
        first.kill()
        finish(first)
    assert not events(run, "resume")
