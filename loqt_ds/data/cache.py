"""A folder of results that several processes may make at once: each is made once, appears whole, or not at all.

An entry is a directory `<cache>/<kind>/<key>`; the key is a hash of everything the result depends on. It is made in a
temporary directory beside it, synced, and renamed into place, so that a reader never sees half of one. A lock file
keeps the ranks of one machine from doing the same work side by side; where the file system has no locks, the work is
done more than once and the last rename that succeeds wins, which is slower and still right.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loqt_ds.data.errors import DataError

Say = Callable[[str], None]
COMPLETE = "complete.json"


def cache_directory(option: str | None) -> Path:
    """`data.cache_dir`, or $LOQT_CACHE, or ~/.cache/loqt_ds; created. DataError where it cannot be written."""
    path = Path(option or os.environ.get("LOQT_CACHE") or "~/.cache/loqt_ds").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise DataError(
            f"data.cache_dir={path} cannot be written ({error}); set data.cache_dir or LOQT_CACHE to a folder that can"
        ) from error
    return path


def hash_of(value: Any) -> str:
    """32 hexadecimal digits for a value made of JSON types."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created if absent)."""
    with path.open("a") as handle:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process to finish {path.with_suffix('')}")
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            say(f"the file system of {path.parent} has no locks; several ranks may do the same work")
        yield  # closing the file releases the lock


def _sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != COMPLETE}


def is_complete(directory: Path) -> bool:
    """Whether the entry is there with every file in its full size."""
    marker = directory / COMPLETE
    if not marker.is_file():
        return False
    try:
        return bool(json.loads(marker.read_text()) == _sizes(directory))
    except json.JSONDecodeError:
        return False


def entry(cache: Path, kind: str, key: str, build: Callable[[Path], None], say: Say = print) -> Path:
    """The directory of the entry; `build(directory)` fills it if it is not there (or is damaged: said, made again)."""
    final = cache / kind / key
    if is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final.with_name(f"{key}.lock"), say):
        if is_complete(final):
            return final
        if final.exists():
            say(f"the cached {final} is damaged; it is made again")
            shutil.rmtree(final)
        _remove_stale(final)
        work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=final.parent))
        work.chmod(0o755)  # mkdtemp makes it private, but several users may share a cache
        try:
            build(work)
            (work / COMPLETE).write_text(json.dumps(_sizes(work)))
            for path in [*work.iterdir(), work]:
                _sync(path)
            _rename(work, final)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DataError(
                    f"data.cache_dir={cache}: no space left while writing {kind}; free some or set data.cache_dir"
                ) from error
            raise
        finally:
            if work.exists():
                shutil.rmtree(work)
    return final


def _rename(work: Path, final: Path) -> None:
    try:
        os.rename(work, final)
    except OSError:
        if not is_complete(final):  # without locks, another process may have been first: then its entry is as good
            raise


def _remove_stale(final: Path) -> None:
    """Half-made entries of the same key that a killed process left behind (untouched for an hour)."""
    for path in final.parent.glob(f".{final.name}-*"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_fingerprint(path: Path, cache: Path) -> str:
    """sha256 of the file's bytes, remembered under (absolute path, size, modification time) so that it is read once.

    A file changed less than two seconds ago is not remembered: it could change again within the clock's grain.
    """
    status = path.stat()
    key = hash_of([str(path.resolve()), status.st_size, status.st_mtime_ns])
    memory = cache / "fingerprints" / key
    if memory.is_file():
        known = memory.read_text()
        if len(known) == 64:
            return known
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if time.time() - status.st_mtime > 2:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as handle_out:
            handle_out.write(digest)
        os.replace(handle_out.name, memory)
    return digest
