"""The manifest, and names: which directories are checkpoints, which was written last, and whether it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import loqt_ds
from loqt_ds.checkpoint.files import CheckpointError, write_json

FORMAT = "loqt_ds checkpoint"
FORMAT_VERSION = 2
READABLE_VERSIONS = (2,)

MANIFEST_FILE = "manifest.json"
METADATA_FILE = "metadata.json"
LATEST_FILE = "latest"

STEP_NAME = re.compile(r"step_(\d+)")

# What an unfinished save leaves, and what is being deleted; another prefix than that of an export beside it.
TEMPORARY_PREFIX = ".saving-"
REPLACED_PREFIX = ".replaced-"


def part_file(group: str, rank: int, world_size: int) -> str:
    """The file of a rank's part of a group."""
    return f"{group}.safetensors" if world_size == 1 else f"{group}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def candidates(root: Path) -> list[Path]:
    """Directories of `root` that are checkpoints, whole or damaged."""
    return [
        path
        for path in root.iterdir()
        if not path.name.startswith(".")
        and path.is_dir()
        and (STEP_NAME.fullmatch(path.name) or (path / MANIFEST_FILE).exists())
    ]


def bring_back(root: Path) -> None:
    """Give a checkpoint that was about to be replaced its name again, if nothing has taken it."""
    for path in root.glob(f"{REPLACED_PREFIX}*"):
        final = root / path.name.removeprefix(REPLACED_PREFIX)
        if not final.exists():
            # Several ranks may look for a checkpoint at once; whoever comes second finds it already renamed.
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, final)


def sequence(path: Path) -> int:
    """When a checkpoint was written, as a count from 1; 0 where its manifest cannot be read."""
    try:
        return read_manifest(path)["sequence"]
    except CheckpointError:
        return 0


def damaged(path: Path, problem: str) -> CheckpointError:
    """The error to raise for a checkpoint that is not what was written."""
    return CheckpointError(f"checkpoint {path} is damaged: {problem}; use another checkpoint")


def checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest but for its own "checksum"."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write and sync the manifest of the checkpoint in directory `path`.

    Args:
        path: the directory.
        content: "step", "sequence", "groups" (group -> files, by rank), "aliases" (file -> other name -> stored name),
            "directories" (names), "files" (path -> {"bytes", "sha256"}).
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_by": f"loqt_ds {loqt_ds.__version__}",
        **content,
    }
    write_json(path / MANIFEST_FILE, manifest | {"checksum": checksum(manifest)})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in directory `path`.

    Raises:
        CheckpointError: there is none, it is damaged, or of a format version that is not readable.
    """
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise damaged(path, f"{MANIFEST_FILE} is missing") from error
    except (OSError, ValueError) as error:
        raise damaged(path, f"{MANIFEST_FILE} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(path, f"{MANIFEST_FILE} is not that of a {FORMAT}")
    version = manifest.get("format_version")
    if version not in READABLE_VERSIONS:
        readable = ", ".join(str(readable) for readable in READABLE_VERSIONS)
        raise CheckpointError(
            f"checkpoint {path} has format version {version}; loqt_ds {loqt_ds.__version__} reads version {readable}: "
            f"use the release that wrote it ({manifest.get('written_by', 'unknown')})"
        )
    if manifest.get("checksum") != checksum(manifest):
        raise damaged(path, f"{MANIFEST_FILE} does not match its own checksum")
    return manifest


def verify_files(path: Path, manifest: Mapping[str, Any], *, contents: bool) -> None:
    """Compare the files of a checkpoint with its manifest: sizes, and SHA-256 too if `contents`.

    Raises:
        CheckpointError: a file is missing or another one, or the manifest points outside the checkpoint.
    """
    for name, entry in manifest["files"].items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise damaged(path, f"{MANIFEST_FILE} names a file outside the checkpoint ({name})")
        file = path / relative
        try:
            num_bytes = file.stat().st_size
            if num_bytes != entry["bytes"]:
                raise damaged(path, f"{name} has {num_bytes} bytes instead of {entry['bytes']}")
            if contents and _hash_file(file) != entry["sha256"]:
                raise damaged(path, f"the contents of {name} have changed (SHA-256 differs)")
        except FileNotFoundError as error:
            raise damaged(path, f"{name} is missing") from error
        except OSError as error:
            raise damaged(path, f"{name} cannot be read ({error})") from error
    for name in (name for files in manifest["groups"].values() for name in files):
        if name not in manifest["files"]:
            raise damaged(path, f"{MANIFEST_FILE} has no size and no checksum of {name}")


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
