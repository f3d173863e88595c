"""Checkpoints that several processes write together, over gloo: parts, and what killed and failing ranks leave.

Reference: the tensors that each rank was given, made here from its number.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from loqt_ds.checkpoint import CheckpointError, files, find_checkpoint, load_checkpoint, save_checkpoint
from loqt_ds.ranks import ALONE, Ranks

COLLECTIVE_TIMEOUT = timedelta(seconds=20)
NEW_SEED = 9
Groups = dict[str, dict[str, Tensor]]


# ---------------------------------------------------------------- processes


def together(folder: Path, world_size: int, action: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs `action(ranks, *arguments)` in `world_size` processes; their outcomes by rank: what it returned, or
    "Type: message" of what it raised, or the exit status where the process was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "loqt_ds.checkpoint", "loqt_ds.ranks"])
    folder.mkdir(parents=True)
    processes = [
        context.Process(target=member, args=(rank, world_size, folder, action, arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes: list[Any] = []
    for rank, process in enumerate(processes):
        process.join(60)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"rank {rank} hangs")
        outcome = folder / f"outcome_{rank}"
        outcomes.append(json.loads(outcome.read_text()) if outcome.exists() else process.exitcode)
    return outcomes


def member(rank: int, world_size: int, folder: Path, action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    ranks = Ranks(dist.new_group(timeout=COLLECTIVE_TIMEOUT), device="cpu")
    outcome: Any
    try:
        ranks.barrier()  # a peer that dies at once must not die while this rank still connects to it
        outcome = action(ranks, *arguments)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    (folder / f"outcome_{rank}").write_text(json.dumps(outcome))
    os._exit(0)  # without waiting for peers that may be dead


# ---------------------------------------------------------------- what they save


def part(rank: int, seed: int) -> Groups:
    """What a rank saves: names of its own in "model" and "optimizer", the names of all in "random"."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    weight = torch.randn(5, 3 + rank, generator=draw)
    return {
        "model": {f"layer{rank}.weight": weight, f"layer{rank}.tied": weight},
        # the second rank owns nothing of it
        "optimizer": {} if rank == 1 else {f"moment{rank}": torch.randn(7, generator=draw).bfloat16()},
        "random": {"torch": torch.randint(0, 255, (11,), dtype=torch.uint8, generator=draw)},
    }


def save(ranks: Ranks, root: Path, step: int, options: dict[str, Any] | None = None) -> str:
    options = dict(options or {})
    seed = options.pop("seed", step)
    arguments: dict[str, Any] = {
        "tensors": part(ranks.rank, seed),
        "metadata": {"seed": seed, "rank": ranks.rank},
        "keep": 0,
    }
    return str(save_checkpoint(root, step, ranks=ranks, **(arguments | options)))


def save_all(ranks: Ranks, root: Path, saves: list[tuple[int, dict[str, Any]]]) -> list[str]:
    return [save(ranks, root, step, options) for step, options in saves]


def check_parts(path: Path, world_size: int) -> None:
    """What was loaded is what each rank was given."""
    checkpoint = load_checkpoint(path)
    assert checkpoint.groups() == ["model", "optimizer", "random"]
    expected = [part(rank, checkpoint.metadata["seed"]) for rank in range(world_size)]
    for group in checkpoint.groups():
        assert checkpoint.num_parts(group) == world_size
        for rank in range(world_size):
            assert_equal(checkpoint.tensors(group, rank), expected[rank][group])
    for group in ("model", "optimizer"):
        assert_equal(checkpoint.tensors(group), {name: value for own in expected for name, value in own[group].items()})


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def content(root: Path) -> dict[str, bytes | None]:
    """Every path below `root`, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_writes_its_part_and_all_parts_come_back(tmp_path: Path, world_size: int) -> None:
    root, tokenizer = tmp_path / "root", tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("a b")
    options = {"directories": {"tokenizer": tokenizer}}
    path = root / "step_4"
    assert together(tmp_path / "run", world_size, save, root, 4, options) == [str(path)] * world_size
    parts = {
        f"{group}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
        for group in ("model", "optimizer", "random")
        for rank in range(world_size)
    }
    assert set(content(path)) == parts | {"manifest.json", "metadata.json", "tokenizer", "tokenizer/vocab.txt"}
    assert set(content(root)) == {f"step_4/{name}" for name in content(path)} | {"step_4", "latest"}
    assert json.loads((path / "manifest.json").read_text())["files"].keys() == parts | {
        "metadata.json",
        "tokenizer/vocab.txt",
    }
    check_parts(path, world_size)
    checkpoint = load_checkpoint(path)
    assert checkpoint.metadata == {"seed": 4, "rank": 0} and checkpoint.step == 4
    assert (checkpoint.directory("tokenizer") / "vocab.txt").read_text() == "a b"
    for tensors in (checkpoint.tensors("model"), checkpoint.tensors("model", 1)):
        assert tensors["layer1.tied"].data_ptr() == tensors["layer1.weight"].data_ptr()
    with pytest.raises(CheckpointError, match=f"'torch' is in several of the {world_size} parts of 'random'"):
        checkpoint.tensors("random")
    for number in (-1, world_size):
        with pytest.raises(CheckpointError, match=f"no part {number} of 'model'; it has parts 0 to {world_size - 1}"):
            checkpoint.tensors("model", number)
    with pytest.raises(CheckpointError, match="no tensors 'other'"):
        checkpoint.num_parts("other")


def test_damage_to_any_part_is_found(tmp_path: Path) -> None:
    root = tmp_path / "root"
    together(tmp_path / "run", 2, save_all, root, [(1, {}), (2, {})])
    for file in sorted((root / "step_2").glob("*.safetensors")):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        said: list[str] = []
        assert find_checkpoint(root, "auto", say=said.append) == root / "step_1"
        assert len(said) == 1 and file.name in said[0]
        file.write_bytes(data)
    assert find_checkpoint(root, "auto") == root / "step_2"


def test_rotation_names_and_latest(tmp_path: Path) -> None:
    root = tmp_path / "root"
    two = {"keep": 2}
    saves = [(1, two), (2, two), (7, two | {"name": "global_step7"}), (3, two)]
    outcomes = together(tmp_path / "run", 2, save_all, root, saves)
    assert outcomes == [[str(root / name) for name in ("step_1", "step_2", "global_step7", "step_3")]] * 2
    assert sorted(path.name for path in root.iterdir()) == ["global_step7", "latest", "step_3"]
    assert (root / "latest").read_text() == "step_3"
    check_parts(root / "global_step7", 2)
    again = (7, {"keep": 1, "name": "global_step7"})
    together(tmp_path / "again", 3, save_all, root, [again])
    assert sorted(path.name for path in root.iterdir()) == ["global_step7", "latest"]
    assert (root / "latest").read_text() == "global_step7"
    assert find_checkpoint(root, "auto") == find_checkpoint(root, str(root / "global_step7")) == root / "global_step7"
    check_parts(root / "global_step7", 3)  # replaced: nothing of the two ranks' parts is left
    assert len(list((root / "global_step7").glob("*.safetensors"))) == 9


# ---------------------------------------------------------------- errors


def save_failing(ranks: Ranks, root: Path, step: int, failing: int, fault: str) -> str:
    if ranks.rank == failing:
        FAULTS[fault]()
    return save(ranks, root, step)


def full_disk() -> None:
    """The disk is full in the middle of the second file."""
    write, calls = files._HashingFile.write, []

    def failing(self: Any, data: Any) -> None:
        calls.append(data)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    files._HashingFile.write = failing  # type: ignore[method-assign]


def full_disk_at_the_manifest() -> None:
    write_json = files.write_json

    def failing(path: Path, value: Any) -> dict[str, Any]:
        write_json(path, value)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from loqt_ds.checkpoint import manifest

    manifest.write_json = failing


def rename_fails() -> None:
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".saving-step"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    os.replace = failing  # type: ignore[assignment]


FAULTS: dict[str, Callable[[], None]] = {
    "full": full_disk,
    "manifest": full_disk_at_the_manifest,
    "rename": rename_fails,
}


@pytest.mark.parametrize("step", [2, 1])
@pytest.mark.parametrize(
    ("failing", "fault", "reason"),
    [
        (0, "full", "No space left"),
        (1, "full", "No space left"),
        (2, "full", "No space left"),
        (0, "manifest", "No space left"),
        (0, "rename", "Permission denied"),
    ],
)
def test_an_error_of_one_rank_raises_on_all_and_leaves_no_trace(
    tmp_path: Path, step: int, failing: int, fault: str, reason: str
) -> None:
    root = tmp_path / "root"
    together(tmp_path / "before", 3, save, root, 1)
    before = content(root)
    outcomes = together(tmp_path / "run", 3, save_failing, root, step, failing, fault)
    for rank, outcome in enumerate(outcomes):
        speaks = rank in (0, failing)
        assert outcome.startswith("CheckpointError: " if speaks else f"PeerFailed: rank {failing} failed"), outcome
        assert f"rank {failing}" in outcome and reason in outcome
        assert not speaks or f"the checkpoint of step {step} could not be written to {root}" in outcome
    assert content(root) == before
    assert find_checkpoint(root, "auto") == root / "step_1"


def save_with_room_for(ranks: Ranks, root: Path, num_bytes: int) -> str:
    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda _: usage(2**40, 0, num_bytes + files.FREE_SPACE_MARGIN_BYTES)  # type: ignore
    tensors = {"model": {f"weight{ranks.rank}": torch.zeros(1000)}}
    return save(ranks, root, 1, {"tensors": tensors})


def test_the_space_for_all_parts_is_looked_for(tmp_path: Path) -> None:
    root = tmp_path / "root"
    first, second = together(tmp_path / "run", 2, save_with_room_for, root, 7000)
    assert first.startswith("CheckpointError: rank 0: the checkpoint of step 1 needs") and "GiB are available" in first
    assert second.startswith("PeerFailed: rank 0 failed: CheckpointError: the checkpoint of step 1 needs")
    assert content(root) == {}
    assert together(tmp_path / "again", 2, save_with_room_for, root, 9000) == [str(root / "step_1")] * 2


def save_oddly(ranks: Ranks, root: Path, odd: int, oddity: str) -> str:
    options: dict[str, Any] = {}
    if ranks.rank == odd:
        tensors = part(ranks.rank, 1)
        if oddity == "tensor":
            tensors["model"]["x"] = torch.empty(2, device="meta")
        elif oddity == "groups":
            del tensors["random"]
        options = {"tensors": tensors}
        if oddity == "metadata":
            options["metadata"] = {"x": object()}
        elif oddity == "directory":
            options["directories"] = {"tokenizer": root / "absent"}
        elif oddity == "name":
            options["name"] = "other"
    return save(ranks, root, 1, options)


@pytest.mark.parametrize(
    ("odd", "oddity", "problems"),
    [
        (1, "tensor", ["rank 1 failed: CheckpointError: tensor 'x'", "rank 1: tensor 'x'"]),
        (1, "groups", ["rank 1 step_1 with groups ['model', 'optimizer']; each rank must name every group"] * 2),
        (1, "name", ["rank 0 step_1 with groups", "rank 1 other with groups"]),
        (0, "metadata", ["rank 0: metadata of the checkpoint of step 1 is not JSON", "rank 0 failed"]),
        (0, "directory", ["absent (to be stored as tokenizer/) is not a directory", "rank 0 failed"]),
    ],
)
def test_impossible_requests_of_one_rank_are_refused_on_all(
    tmp_path: Path, odd: int, oddity: str, problems: list[str]
) -> None:
    root = tmp_path / "root"
    outcomes = together(tmp_path / "run", 2, save_oddly, root, odd, oddity)
    for outcome, problem in zip(outcomes, problems, strict=True):
        assert problem in outcome, outcome
    assert content(root) == {}


@pytest.mark.parametrize("oddity", ["metadata", "directory"])
def test_metadata_and_directories_of_other_ranks_are_not_looked_at(tmp_path: Path, oddity: str) -> None:
    """They may be of the machine of rank 0 alone."""
    root = tmp_path / "root"
    assert together(tmp_path / "run", 2, save_oddly, root, 1, oddity) == [str(root / "step_1")] * 2
    check_parts(root / "step_1", 2)


# ---------------------------------------------------------------- killed ranks


def save_killed(ranks: Ranks, root: Path, step: int, victim: int, moment: int) -> str:
    """The victim is killed before the `moment`-th thing it does that could matter."""
    count = 0

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*args, **kwargs)

        return wrapped

    if ranks.rank == victim:
        for owner, name in [
            (os, "fsync"),
            (os, "replace"),
            (os, "mkdir"),
            (files._HashingFile, "write"),
            (ranks, "sum_numbers"),
            (ranks, "gather_objects"),
        ]:
            setattr(owner, name, killing(getattr(owner, name)))
    return save(ranks, root, step, {"keep": 1, "seed": NEW_SEED})


# A world of two takes a third of a second: the moments of rank 0 are shared out over the two cases it has.
@pytest.mark.parametrize(
    ("world_size", "victim", "step", "moments"),
    [
        (2, 0, 2, range(0, 100, 2)),
        (2, 0, 1, range(1, 100, 2)),
        (2, 1, 2, range(100)),
        (3, 2, 1, range(0, 100, 2)),
    ],
)
def test_a_rank_killed_at_any_moment_leaves_a_valid_newest(
    tmp_path: Path, world_size: int, victim: int, step: int, moments: range
) -> None:
    start = tmp_path / "start"
    together(tmp_path / "before", world_size, save, start, 1)
    saved = []
    for moment in moments:
        root = tmp_path / f"root_{moment}"
        shutil.copytree(start, root)
        outcomes = together(tmp_path / f"run_{moment}", world_size, save_killed, root, step, victim, moment)
        if outcomes[victim] != -signal.SIGKILL:
            assert outcomes == [str(root / f"step_{step}")] * world_size, "nothing was left to be killed at"
            break
        survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
        assert all("RuntimeError" in outcome for outcome in survivors), "they notice"
        newest = (root / "latest").read_text()
        assert step == 1 or (root / newest).is_dir(), "what `latest` names is there"
        found = find_checkpoint(root, "auto", say=lambda text: pytest.fail(text))
        assert found is not None
        check_parts(found, world_size)
        saved.append(load_checkpoint(found).metadata["seed"])
        # The next save works and tidies up.
        save(ALONE, root, 3)
        left = sorted(path.name for path in root.iterdir())
        assert left in (
            ["latest", "step_1", "step_3"],
            ["latest", "step_2", "step_3"],
            ["latest", "step_1", "step_2", "step_3"],
        )
        assert (root / "latest").read_text() == "step_3"
    # Killed before and after the new one was in place.
    assert set(saved) == {1, NEW_SEED} and saved == sorted(saved)
