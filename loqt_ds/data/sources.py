"""Where documents come from: the Python standard library's own source, local files, a `datasets` dataset.

A source is read from the start or from a given document on, always in the same order; its fingerprint changes when its
content does. Nothing is split or left out here (see `corpus.py`).
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from loqt_ds.data.cache import Say, file_fingerprint, hash_of
from loqt_ds.data.errors import DataError
from loqt_ds.data.files import Document, check_column, check_files, file_format, read_documents, resolve_paths

SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})


class Source(Protocol):
    """`option` is how messages name it, such as `data.path=corpus.txt`; `num_unreadable` counts documents left out."""

    option: str
    num_unreadable: int

    def documents(self, first: int = 0) -> Iterator[Document]: ...

    def fingerprint(self, cache: Path) -> str: ...


class StandardLibrarySource:
    """The `.py` files of the running Python's standard library, without tests, installed packages and caches.

    A real corpus of about 11 MB that every user has, offline. Each file is a document, decoded as PEP 263 says. Files
    that cannot be decoded are counted. Raises DataError where the library's source is not there as files.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(root or sysconfig.get_paths()["stdlib"])
        self.option = f"data.path=None (the standard library at {self.root})"
        self.num_unreadable = 0
        if not self._documents:
            raise DataError(
                f"{self.option}: no .py files there (a Python without its source?); set data.path or data.name"
            )

    @cached_property
    def _documents(self) -> list[Document]:
        documents = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
            for name in sorted(names):
                if not name.endswith(".py"):
                    continue
                path = Path(folder, name)
                relative = path.relative_to(self.root).as_posix()
                try:
                    with tokenize.open(path) as handle:
                        text = handle.read()
                    text.encode("utf-8")  # a surrogate would stop the tokenizer later
                except (UnicodeError, SyntaxError):  # SyntaxError: the declared encoding does not exist
                    self.num_unreadable += 1
                    continue
                documents.append(Document(text, str(path), split_key=relative))
        return documents

    def documents(self, first: int = 0) -> Iterator[Document]:
        return islice(iter(self._documents), first, None)

    def fingerprint(self, cache: Path) -> str:
        del cache  # small enough to be hashed every time
        return hash_of([[document.split_key, document.text] for document in self._documents])


class FileSource:
    """Local files (see `files.py`), in the order of the paths."""

    def __init__(self, value: str | list[str], text_field: str, option: str, say: Say) -> None:
        self.option = f"{option}={value}"
        self.num_unreadable = 0
        self._name = option
        self._text_field = text_field
        self.paths = resolve_paths(value, option, say)
        check_files(self.paths, text_field, option)

    def documents(self, first: int = 0) -> Iterator[Document]:
        def every() -> Iterator[Document]:
            for path in self.paths:
                yield from read_documents(path, self._text_field, self._name)

        return islice(every(), first, None)

    def fingerprint(self, cache: Path) -> str:
        return hash_of([self._text_field, [[file_format(path), file_fingerprint(path, cache)] for path in self.paths]])


class DatasetSource:
    """A dataset of the `datasets` package: a hub name, or a local directory (data files, or `save_to_disk`'s)."""

    def __init__(
        self, name: str, config_name: str | None, split: str, text_field: str, *, streaming: bool, option: str
    ) -> None:
        self.option = f"data.name={name} ({option}={split})"
        self.num_unreadable = 0
        self._text_field = text_field
        self._streaming = streaming
        self._dataset = open_dataset(name, config_name, split, streaming, self.option, option)
        names = self._dataset.column_names
        if names is None:  # a stream may know its columns only once something has been read
            names = list(next(iter(self._dataset), {}))
        check_column(list(names), text_field, self.option)
        self._fingerprint_parts = [name, config_name, split, text_field]

    def documents(self, first: int = 0) -> Iterator[Document]:
        rows = self._dataset
        if self._streaming:
            rows = rows.skip(first) if first else rows
        else:
            rows = rows.select_columns([self._text_field]).select(range(min(first, len(rows)), len(rows)))
        for number, row in enumerate(rows, start=first + 1):
            text = row[self._text_field]
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"data.text_field={self._text_field}: {self.option} row {number} holds a {type(text).__name__}, "
                    f"not a string; name a field that holds text"
                )
            yield Document(text or "", f"{self.option} row {number}")

    def fingerprint(self, cache: Path) -> str:
        del cache
        # `datasets` keeps a fingerprint of content and transforms for its own cache; a stream has none and needs none.
        return hash_of([*self._fingerprint_parts, getattr(self._dataset, "_fingerprint", None)])


def open_dataset(name: str, config_name: str | None, split: str, streaming: bool, where: str, option: str) -> Any:
    """A split of a dataset of the hub or of a local directory; DataError, naming `where` and `option`, if there is
    none."""
    import datasets
    from datasets.exceptions import DatasetsError

    directory = Path(name).expanduser()
    try:
        if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
            loaded = datasets.load_from_disk(str(directory))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise DataError(f"{where}: no such split; {option} can be one of {', '.join(loaded)}")
                loaded = loaded[split]
            return loaded.to_iterable_dataset() if streaming else loaded
        target = str(directory) if directory.is_dir() else name
        return datasets.load_dataset(target, config_name, split=split, streaming=streaming)
    except DataError:
        raise
    except (ValueError, OSError, DatasetsError) as error:
        raise DataError(
            f"{where}, data.config_name={config_name}: the dataset cannot be loaded ({type(error).__name__}: {error}); "
            f"correct name, config or split, or, without network, give local files with data.path"
        ) from error
