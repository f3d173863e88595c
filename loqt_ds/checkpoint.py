"""Checkpoints that a crash cannot damage: safetensors and JSON, written beside, synced, renamed.

A checkpoint is one directory, `ROOT/step_N/`:

    manifest.json        format version, size and SHA-256 of every other file, a checksum of itself
    metadata.json        what the trainer needs besides tensors (configuration, counters, data position)
    GROUP.safetensors    one file for each group of tensors ("model", "optimizer", ...)
    NAME/                directories copied in (the tokenizer)

It is written as `ROOT/.tmp-step_N-PID/`, every file and directory is synced, and then renamed; older checkpoints
are deleted only after that. A process that dies at any moment therefore leaves the last complete checkpoint as it
was. Nothing is pickled, so loading a checkpoint of a stranger runs no code.

"Newest" means written last, not highest step: a run that was resumed from an old checkpoint writes lower steps
later, and those are the ones to go on from. The manifest's `sequence` counts for this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import loqt_ds

FORMAT = "loqt_ds checkpoint"
FORMAT_VERSION = 1
READABLE_VERSIONS = (1,)
GIB = 2**30

MANIFEST_FILE = "manifest.json"
METADATA_FILE = "metadata.json"

# Room for the file system's own needs (inodes, directory blocks) on top of the bytes of the files.
FREE_SPACE_MARGIN_BYTES = 2**20

_STEP_NAME = re.compile(r"step_(\d+)")
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TEMPORARY_PREFIX = ".tmp-"
_REPLACED_PREFIX = ".replaced-"
_HASH_CHUNK_BYTES = 2**22

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is damaged, or is of a format this version cannot read."""


# ---------------------------------------------------------------------------------------------- writing files


class _HashingFile:
    """A binary file opened for writing that hashes and counts what passes, and syncs on close."""

    def __init__(self, path: Path):
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by `finish` or `abandon`
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._num_bytes += len(data)

    def finish(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._num_bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        # Closing flushes; on a full disk that fails once more, and the first error is the one to report.
        with contextlib.suppress(OSError):
            self._file.close()


def fsync_directory(path: Path) -> None:
    """Make the names in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write and sync a new file; returns {"bytes", "sha256"}."""
    file = _HashingFile(path)
    try:
        file.write(data)
        return file.finish()
    except BaseException:
        file.abandon()
        raise


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write and sync `value` as indented JSON; returns {"bytes", "sha256"}."""
    return write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def copy_file(source: Path, target: Path) -> dict[str, Any]:
    """Copy and sync one file; returns {"bytes", "sha256"}."""
    file = _HashingFile(target)
    try:
        with open(source, "rb") as opened:
            while chunk := opened.read(_HASH_CHUNK_BYTES):
                file.write(chunk)
        return file.finish()
    except BaseException:
        file.abandon()
        raise


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write and sync tensors as one safetensors file, a tensor at a time; returns {"bytes", "sha256"}.

    The library's own writer copies the whole dictionary first, cannot sync, and refuses tensors that share memory;
    a model of some GiB, possibly on a GPU, should be copied to the host tensor by tensor and hashed while it passes.

    Args:
        path: a file that does not exist yet.
        tensors: dense tensors of any device and shape (scalars and empty ones too).
        metadata: strings for the file's `__metadata__`; transformers asks for {"format": "pt"}.

    Raises:
        CheckpointError: a tensor of a type the format does not know, or on the meta device.
        OSError: the disk is full, the directory is not writable, ...
    """
    assert sys.byteorder == "little", "safetensors files are little-endian, and so must the host be"
    # Wide types first, as the library does: every tensor then starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _SAFETENSORS_DTYPES or tensor.is_meta or tensor.layout is not torch.strided:
            raise CheckpointError(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) cannot be stored; "
                f"store dense tensors of type {sorted(_SAFETENSORS_DTYPES.values())}"
            )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file = _HashingFile(path)
    try:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            file.write(flat.numpy().data)
        return file.finish()
    except BaseException:
        file.abandon()
        raise


def check_free_space(
    directory: Path, num_bytes: int, *, what: str, remedy: str = "lower checkpoint.keep, or choose another output_dir"
) -> None:
    """Raise CheckpointError when fewer than `num_bytes` are available where `directory` lives."""
    available = shutil.disk_usage(directory).free
    needed = num_bytes + FREE_SPACE_MARGIN_BYTES
    if available < needed:
        raise CheckpointError(
            f"{what} needs {needed / GIB:.3f} GiB in {directory}, and {available / GIB:.3f} GiB are available; "
            f"free some space, {remedy}"
        )


# ------------------------------------------------------------------------------------------------------ saving


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any],
    directories: Mapping[str, Path] | None = None,
    keep: int,
) -> Path:
    """Write `root/step_<step>` so that it exists completely or not at all, then delete all but the newest `keep`.

    Args:
        root: directory of the checkpoints of one run; made if absent. One process at a time may save into it.
        step: number of updates done; a checkpoint of the same step is replaced.
        tensors: group -> name -> tensor. Tensors that are the same memory (tied weights) are stored once.
        metadata: JSON values; floats come back exactly, tuples as lists.
        directories: name -> directory of files to copy in.
        keep: how many checkpoints stay, 0 for all. Damaged ones are neither counted nor deleted.

    Returns:
        The directory of the new checkpoint.

    Raises:
        CheckpointError: too little space, an unwritable directory, a failing disk. What was there before is intact.
    """
    directories = directories or {}
    _check_request(step, tensors, directories, keep)
    root = Path(root)
    final = root / f"step_{step}"
    temporary = root / f"{_TEMPORARY_PREFIX}step_{step}-{os.getpid()}"
    try:
        encoded = (json.dumps(dict(metadata), indent=2) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"metadata of the checkpoint of step {step} is not JSON: {error}") from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        stored, aliases = _without_aliases(tensors)
        check_free_space(root, _num_bytes(encoded, stored, directories), what=f"the checkpoint of step {step}")
        temporary.mkdir()
        try:
            files = _write_parts(temporary, encoded, stored, directories)
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "written_by": f"loqt_ds {loqt_ds.__version__}",
                "step": step,
                "sequence": 1 + max((_sequence(path) for path in _candidates(root)), default=0),
                "groups": sorted(stored),
                "aliases": aliases,
                "directories": sorted(directories),
                "files": files,
            }
            write_json(temporary / MANIFEST_FILE, manifest | {"checksum": _checksum(manifest)})
            fsync_directory(temporary)
            _put_in_place(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {root}: {error}; earlier checkpoints there are "
            "intact. Free some space or make the directory writable, or choose another output_dir"
        ) from error
    _rotate(root, keep=keep, newest=final)
    return final


def _num_bytes(metadata: bytes, stored: Mapping[str, Mapping[str, Tensor]], directories: Mapping[str, Path]) -> int:
    tensors = (tensor for group in stored.values() for tensor in group.values())
    files = (path for source in directories.values() for path in _files_of(source))
    return (
        len(metadata)
        + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        + sum(path.stat().st_size for path in files)
    )


def _write_parts(
    temporary: Path,
    metadata: bytes,
    stored: Mapping[str, Mapping[str, Tensor]],
    directories: Mapping[str, Path],
) -> dict[str, dict[str, Any]]:
    """Write everything but the manifest; returns its entries for the files."""
    files = {METADATA_FILE: write_bytes(temporary / METADATA_FILE, metadata)}
    for group, members in stored.items():
        name = f"{group}.safetensors"
        files[name] = write_safetensors(temporary / name, members, metadata={"format": "pt"})
    for name, source in directories.items():
        files |= _copy_directory(source, temporary, name)
    return files


def _check_request(
    step: int, tensors: Mapping[str, Mapping[str, Tensor]], directories: Mapping[str, Path], keep: int
) -> None:
    if step < 0 or keep < 0:
        raise CheckpointError(f"step={step} and checkpoint.keep={keep} must not be negative; keep=0 keeps all")
    for name in (*tensors, *directories):
        if not _GROUP_NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} cannot name a part of a checkpoint; use letters, digits, '_' and '-'")
    for name, source in directories.items():
        if not Path(source).is_dir():
            raise CheckpointError(f"{source} (to be stored as {name}/) is not a directory")


def _without_aliases(
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, str]]]:
    """Split each group into the tensors to store and {other name: stored name} for those that are the same memory."""
    stored: dict[str, dict[str, Tensor]] = {}
    aliases: dict[str, dict[str, str]] = {}
    for group, members in tensors.items():
        stored[group] = {}
        seen: dict[tuple, str] = {}
        for name, tensor in members.items():
            identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and identity in seen:
                aliases.setdefault(group, {})[name] = seen[identity]
            else:
                seen[identity] = name
                stored[group][name] = tensor
    return stored, aliases


def _files_of(directory: Path) -> list[Path]:
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def _copy_directory(source: Path, temporary: Path, name: str) -> dict[str, dict[str, Any]]:
    """Copy the files of `source` to `temporary/name`, synced; returns their manifest entries."""
    target = temporary / name
    target.mkdir()
    made = {target}
    entries = {}
    for path in _files_of(source):
        relative = path.relative_to(source)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        made.update(target / parent for parent in relative.parents)
        entries[f"{name}/{relative.as_posix()}"] = copy_file(path, target / relative)
    for directory in made:
        fsync_directory(directory)
    return entries


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a checkpoint of the same step steps aside first and comes back (`_clean`) if we die in between."""
    replaced = final.parent / f"{_REPLACED_PREFIX}{final.name}"
    if final.exists():
        os.replace(final, replaced)
        fsync_directory(final.parent)
    os.replace(temporary, final)
    fsync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _clean(root: Path) -> None:
    """Remove what dead processes left, and bring back a checkpoint that was about to be replaced."""
    _bring_back(root)
    for path in root.glob(f"{_TEMPORARY_PREFIX}step_*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(f"{_REPLACED_PREFIX}step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _bring_back(root: Path) -> None:
    for path in root.glob(f"{_REPLACED_PREFIX}step_*"):
        final = root / path.name.removeprefix(_REPLACED_PREFIX)
        if not final.exists():
            # Several ranks may look for a checkpoint at once; whoever comes second finds it already renamed.
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, final)


def _rotate(root: Path, *, keep: int, newest: Path) -> None:
    if keep == 0:
        return
    complete = []
    for path in _candidates(root):
        with contextlib.suppress(CheckpointError):
            manifest = _read_manifest(path)
            _verify_files(path, manifest, contents=False)
            complete.append((manifest["sequence"], path))
    for _, path in sorted(complete, reverse=True)[keep:]:
        assert path != newest, "the checkpoint just written has the highest sequence number"
        # Renamed first, so that a checkpoint that is half deleted is never taken for one that is there.
        doomed = root / f"{_TEMPORARY_PREFIX}{path.name}-{os.getpid()}"
        try:
            os.replace(path, doomed)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.keep={keep}: the old checkpoint {path} could not be deleted: {error}; make it deletable, "
                "or set checkpoint.keep=0. The new checkpoint is in place"
            ) from error
        shutil.rmtree(doomed, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Tensors are read when asked for, group by group."""

    path: Path
    step: int
    metadata: dict[str, Any]
    manifest: dict[str, Any] = field(repr=False)

    def groups(self) -> list[str]:
        """Names of the groups of tensors that are stored."""
        return list(self.manifest["groups"])

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, on the CPU; names that were tied when saved are the same tensor again.

        Raises:
            CheckpointError: there is no such group, or its file cannot be read.
        """
        if group not in self.manifest["groups"]:
            raise CheckpointError(f"{self.path} has no tensors {group!r}; it has {self.manifest['groups']}")
        path = self.path / f"{group}.safetensors"
        try:
            tensors = load_file(path, device="cpu")
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, f"{path.name} cannot be read ({error})") from error
        for name, stored in self.manifest["aliases"].get(group, {}).items():
            tensors[name] = tensors[stored]
        return tensors

    def directory(self, name: str) -> Path:
        """Where the directory that was copied in as `name` lies.

        Raises:
            CheckpointError: there is none.
        """
        if name not in self.manifest["directories"]:
            raise CheckpointError(f"{self.path} has no directory {name!r}; it has {self.manifest['directories']}")
        return self.path / name


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint.

    Args:
        path: the `step_N` directory.
        verify: read every file and compare its SHA-256; else only names and sizes are compared.

    Raises:
        CheckpointError: not a checkpoint, damaged (naming the file), or of a format version that is not readable.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}; give a step_N directory")
    manifest = _read_manifest(path)
    _verify_files(path, manifest, contents=verify)
    try:
        metadata = json.loads((path / METADATA_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{METADATA_FILE} cannot be read ({error})") from error
    return Checkpoint(path=path, step=manifest["step"], metadata=metadata, manifest=manifest)


def find_checkpoint(
    root: Path, resume: str, *, say: Callable[[str], object] = print, option: str = "checkpoint.resume"
) -> Path | None:
    """Which checkpoint `checkpoint.resume` means.

    Args:
        root: the run's directory of checkpoints.
        resume: "none": no checkpoint; "auto": the newest of `root` whose every byte verifies, None where there is
            none at all; else a path: a `step_N` directory, or a directory of those (the newest that verifies), or a
            run directory that has `checkpoints/`.
        say: is told of every damaged checkpoint that is passed over.
        option: what the user calls `resume`, for messages.

    Raises:
        CheckpointError: the path is no checkpoint or is damaged, or "auto" finds only damaged ones (starting anew
            over them would not be what was asked for).
    """
    if resume == "none":
        return None
    if resume == "auto":
        return _newest_valid(Path(root), say, f"{option}=auto")
    path = Path(resume)
    if (path / MANIFEST_FILE).exists() or _STEP_NAME.fullmatch(path.name):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"{option}={resume}: {error}") from error
        return path
    for directory in (path, path / "checkpoints"):
        found = _newest_valid(directory, say, f"{option}={resume}") if directory.is_dir() else None
        if found is not None:
            return found
    raise CheckpointError(
        f"{option}={resume} holds no checkpoint; give a step_N directory, a directory of those, or a run directory"
    )


def _newest_valid(root: Path, say: Callable[[str], object], request: str) -> Path | None:
    if not root.is_dir():
        return None
    _bring_back(root)
    # One whose manifest cannot be read may be the newest, so it is looked at first and spoken of.
    candidates = sorted(_candidates(root), key=lambda path: _sequence(path) or sys.maxsize, reverse=True)
    problems = []
    for path in candidates:
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            say(f"passing over {path.name}: {error}")
        else:
            return path
    if problems:
        raise CheckpointError(
            f"{request}: none of the {len(problems)} checkpoints in {root} can be used "
            f"({'; '.join(problems)}); restore one, or start a new run in another output_dir"
        )
    return None


def _candidates(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()]


def _sequence(path: Path) -> int:
    """When a checkpoint was written, as a count from 1; 0 where its manifest cannot be read."""
    try:
        return _read_manifest(path)["sequence"]
    except CheckpointError:
        return 0


def _checksum(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {problem}; use another checkpoint")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise _damaged(path, f"{MANIFEST_FILE} is missing") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{MANIFEST_FILE} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, f"{MANIFEST_FILE} is not that of a {FORMAT}")
    version = manifest.get("format_version")
    if version not in READABLE_VERSIONS:
        readable = ", ".join(str(readable) for readable in READABLE_VERSIONS)
        raise CheckpointError(
            f"checkpoint {path} has format version {version}; loqt_ds {loqt_ds.__version__} reads version {readable}: "
            f"use the release that wrote it ({manifest.get('written_by', 'unknown')})"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise _damaged(path, f"{MANIFEST_FILE} does not match its own checksum")
    return manifest


def _verify_files(path: Path, manifest: Mapping[str, Any], *, contents: bool) -> None:
    for name, entry in manifest["files"].items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise _damaged(path, f"{MANIFEST_FILE} names a file outside the checkpoint ({name})")
        file = path / relative
        try:
            num_bytes = file.stat().st_size
            if num_bytes != entry["bytes"]:
                raise _damaged(path, f"{name} has {num_bytes} bytes instead of {entry['bytes']}")
            if contents and _hash_file(file) != entry["sha256"]:
                raise _damaged(path, f"the contents of {name} have changed (SHA-256 differs)")
        except FileNotFoundError as error:
            raise _damaged(path, f"{name} is missing") from error
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read ({error})") from error


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
