"""Files that are on the disk when the call returns, hashed while they are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

GIB = 2**30

# Room for the file system's own needs (inodes, directory blocks) on top of the bytes of the files.
FREE_SPACE_MARGIN_BYTES = 2**20

_COPY_CHUNK_BYTES = 2**22

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
            while chunk := opened.read(_COPY_CHUNK_BYTES):
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
