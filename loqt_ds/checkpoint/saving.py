"""A checkpoint written by one rank or many, so that it exists completely or not at all.

The ranks exchange four things: whether what they were given can be saved, how many bytes it needs, the name of the
directory they write to, and the entries of the manifest for what they have written. An error of any of them travels
with these, so all ranks raise before anything gets its final name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loqt_ds.checkpoint.files import (
    CheckpointError,
    check_free_space,
    copy_file,
    fsync_directory,
    write_bytes,
    write_safetensors,
)
from loqt_ds.checkpoint.manifest import (
    LATEST_FILE,
    METADATA_FILE,
    REPLACED_PREFIX,
    TEMPORARY_PREFIX,
    bring_back,
    candidates,
    part_file,
    read_manifest,
    sequence,
    verify_files,
    write_manifest,
)
from loqt_ds.ranks import ALONE, PeerFailed, Ranks

_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DIRECTORY_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class _Part:
    """What this rank writes."""

    tensors: dict[str, dict[str, Tensor]]
    """Group -> name -> tensor; tensors that are the same memory once."""
    aliases: dict[str, dict[str, str]]
    """Group -> other name -> name under which that memory is stored."""
    metadata: bytes | None
    """The metadata file; None on all ranks but 0."""
    directories: Mapping[str, Path]
    """Name -> directory to copy; empty on all ranks but 0."""

    num_bytes: int
    """Of all of these."""


@dataclass(frozen=True)
class _Written:
    """The manifest's entries for one rank's part."""

    files: dict[str, dict[str, Any]]
    """Path -> {"bytes", "sha256"}."""
    aliases: dict[str, dict[str, str]]
    """File -> other name -> stored name."""


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any],
    directories: Mapping[str, Path] | None = None,
    keep: int,
    ranks: Ranks = ALONE,
    name: str | None = None,
) -> Path:
    """Write `root/step_<step>` so that it exists completely or not at all, then delete all but the newest `keep`.

    A collective of `ranks`; `root` must be the same directory for all of them.

    Args:
        root: directory of the checkpoints of one run; made if absent. One program at a time may save into it.
        step: number of updates done; a checkpoint of the same name is replaced.
        tensors: group -> name -> tensor, this rank's part; the groups must be the same on all ranks. Tensors that are
            the same memory (tied weights) are stored once.
        metadata: JSON values; floats come back exactly, tuples as lists. Those of rank 0 are written.
        directories: name -> directory of files to copy in. Those of rank 0 are written.
        keep: how many checkpoints stay, 0 for all. Damaged ones are neither counted nor deleted.
        ranks: the processes that save together.
        name: of the directory, instead of step_<step>.

    Returns:
        The directory of the new checkpoint.

    Raises:
        CheckpointError: too little space, an unwritable directory, a failing disk. What was there before is intact.
            Raised by the rank that has the problem, and by rank 0, which names it.
        PeerFailed: by the other ranks.
    """
    root = Path(root)
    name = f"step_{step}" if name is None else name
    own_metadata, own_directories = (metadata, directories or {}) if ranks.is_main else (None, {})
    with _explained(f"the checkpoint of step {step} could not be written to {root}", ranks):
        part = ranks.attempt(lambda: _part(step, name, tensors, own_metadata, own_directories, keep))
        _check_agreement(name, sorted(part.tensors), ranks)
        (num_bytes,) = ranks.sum_numbers(part.num_bytes)
        try:
            temporary = ranks.on_main(lambda: _prepare(root, name, step, num_bytes))
            written = ranks.gather(lambda: _write_part(temporary, part, ranks))
            ranks.on_main(lambda: _finish(temporary, root / name, step, part, written))
        except BaseException:
            if ranks.is_main:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    _clean(root)
            raise
        ranks.on_main(lambda: _rotate(root, keep=keep, newest=root / name))
    return root / name


@contextlib.contextmanager
def _explained(what: str, ranks: Ranks) -> Iterator[None]:
    """Turn errors of the operating system, and on rank 0 those of other ranks, into a CheckpointError that says which
    rank had them."""
    place, visible = (f"rank {ranks.rank}: ", ", one that all ranks see") if ranks.world_size > 1 else ("", "")
    advice = (
        "earlier checkpoints there are intact. Free some space or make the directory writable, or choose another "
        f"output_dir{visible}"
    )
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {place}{error}; {advice}") from error
    except PeerFailed as error:
        if not ranks.is_main:
            raise
        raise CheckpointError(f"{what}: {error}; {advice}") from error
    except CheckpointError as error:
        if ranks.world_size == 1:
            raise
        raise CheckpointError(f"{place}{error}") from error


# ------------------------------------------------------------------------------------------------- what to save


def _part(
    step: int,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any] | None,
    directories: Mapping[str, Path],
    keep: int,
) -> _Part:
    """Raises CheckpointError for what cannot be saved."""
    if step < 0 or keep < 0:
        raise CheckpointError(f"step={step} and checkpoint.keep={keep} must not be negative; keep=0 keeps all")
    if not _DIRECTORY_NAME.fullmatch(name) or name == LATEST_FILE:
        raise CheckpointError(
            f"name={name!r} cannot name a checkpoint; use letters, digits, '.', '_' and '-', no '.' at its start, and "
            f"not {LATEST_FILE!r}"
        )
    for group in (*tensors, *directories):
        if not _GROUP_NAME.fullmatch(group):
            raise CheckpointError(f"{group!r} cannot name a part of a checkpoint; use letters, digits, '_' and '-'")
    for target, source in directories.items():
        if not Path(source).is_dir():
            raise CheckpointError(f"{source} (to be stored as {target}/) is not a directory")
    encoded = None
    if metadata is not None:
        try:
            encoded = (json.dumps(dict(metadata), indent=2) + "\n").encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"metadata of the checkpoint of step {step} is not JSON: {error}") from error
    stored, aliases = _without_aliases(tensors)
    num_bytes = (
        len(encoded or b"")
        + sum(tensor.numel() * tensor.element_size() for group in stored.values() for tensor in group.values())
        + sum(path.stat().st_size for source in directories.values() for path in _files_of(source))
    )
    return _Part(stored, aliases, encoded, directories, num_bytes)


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


def _check_agreement(name: str, groups: list[str], ranks: Ranks) -> None:
    """Raise CheckpointError on all ranks where they save under different names or different groups."""
    requests = ranks.gather_objects((name, groups))
    for rank, request in enumerate(requests):
        if request != requests[0]:
            raise CheckpointError(
                f"the ranks save different checkpoints: rank 0 {requests[0][0]} with groups {requests[0][1]}, rank "
                f"{rank} {request[0]} with groups {request[1]}; each rank must name every group, an empty one too"
            )


# --------------------------------------------------------------------------------------------- writing it aside


def _prepare(root: Path, name: str, step: int, num_bytes: int) -> Path:
    """Rank 0: tidy up, make sure there is room for the parts of all, and make the directory to write them to."""
    root.mkdir(parents=True, exist_ok=True)
    _clean(root)
    check_free_space(root, num_bytes, what=f"the checkpoint of step {step}")
    temporary = _temporary(root, name)
    temporary.mkdir()
    return temporary


def _temporary(root: Path, name: str) -> Path:
    # A name of its own each time: a rank that outlives its killed peers must not write into a later save.
    return root / f"{TEMPORARY_PREFIX}{name}-{os.urandom(4).hex()}"


def _write_part(temporary: Path, part: _Part, ranks: Ranks) -> _Written:
    files = {}
    aliases = {}
    for group, members in part.tensors.items():
        file = part_file(group, ranks.rank, ranks.world_size)
        files[file] = write_safetensors(temporary / file, members, metadata={"format": "pt"})
        if group in part.aliases:
            aliases[file] = part.aliases[group]
    if part.metadata is not None:
        files[METADATA_FILE] = write_bytes(temporary / METADATA_FILE, part.metadata)
    for name, source in part.directories.items():
        files |= _copy_directory(source, temporary, name)
    # By each rank: on a file system of several machines, each has to make its own names durable.
    fsync_directory(temporary)
    return _Written(files, aliases)


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


# ---------------------------------------------------------------------------------------------- making it count


def _finish(temporary: Path, final: Path, step: int, part: _Part, written: list[_Written]) -> None:
    """Rank 0: write the manifest, and give the directory its name; from then on it is the newest."""
    root, world_size = final.parent, len(written)
    write_manifest(
        temporary,
        {
            "step": step,
            "sequence": 1 + max((sequence(path) for path in candidates(root)), default=0),
            "groups": {
                group: [part_file(group, r, world_size) for r in range(world_size)] for group in sorted(part.tensors)
            },
            "aliases": {file: names for entries in written for file, names in entries.aliases.items()},
            "directories": sorted(part.directories),
            "files": {file: entry for entries in written for file, entry in entries.files.items()},
        },
    )
    fsync_directory(temporary)
    # Written before the checkpoint has its name, so that a disk that is full by now leaves both as they were.
    latest = _temporary(root, LATEST_FILE)
    write_bytes(latest, final.name.encode())
    _put_in_place(temporary, final)
    os.replace(latest, root / LATEST_FILE)
    fsync_directory(root)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a checkpoint of the same name steps aside first and comes back (`_clean`) if we die in between."""
    replaced = final.parent / f"{REPLACED_PREFIX}{final.name}"
    if final.exists():
        os.replace(final, replaced)
        fsync_directory(final.parent)
    os.replace(temporary, final)
    fsync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _clean(root: Path) -> None:
    """Remove what dead processes or a failed save left, and bring back a checkpoint that was about to be replaced."""
    bring_back(root)
    for prefix in (TEMPORARY_PREFIX, REPLACED_PREFIX):
        for path in root.glob(f"{prefix}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _rotate(root: Path, *, keep: int, newest: Path) -> None:
    if keep == 0:
        return
    complete = []
    for path in candidates(root):
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(path)
            verify_files(path, manifest, contents=False)
            complete.append((manifest["sequence"], path))
    for _, path in sorted(complete, reverse=True)[keep:]:
        assert path != newest, "the checkpoint just written has the highest sequence number"
        _delete(path, f"checkpoint.keep={keep}", "checkpoint.keep=0")


def delete_others(root: Path, names: Collection[str]) -> None:
    """Rank 0: delete all checkpoints of `root` but those of these names. Raises CheckpointError where one cannot be."""
    for path in candidates(root):
        if path.name not in names:
            _delete(path, "checkpoint.best=true", "checkpoint.best=false")


def _delete(path: Path, option: str, instead: str) -> None:
    # Renamed first, so that a checkpoint that is half deleted is never taken for one that is there.
    doomed = _temporary(path.parent, path.name)
    try:
        os.replace(path, doomed)
    except OSError as error:
        raise CheckpointError(
            f"{option}: the old checkpoint {path} could not be deleted: {error}; make it deletable, or set {instead}. "
            "The new checkpoint is in place"
        ) from error
    shutil.rmtree(doomed, ignore_errors=True)
