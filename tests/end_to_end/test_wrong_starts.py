"""Runs that are started in a way that cannot be what was meant: refused with option, value and remedy and exit status
2, before any weight is loaded; nothing is written where the run would have lived."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killable import free_port
from workshop import PRETRAIN, ZERO2, Workshop, command, files_below, main

from loqt_ds.config import ConfigError, load_config
from loqt_ds.memory.division import division_of
from loqt_ds.train import FIRST_SPEAKS_SECONDS

pytestmark = pytest.mark.usefixtures("no_weights")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's variables, before and after."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield


def refuse(
    workshop: Workshop, directory: Path, *named: str, launched: bool, arguments: tuple[str, ...] = (), **changes: Any
) -> None:
    """Starts `launch/pretrain.py` (`launched`), or `python -m loqt_ds.train`; the message must name every string of
    `named`."""
    given = [*arguments, *workshop.overrides(output_dir=directory / "run", **changes)]
    done = main(given, deepspeed=launched)
    assert done.status == 2, f"status {done.status}\n{done.output}\n{done.errors}"
    (message,) = done.errors.strip().splitlines()
    assert message.startswith("error: "), message
    for text in named:
        assert text in message, f"{text!r} is not in: {message}"
    assert not files_below(directory), "something was written"


# ---------------------------------------------------------------- which engine


def test_a_launcher_without_an_engine(workshop: Workshop, tmp_path: Path) -> None:
    named = ("launch/pretrain.py", "--ds_config", "configs/zero2.json", "engine=fsdp2", "python -m loqt_ds.train")
    refuse(workshop, tmp_path, *named, launched=True)


def test_both_engines(workshop: Workshop, tmp_path: Path) -> None:
    given = ("--ds_config", str(ZERO2))
    refuse(
        workshop,
        tmp_path,
        "engine=fsdp2",
        f"--ds_config {ZERO2}",
        "out",
        launched=True,
        arguments=given,
        engine="fsdp2",
    )


@pytest.mark.parametrize("launched", [False, True])
def test_several_processes_for_one_device(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuse(workshop, tmp_path, "WORLD_SIZE=3", "one process", "--ds_config", "engine=fsdp2", launched=launched)


def test_an_engine_that_does_not_exist(workshop: Workshop, tmp_path: Path) -> None:
    refuse(workshop, tmp_path, "engine", "'fsdp'", "auto|fsdp2", launched=True, engine="fsdp")


# ---------------------------------------------------------------- its options


@pytest.mark.parametrize("ds_config", [False, True])
@pytest.mark.parametrize(
    ("option", "value"), [("shard_frozen", True), ("num_replicas", 2), ("reshard_after_forward", False)]
)
def test_options_of_fsdp_without_it(
    workshop: Workshop, tmp_path: Path, option: str, value: Any, ds_config: bool
) -> None:
    given = ("--ds_config", str(ZERO2)) if ds_config else ()
    changes = {f"fsdp__{option}": value}
    named = (f"fsdp.{option}={value}", "engine=auto", "engine=fsdp2")
    refuse(workshop, tmp_path, *named, launched=ds_config, arguments=given, **changes)


def test_groups_that_do_not_divide_the_ranks(workshop: Workshop, tmp_path: Path) -> None:
    named = ("fsdp.num_replicas=2", "1 ranks", "give a divisor of 1")
    refuse(workshop, tmp_path, *named, launched=True, engine="fsdp2", fsdp__num_replicas=2)


@pytest.mark.parametrize(("num", "world_size"), [(2, 3), (4, 6), (8, 4)])
def test_groups_that_do_not_divide_several_ranks(num: int, world_size: int) -> None:
    config = load_config("default", ["engine=fsdp2", f"fsdp.num_replicas={num}"])
    with pytest.raises(ConfigError, match=f"fsdp.num_replicas={num} .*{world_size} ranks.*divisor of {world_size}"):
        division_of(config, world_size=world_size)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fsdp__num_replicas": 0}, ["fsdp.num_replicas=0", "at least 1"]),
        ({"optim__layerwise": True, "train__max_grad_norm": None}, ["optim.layerwise=true", "optim.layerwise=false"]),
        ({"train__max_grad_norm_per_parameter": 1.0}, ["train.max_grad_norm_per_parameter=1.0", "train.max_grad_norm"]),
        (
            {"loqt__dequantized_cache_gib": 0.5, "fsdp__shard_frozen": True},
            ["loqt.dequantized_cache_gib=0.5", "fsdp.shard_frozen=true", "fsdp.shard_frozen=false"],
        ),
    ],
    ids=str,
)
def test_options_that_fsdp_cannot_honour(
    workshop: Workshop, tmp_path: Path, changes: dict[str, Any], named: list[str]
) -> None:
    refuse(workshop, tmp_path, *named, launched=True, engine="fsdp2", **changes)


def test_blocks_that_share_parameters_are_not_sharded(workshop: Workshop, tmp_path: Path) -> None:
    """fully_shard would keep copies of them, of which one is updated."""
    shape = {
        "model_type": "zamba2",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    }
    (tmp_path / "zamba2.json").write_text(json.dumps(shape))
    named = ("engine=fsdp2", "layers.1.", "layers.3.", "one parameter of two blocks", "--ds_config")
    changes = {"engine": "fsdp2", "model__shape": tmp_path / "zamba2.json"}
    refuse(workshop, tmp_path / "runs", *named, launched=True, **changes)


# ---------------------------------------------------------------- the launchers themselves


@pytest.mark.parametrize("wrong", ["--ds_confg=x", "loqt.rnak=5"])
def test_another_process_leaves_the_first_the_time_to_speak(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("loqt_ds.train.time.sleep", waited.append)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    first = main([wrong], deepspeed=True)
    assert first.status == 2 and wrong.split("=")[0].split(".")[-1] in first.errors and not waited

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = main([wrong], deepspeed=True)
    assert done.status == 2 and waited == [FIRST_SPEAKS_SECONDS]
    if wrong.startswith("loqt"):  # nobody has ended it: the first has another recipe, where this is right
        assert done.errors.startswith("error (rank 3): ") and "rnak" in done.errors


def test_a_process_that_waits_is_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loqt_ds.train.time.sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    done = main(["loqt.rnak=5"], deepspeed=True)
    assert (done.status, done.errors) == (128 + signal.SIGTERM, "")


LATE = """import os, runpy, sys, time
if os.environ["RANK"] == "0":
    time.sleep(1.5)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("wrong", "named"), [("fsdp.num_replicas=0", "error: fsdp.num_replicas=0"), ("--ds_confg=x", "error: unrecognized")]
)
def test_under_torchrun_the_first_process_may_be_late(
    workshop: Workshop, tmp_path: Path, wrong: str, named: str
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    given = [wrong, *workshop.overrides(output_dir=tmp_path / "run", engine="fsdp2")]
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = command(*launcher, tmp_path / "late.py", PRETRAIN, *given, cwd=tmp_path)
    (message,) = [line for line in (done.output + done.errors).splitlines() if "error: " in line]
    assert done.status != 0 and named in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "arguments", "named"),
    [
        (2, [], "WORLD_SIZE=2"),
        (2, ["--ds_config", str(ZERO2), "engine=fsdp2"], f"engine=fsdp2 with --ds_config {ZERO2}"),
        (3, ["engine=fsdp2", "fsdp.num_replicas=2"], "fsdp.num_replicas=2 with 3 ranks"),
        (2, ["engine=fsdp2", "optim.layerwise=true", "train.max_grad_norm=null"], "optim.layerwise=true with engine"),
        (2, ["engine=fsdp2", "loqt.rank=65"], "loqt.rank=65"),
    ],
    ids=["no-engine", "both", "groups", "layerwise", "rank"],
)
def test_under_torchrun_one_process_says_it(
    workshop: Workshop, tmp_path: Path, num_ranks: int, arguments: list[str], named: str
) -> None:
    launcher = ["torchrun", "--nproc_per_node", str(num_ranks), "--master_port", str(free_port())]
    given = [*arguments, *workshop.overrides(output_dir=tmp_path / "run", loqt__rank=...)]
    if not any(argument.startswith("loqt.rank=") for argument in arguments):
        given.append("loqt.rank=16")
    done = command(*launcher, PRETRAIN, *given, cwd=tmp_path, DS_ACCELERATOR="cpu")
    assert done.status != 0
    (message,) = [line for line in (done.output + done.errors).splitlines() if line.startswith("error")]
    assert named in message
    assert "drawing weights" not in done.output and not (tmp_path / "run").exists(), json.dumps(given)
