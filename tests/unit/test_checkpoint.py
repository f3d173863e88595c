"""Checkpoints under faults: damaged bytes, killed processes, full disks, unwritable directories."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loqt_ds.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint, write_safetensors
from loqt_ds.checkpoint import manifest as module

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]

# The children see this checkout and this folder, installed or not.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    numel = int(torch.tensor(shape).prod()) if shape else 1
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 127
    return torch.randint(0, high, (numel * size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def small_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"weight": torch.randn(7, 5, generator=generator), "codes": torch.arange(33, dtype=torch.uint8)},
        "optimizer": {"step": torch.tensor(3 + seed)},
    }


def save(root: Path, step: int, *, keep: int = 0, **kwargs) -> Path:
    return save_checkpoint(root, step, tensors=small_tensors(step), metadata={"step": step}, keep=keep, **kwargs)


def run_python(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=check,
    )


def names(root: Path) -> list[str]:
    """What lies in a directory of checkpoints, but for the file that names the newest."""
    return sorted(path.name for path in root.iterdir() if path.name != "latest")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (5, 3), (2, 3, 7)]
    tensors = {f"{dtype}/{shape}": random_tensor(dtype, shape, generator) for dtype in DTYPES for shape in shapes}
    tensors["transposed"] = torch.randn(4, 6, generator=generator).t()
    path = save_checkpoint(tmp_path, 4, tensors={"model": tensors, "none": {}}, metadata={}, keep=0)
    loaded = load_checkpoint(path).tensors("model")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert torch.equal(bits(loaded[name]), bits(tensor)), name
    assert load_checkpoint(path).tensors("none") == {}


def test_the_file_is_what_the_library_itself_reads_and_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5, dtype=torch.uint8), "c": torch.tensor(2.0).double()}
    entry = write_safetensors(tmp_path / "ours", tensors, metadata={"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert entry["bytes"] == (tmp_path / "ours").stat().st_size
    assert load_file(tmp_path / "ours").keys() == tensors.keys()


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(300, 40)
    tensors = {"embed": weight, "head": weight, "row": weight[0], "copy": weight.clone()}
    path = save_checkpoint(tmp_path, 0, tensors={"model": tensors}, metadata={}, keep=0)
    assert (path / "model.safetensors").stat().st_size < 2.2 * weight.numel() * 4
    loaded = load_checkpoint(path).tensors("model")
    assert loaded["head"].data_ptr() == loaded["embed"].data_ptr()
    assert loaded["copy"].data_ptr() != loaded["embed"].data_ptr()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_metadata_and_directories_come_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "file.bin").write_bytes(bytes(range(256)))
    (source / "tokenizer.json").write_text("{}")
    metadata = {"pi": 0.1 + 0.2, "nested": {"list": [1, None, "ä"]}, "big": 2**62 + 1, "loss": float("inf")}
    path = save_checkpoint(
        tmp_path / "root", 12, tensors=small_tensors(), metadata=metadata, directories={"tokenizer": source}, keep=0
    )
    opened = load_checkpoint(path)
    assert opened.metadata == metadata and opened.step == 12 and opened.path == path
    assert opened.groups() == ["model", "optimizer"]
    copied = opened.directory("tokenizer")
    assert (copied / "deep" / "er" / "file.bin").read_bytes() == bytes(range(256))
    with pytest.raises(CheckpointError, match="no tensors 'sampler'; it has"):
        opened.tensors("sampler")
    with pytest.raises(CheckpointError, match="no directory 'code'"):
        opened.directory("code")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}
    for file in Path(module.__file__).parent.glob("*.py"):
        source = file.read_text()
        assert "pickle" not in source.replace("is pickled", "") and "torch.load" not in source


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "metadata.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "missing", "empty"])
def test_a_damaged_file_is_found_and_named(tmp_path: Path, name: str, fault: str) -> None:
    path = save(tmp_path, 3)
    file = path / name
    data = bytearray(file.read_bytes())
    if fault == "missing":
        file.unlink()
    elif fault == "truncate":
        file.write_bytes(data[:-3])
    elif fault == "empty":
        file.write_bytes(b"")
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=name):
        find_checkpoint(tmp_path, str(path))


@pytest.mark.parametrize("position", range(0, 100, 7))
def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path, position: int) -> None:
    path = save(tmp_path, 3)
    file = path / "manifest.json"
    data = bytearray(file.read_bytes())
    index = len(data) * position // 100
    data[index] ^= 1
    file.write_bytes(data)
    try:
        unchanged = json.loads(data) == json.loads(bytes(data[:index]) + bytes([data[index] ^ 1]) + data[index + 1 :])
    except ValueError:
        unchanged = False
    if unchanged:
        pytest.skip("the flip only changed white space")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("version", [1, 7, None])
def test_an_unknown_format_version_is_refused_saying_which_are_read(tmp_path: Path, version: int | None) -> None:
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format_version"] = version
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"format version {version}; loqt_ds .* reads version 2: use the release"):
        load_checkpoint(path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    manifest["checksum"] = module.checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        load_checkpoint(path)


def test_every_file_of_a_group_has_a_checksum(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["groups"]["model"] = ["../elsewhere.safetensors"]
    manifest["checksum"] = module.checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no size and no checksum of ../elsewhere"):
        load_checkpoint(path)


def test_auto_passes_over_damaged_ones_and_says_so(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    assert find_checkpoint(tmp_path, "auto") is None
    first, second, third = (save(tmp_path, step) for step in (0, 90, 100))
    assert find_checkpoint(tmp_path, "auto") == third
    assert find_checkpoint(tmp_path, "none") is None
    (third / "manifest.json").write_text("{")
    with open(second / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    said: list[str] = []
    assert find_checkpoint(tmp_path, "auto", say=said.append) == first
    assert len(said) == 2 and "step_100" in said[0] and "model.safetensors" in said[1]
    (first / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        find_checkpoint(tmp_path, "auto", say=said.append)


def test_a_path_may_be_a_checkpoint_a_root_or_a_run(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    save(root, 1)
    path = save(root, 2)
    for resume in (path, root, tmp_path / "run"):
        assert find_checkpoint(tmp_path / "elsewhere", str(resume)) == path
    for resume in (tmp_path, tmp_path / "absent", root / "step_3"):
        with pytest.raises(CheckpointError, match=resume.name):
            find_checkpoint(root, str(resume))


def test_rotation_keeps_the_newest_and_never_the_damaged(tmp_path: Path) -> None:
    for step in (0, 5, 10, 15):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_10", "step_15"]
    (tmp_path / "step_15" / "model.safetensors").write_bytes(b"short")
    save(tmp_path, 20, keep=2)
    # The damaged one does not take the place of a good one, and is left for its owner to look at.
    assert names(tmp_path) == ["step_10", "step_15", "step_20"]
    save(tmp_path, 25, keep=0)
    assert len(names(tmp_path)) == 4


def test_newest_is_what_was_written_last(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200)
    # Resumed from 100: the abandoned 200 must not be what `auto` finds, nor push the new one out.
    rewound = save(tmp_path, 150, keep=1)
    assert names(tmp_path) == ["step_150"]
    assert find_checkpoint(tmp_path, "auto") == rewound


def test_a_checkpoint_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert (tmp_path / "latest").read_text() == "step_1"
    path = save(tmp_path, 2, name="best.v1", keep=1)
    assert path == tmp_path / "best.v1" and names(tmp_path) == ["best.v1"]
    assert (tmp_path / "latest").read_text() == "best.v1"
    assert load_checkpoint(path).step == 2
    assert find_checkpoint(tmp_path, "auto") == find_checkpoint(tmp_path / "absent", str(path)) == path
    assert save(tmp_path, 3, keep=1) == tmp_path / "step_3"
    assert names(tmp_path) == ["step_3"] and (tmp_path / "latest").read_text() == "step_3"


def test_one_process_writes_one_part(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 1))
    assert checkpoint.num_parts("model") == 1
    assert checkpoint.tensors("model", 0).keys() == checkpoint.tensors("model").keys()
    with pytest.raises(CheckpointError, match="no part 1 of 'model'; it has parts 0 to 0"):
        checkpoint.tensors("model", 1)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    tensors = {"model": {"weight": torch.full((3,), 9.0)}}
    path = save_checkpoint(tmp_path, 5, tensors=tensors, metadata={"again": True}, keep=0)
    assert names(tmp_path) == ["step_5"]
    assert load_checkpoint(path).metadata == {"again": True}
    assert load_checkpoint(path).groups() == ["model"]


KILLED = textwrap.dedent(
    """
    # Saves step 2 (or step 1 again), and is killed at the n-th system call that could matter.
    import os, signal, sys
    from pathlib import Path
    from test_checkpoint import save
    root, step = Path(sys.argv[1]), int(sys.argv[2])
    n = 0
    while True:
        child = os.fork()
        if child == 0:
            count = 0
            def killing(call):
                def wrapped(*args, **kwargs):
                    global count
                    if count == n:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1
                    return call(*args, **kwargs)
                return wrapped
            for name in ("fsync", "replace", "mkdir"):
                setattr(os, name, killing(getattr(os, name)))
            save(root / str(n), step, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status) or 100 + n)
        n += 1
        assert os.WTERMSIG(status) == signal.SIGKILL
        if n >= 60:
            sys.exit(1)
    """
)


@pytest.mark.parametrize("step", [2, 1])
def test_a_save_killed_anywhere_leaves_a_valid_newest(tmp_path: Path, step: int) -> None:
    for n in range(40):
        save(tmp_path / str(n), 1)
    done = run_python(KILLED, tmp_path, step, check=False)
    num_kill_points = done.returncode - 100
    assert 8 < num_kill_points < 40
    newest = []
    for n in range(num_kill_points):
        root = tmp_path / str(n)
        found = find_checkpoint(root, "auto", say=lambda text: pytest.fail(text))
        assert found is not None
        newest.append(found.name)
        loaded = load_checkpoint(found)
        assert torch.equal(loaded.tensors("model")["weight"], small_tensors(loaded.step)["model"]["weight"])
        # The next save works and tidies up.
        save(root, 3, keep=0)
        assert all(name.startswith("step_") for name in names(root))
    # Both outcomes occurred: killed before and after the new one was in place.
    assert {"step_1", f"step_{step}"} == set(newest)


def test_a_killed_writer_leaves_the_previous_one_newest(tmp_path: Path) -> None:
    """A process in the middle of its tensors is killed from outside."""
    path = save(tmp_path, 1)
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from loqt_ds.checkpoint import files, save_checkpoint
        import torch
        write = files._HashingFile.write
        def slow(self, data):
            write(self, data)
            self._file.flush()
            print("writing", flush=True)
            time.sleep(0.2)
        files._HashingFile.write = slow
        tensors = {f"t{i}": torch.randn(1000) for i in range(1000)}
        save_checkpoint(Path(sys.argv[1]), 2, tensors={"model": tensors}, metadata={}, keep=1)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(entry.name.startswith(".saving-step_2-") for entry in tmp_path.iterdir())
    assert find_checkpoint(tmp_path, "auto") == path


def test_too_little_free_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.001 GiB in .* and 0\.000 GiB are available; free some"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_1"]
    assert find_checkpoint(tmp_path, "auto") == path


def test_a_disk_that_fills_while_writing_leaves_the_last_one_intact(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    code = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from loqt_ds.checkpoint import CheckpointError, save_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(Path(sys.argv[1]), 2, tensors={"model": {"w": torch.randn(100_000)}}, metadata={}, keep=1)
        except CheckpointError as error:
            print(error)
        """
    )
    done = run_python(code, tmp_path)
    assert "could not be written" in done.stdout and "intact" in done.stdout
    assert names(tmp_path) == ["step_1"]
    assert find_checkpoint(tmp_path, "auto") == path


def test_an_unwritable_directory_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    path = save(root, 1)
    code = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        import torch
        from loqt_ds.checkpoint import CheckpointError, save_checkpoint
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            save_checkpoint(Path(sys.argv[1]), 2, tensors={"model": {"w": torch.randn(10)}}, metadata={}, keep=1)
        except CheckpointError as error:
            print(error)
        """
    )
    root.chmod(0o555)
    for parent in (root.parent, root.parent.parent, root.parent.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    try:
        done = run_python(code, root)
    finally:
        root.chmod(0o755)
    assert "could not be written" in done.stdout and "Permission denied" in done.stdout
    assert find_checkpoint(root, "auto") == path
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(file / "checkpoints", 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": -1}, "step=-1"),
        ({"keep": -1}, "checkpoint.keep=-1"),
        ({"name": "../other"}, "name='../other' cannot name a checkpoint; use letters"),
        ({"name": ".saving-me"}, "name='.saving-me' cannot name"),
        ({"name": "latest"}, "name='latest' cannot name"),
        ({"name": ""}, "name='' cannot name"),
        ({"tensors": {"../model": {}}}, "'../model' cannot name"),
        ({"tensors": {"model": {"x": torch.empty(2, device="meta")}}}, "tensor 'x'"),
        ({"tensors": {"model": {"x": torch.zeros(2, dtype=torch.complex128)}}}, "tensor 'x' .*complex128"),
        ({"metadata": {"x": object()}}, "not JSON"),
        ({"directories": {"tokenizer": Path("/nowhere")}}, "/nowhere .* is not a directory"),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, changes: dict, problem: str) -> None:
    arguments = {"step": 1, "tensors": small_tensors(), "metadata": {}, "keep": 0, "directories": {}} | changes
    step = arguments.pop("step")
    with pytest.raises(CheckpointError, match=problem):
        save_checkpoint(tmp_path, step, **arguments)
    assert list(tmp_path.iterdir()) == []
