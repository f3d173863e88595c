"""FSDP2 through the command line: from the start to the export, going on under other engines and theirs under it.

References: the run of one process; the run that was not interrupted; the export of another engine, bit for bit.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killable import free_port, run_ranks
from safetensors import safe_open
from workshop import PRETRAIN, REPOSITORY, ZERO2, Workshop, command, events, losses, own_lines

# Re-initializations before updates 0, 4 and 9: from step 5 on, update 4 has been made and 9 has not.
STEPS: dict[str, Any] = {
    "train__max_steps": 11,
    "train__dtype": "fp32",
    "train__micro_batch_size": 2,
    "eval__every": 4,
    "checkpoint__every": 5,
    "checkpoint__keep": 0,
}
SAVED, REINIT, LAST = 5, 10, 11
ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {},
    "whole": {"engine": "fsdp2"},
    "sharded": {"engine": "fsdp2", "fsdp__shard_frozen": True},
    "groups": {"engine": "fsdp2", "fsdp__num_replicas": 2, "fsdp__shard_frozen": True},
}


def arguments(workshop: Workshop, engine: str, **changes: Any) -> list[str]:
    given = workshop.overrides(**(STEPS | ENGINES[engine] | changes))
    return ["--ds_config", str(ZERO2), *given] if engine == "zero2" else given


def trained(workshop: Workshop, run: Path, engine: str, world_size: int = 2, **changes: Any) -> Path:
    """A run of so many ranks, which went well."""
    logs = run.parent / f"{run.name}_logs"
    logs.mkdir()
    words = arguments(workshop, engine, output_dir=run, **changes)
    statuses, printed = run_ranks([words] * world_size, folder=logs)
    assert statuses == [0] * world_size, "\n".join(printed)
    return run


def exported(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(actual: dict[int, float], expected: dict[int, float]) -> None:
    """1e-3 up to the next re-initialization, 2 % after it."""
    assert actual.keys() == expected.keys() and actual
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-3 if step <= REINIT else 2e-2), f"step {step}"


def after(run: Path, step: int) -> dict[int, float]:
    return {done: loss for done, loss in losses(run).items() if done > step}


@pytest.fixture(scope="module")
def launched(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run, what was printed) of two ranks under `torchrun`, in bf16, W and P sharded, through to the export."""
    folder = tmp_path_factory.mktemp("launched")
    run = folder / "run"
    changes = {"train__dtype": "bf16", "export__format": "bf16", "eval__num_samples": 1, "eval__sample_tokens": 4}
    words = arguments(workshop, "sharded", output_dir=run, **changes)
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = command(*launcher, PRETRAIN, *words, cwd=folder).ok()
    return run, done.output + done.errors


def test_torchrun_trains_and_exports_the_masters(launched: tuple[Path, str], tmp_path: Path) -> None:
    """What `tools/export.py`, one process that knows no ranks, makes of the last checkpoint: the same file."""
    run, printed = launched
    own = own_lines(printed)
    assert len(own) == len(set(own)), "a line is printed once"
    for word in ("warning", "Warning", "Traceback", "deprecated", "Failed"):
        assert not [line for line in own if word in line], "noise in the terminal"
    assert sorted(losses(run)) == list(range(1, LAST + 1))
    (export,) = events(run, "export")
    assert export["loss"] == pytest.approx(events(run, "eval")[-1]["loss"], rel=5e-3)
    exporter = [
        sys.executable,
        REPOSITORY / "tools" / "export.py",
        "--checkpoint",
        run / "checkpoints" / f"step_{LAST}",
    ]
    command(*exporter, "--format", "bf16", "--output", tmp_path / "exported", cwd=tmp_path).ok()
    assert same(exported(run / "export"), exported(tmp_path / "exported"))
    masters = {}
    for part in sorted((run / "checkpoints" / f"step_{LAST}").glob("optimizer*.safetensors")):
        with safe_open(part, framework="pt") as file:
            masters |= {f"{part}/{n}": file.get_tensor(n) for n in file.keys() if n.endswith("/master")}  # noqa: SIM118
    assert any(not torch.equal(t.bfloat16().float(), t) for t in masters.values()), "more precise than what is computed"


@pytest.mark.slow
def test_other_engines_export_the_same(workshop: Workshop, launched: tuple[Path, str], tmp_path: Path) -> None:
    """Nothing is left to train: each takes the last checkpoint over, with its masters, and exports it."""
    expected = exported(launched[0] / "export")
    changes = {
        "train__dtype": "bf16",
        "export__format": "bf16",
        "checkpoint__resume": launched[0] / "checkpoints" / f"step_{LAST}",
    }
    for engine, world_size in (("zero2", 2), ("whole", 2), ("groups", 4), ("sharded", 1)):
        size = {"train__micro_batch_size": 4 // world_size}
        run = trained(workshop, tmp_path / engine, engine, world_size, **(changes | size))
        assert same(exported(run / "export"), expected), engine


@pytest.mark.slow
def test_going_on_bit_for_bit(workshop: Workshop, launched: tuple[Path, str], tmp_path: Path) -> None:
    """From the middle of an interval; where W and P are whole, too: it is how the same is computed."""
    changes = {"train__dtype": "bf16", "checkpoint__resume": launched[0] / "checkpoints" / f"step_{SAVED}"}
    for engine in ("sharded", "whole"):
        run = trained(workshop, tmp_path / engine, engine, **changes)
        assert losses(run) == after(launched[0], SAVED)
        assert events(run, "eval")[-1]["loss"] == events(launched[0], "eval")[-1]["loss"]


@pytest.mark.slow
def test_between_the_engines(workshop: Workshop, tmp_path: Path) -> None:
    """fp32: the curve of one process; from FSDP2's checkpoint one process, ZeRO-2 and two groups of two go on, and from
    ZeRO-2's FSDP2."""
    alone = tmp_path / "alone"
    workshop.train(output_dir=alone, **(STEPS | {"train__micro_batch_size": 4})).ok()
    run = trained(workshop, tmp_path / "sharded", "sharded")
    first = {step: loss for step, loss in losses(alone).items() if step <= SAVED}
    assert {step: losses(run)[step] for step in first} == pytest.approx(first, rel=1e-5)
    assert losses(run) == pytest.approx(losses(alone), rel=2e-2)
    both = list(zip(events(run, "eval"), events(alone, "eval"), strict=True))
    assert both and all(one["num_tokens"] == other["num_tokens"] for one, other in both), "every held-out token, once"
    assert both[0][0]["loss"] == pytest.approx(both[0][1]["loss"], rel=1e-4)
    saved = run / "checkpoints" / f"step_{SAVED}"
    single = {"output_dir": tmp_path / "single", "train__micro_batch_size": 4, "checkpoint__resume": saved}
    workshop.train(**(STEPS | single)).ok()
    near(losses(tmp_path / "single"), after(run, SAVED))
    near(losses(trained(workshop, tmp_path / "zero2", "zero2", checkpoint__resume=saved)), after(run, SAVED))
    four = {"checkpoint__resume": saved, "train__micro_batch_size": 1}
    near(losses(trained(workshop, tmp_path / "groups", "groups", 4, **four)), after(run, SAVED))
    theirs = tmp_path / "zero2" / "checkpoints" / "step_10"
    near(
        losses(trained(workshop, tmp_path / "back", "whole", checkpoint__resume=theirs)), after(tmp_path / "zero2", 10)
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_once(workshop: Workshop, launched: tuple[Path, str], tmp_path: Path) -> None:
    saved = tmp_path / f"step_{SAVED}"
    shutil.copytree(launched[0] / "checkpoints" / saved.name, saved)
    file = sorted(saved.glob("optimizer*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(bytes(data))
    changes = {"train__dtype": "bf16", "output_dir": tmp_path / "run", "checkpoint__resume": saved}
    statuses, printed = run_ranks([arguments(workshop, "sharded", **changes)] * 2, folder=tmp_path)
    assert statuses == [2, 2], printed
    (line,) = [line for log in printed for line in log.splitlines() if line.startswith("error")]
    assert file.name in line and "Traceback" not in "".join(printed)
