"""Checkpoints opened, verified and found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loqt_ds.checkpoint.files import CheckpointError
from loqt_ds.checkpoint.manifest import (
    MANIFEST_FILE,
    METADATA_FILE,
    STEP_NAME,
    bring_back,
    candidates,
    damaged,
    read_manifest,
    sequence,
    verify_files,
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Tensors are read when asked for, group by group."""

    path: Path
    step: int
    metadata: dict[str, Any]
    manifest: dict[str, Any] = field(repr=False)

    def groups(self) -> list[str]:
        """Names of the groups of tensors that are stored."""
        return sorted(self.manifest["groups"])

    def num_parts(self, group: str) -> int:
        """How many ranks have written the group.

        Raises:
            CheckpointError: there is no such group.
        """
        return len(self._files(group))

    def tensors(self, group: str, part: int | None = None) -> dict[str, Tensor]:
        """Tensors of a group, on the CPU; names that were tied when saved are the same tensor again.

        Args:
            group: one of `groups()`.
            part: those that this rank wrote; None: those of all ranks, whose names must be disjoint.

        Raises:
            CheckpointError: there is no such group or part, a file cannot be read, or parts share a name.
        """
        files = self._files(group)
        if part is not None:
            if not 0 <= part < len(files):
                raise CheckpointError(
                    f"{self.path} has no part {part} of {group!r}; it has parts 0 to {len(files) - 1}"
                )
            return self._read(files[part])
        merged: dict[str, Tensor] = {}
        for file in files:
            tensors = self._read(file)
            if shared := sorted(merged.keys() & tensors.keys()):
                raise CheckpointError(
                    f"{self.path}: {shared[0]!r} is in several of the {len(files)} parts of {group!r}, which cannot be "
                    "merged; ask for one part"
                )
            merged |= tensors
        return merged

    def _files(self, group: str) -> list[str]:
        if group not in self.manifest["groups"]:
            raise CheckpointError(f"{self.path} has no tensors {group!r}; it has {self.groups()}")
        return self.manifest["groups"][group]

    def _read(self, file: str) -> dict[str, Tensor]:
        try:
            tensors = load_file(self.path / file, device="cpu")
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, f"{file} cannot be read ({error})") from error
        for name, stored in self.manifest["aliases"].get(file, {}).items():
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
        path: its directory (`step_N`).
        verify: read every file and compare its SHA-256; else only names and sizes are compared.

    Raises:
        CheckpointError: not a checkpoint, damaged (naming the file), or of a format version that is not readable.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}; give a step_N directory")
    manifest = read_manifest(path)
    verify_files(path, manifest, contents=verify)
    try:
        metadata = json.loads((path / METADATA_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, f"{METADATA_FILE} cannot be read ({error})") from error
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
    if (path / MANIFEST_FILE).exists() or STEP_NAME.fullmatch(path.name):
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
    bring_back(root)
    # One whose manifest cannot be read may be the newest, so it is looked at first and spoken of.
    newest_first = sorted(candidates(root), key=lambda path: sequence(path) or sys.maxsize, reverse=True)
    problems = []
    for path in newest_first:
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
