"""Documents for training and documents held out, which never meet.

Which side a document falls on is a function of a 64-bit hash: of its content (outer white space aside), so that
identical documents always fall on the same side; for the standard library, of its path relative to the library, so that
an edited file stays on its side. A document is held out where hash < cut, cut = data.validation_fraction * 2^64. With
`data.validation_path` or `data.validation_split` nothing is split, and the held-out documents are those.

Wherever a training document could equal a held-out one (paths as keys, or separate validation data), it is left out of
training by its content's hash, counted and said. A corpus too small for the cut (nothing held out, or everything) moves
the cut so that one document is on the poorer side; a corpus of a single document is cut at a line break, and its end
is held out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from loqt_ds.data.cache import Say, entry, hash_of
from loqt_ds.data.errors import DataError
from loqt_ds.data.files import Document
from loqt_ds.data.sources import DatasetSource, FileSource, Source, StandardLibrarySource

RULES_VERSION = 1  # part of every cache key: raise it when the rules of this file or of files.py change
_DIGEST_BYTES = 16
_WHOLE = 1 << 64


def content_digest(text: str) -> bytes:
    """16 bytes that identify a document's content, outer white space aside."""
    return blake2b(text.strip().encode("utf-8"), digest_size=_DIGEST_BYTES).digest()


def split_hash(key: bytes) -> int:
    """A uniform number in [0, 2^64) from a key."""
    return int.from_bytes(blake2b(key, digest_size=8, person=b"loqt-split").digest(), "big")


@dataclass
class Counts:
    """What a pass over one side of the corpus met."""

    num_documents: int = 0
    num_characters: int = 0
    num_empty: int = 0
    num_duplicates: int = 0  # training documents identical to held-out ones, left out


@dataclass(frozen=True)
class Split:
    """The rule that separates the sides, and what the corpus holds. `tail`: single document, its end is held out."""

    cut: int
    tail: float | None
    num_documents: int
    num_characters: int
    held_out: frozenset[bytes] = field(repr=False)


class Corpus:
    """The documents of `config.data`. Opening it finds the files and reads the first document of each, no more.

    Raises DataError for every mistake found at that point (missing path, empty file, wrong ending, missing field, ...).
    """

    def __init__(self, data: Any, say: Say = print) -> None:
        _refuse_combinations(data)
        self.streaming: bool = bool(data.streaming)
        self.source: Source
        if data.path is not None:
            self.source = FileSource(data.path, data.text_field, "data.path", say)
        elif data.name is not None:
            self.source = DatasetSource(
                data.name, data.config_name, data.split, data.text_field, streaming=self.streaming, option="data.split"
            )
        else:
            self.source = StandardLibrarySource()
        self.validation: Source | None = None
        if data.validation_path is not None:
            self.validation = FileSource(data.validation_path, data.text_field, "data.validation_path", say)
        elif data.validation_split is not None:
            self.validation = DatasetSource(
                data.name,
                data.config_name,
                data.validation_split,
                data.text_field,
                streaming=self.streaming,
                option="data.validation_split",
            )
        self.fraction: float = 0.0 if self.validation else float(data.validation_fraction)
        if self.source.num_unreadable:
            say(f"{self.source.option}: {self.source.num_unreadable} files cannot be decoded and are left out")

    @property
    def option(self) -> str:
        return self.source.option

    def key(self, cache: Path) -> str:
        """A hash of the content of all documents and of how they are split."""
        validation = self.validation.fingerprint(cache) if self.validation else None
        return hash_of([RULES_VERSION, self.source.fingerprint(cache), validation, self.fraction])

    def _position(self, document: Document, digest: bytes) -> int:
        return split_hash(document.split_key.encode() if document.split_key is not None else digest)

    def stream_split(self) -> Split:
        """The split without a pass over the corpus; identical content is excluded once `held_out` is filled in."""
        return Split(int(self.fraction * _WHOLE), None, 0, 0, frozenset())

    def survey(self, cache: Path, say: Say = print) -> Split:
        """One pass over the corpus, remembered in the cache by content: counts, the cut, what is held out."""

        def build(directory: Path) -> None:
            say(f"reading the documents of {self.option}")
            split = self._survey()
            fields = asdict(split)
            fields["cut"] = str(split.cut)  # 2^64 is more than JSON numbers carry
            fields["held_out"] = sorted(digest.hex() for digest in split.held_out)
            (directory / "survey.json").write_text(json.dumps(fields))

        fields = json.loads((entry(cache, "surveys", self.key(cache), build, say) / "survey.json").read_text())
        fields["cut"] = int(fields["cut"])
        fields["held_out"] = frozenset(map(bytes.fromhex, fields["held_out"]))
        return Split(**fields)

    def _survey(self) -> Split:
        cut = int(self.fraction * _WHOLE)
        held_out: set[bytes] = set()
        num_documents = num_characters = 0
        lowest: tuple[int, bytes] | None = None
        highest: tuple[int, bytes] | None = None
        num_held_out = 0
        for document in self.source.documents():
            if not document.text.strip():
                continue
            num_documents += 1
            num_characters += len(document.text)
            digest = content_digest(document.text)
            here = (self._position(document, digest), digest)
            lowest = here if lowest is None else min(lowest, here)
            highest = here if highest is None else max(highest, here)
            if here[0] < cut:
                num_held_out += 1
                if document.split_key is not None:  # with content as key, the cut itself separates equal documents
                    held_out.add(digest)
        if lowest is None or highest is None:
            raise DataError(f"{self.option} holds no text: every document is empty; give data with text")
        if self.validation is not None:
            digests = {content_digest(item.text) for item in self.validation.documents() if item.text.strip()}
            if not digests:
                raise DataError(f"{self.validation.option} holds no text: every document is empty; give data with text")
            return Split(0, None, num_documents, num_characters, frozenset(digests))
        if lowest[0] == highest[0]:
            return Split(0, self.fraction, num_documents, num_characters, frozenset())
        if num_held_out == 0:
            held_out = {lowest[1]}
            cut = lowest[0] + 1
        elif num_held_out == num_documents:
            held_out.discard(highest[1])
            cut = highest[0]
        return Split(cut, None, num_documents, num_characters, frozenset(held_out))

    def documents(
        self, side: str, split: Split, counts: Counts | None = None, first: int = 0
    ) -> Iterator[tuple[int, Document]]:
        """(position in the source, document) for `side` "train" or "validation", from position `first` on.

        Empty documents and training documents identical to held-out ones are left out and counted in `counts`.
        """
        counts = counts if counts is not None else Counts()
        validating = side == "validation"
        source = self.validation if validating and self.validation is not None else self.source
        for index, document in enumerate(source.documents(first), start=first):
            if not document.text.strip():
                counts.num_empty += 1
                continue
            if split.tail is not None:
                document = _part(document, split.tail, validating)
            elif self.validation is None:
                digest = content_digest(document.text)
                if (self._position(document, digest) < split.cut) != validating:
                    continue
                if not validating and digest in split.held_out:
                    counts.num_duplicates += 1
                    continue
            elif not validating and content_digest(document.text) in split.held_out:
                counts.num_duplicates += 1
                continue
            counts.num_documents += 1
            counts.num_characters += len(document.text)
            yield index, document


def _part(document: Document, fraction: float, validating: bool) -> Document:
    """The end of a document (about `fraction` of it, from a line break on), or what is before it."""
    text = document.text
    at = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1
    if at < len(text) * (1 - fraction) / 2:  # no line break worth the name
        at = int(len(text) * (1 - fraction))
    return Document(text[at:] if validating else text[:at], document.origin, document.split_key)


def _refuse_combinations(data: Any) -> None:
    if data.path is not None and data.name is not None:
        raise DataError(f"data.path={data.path} and data.name={data.name} are both set; keep one of them")
    if data.validation_path is not None and data.validation_split is not None:
        raise DataError(
            f"data.validation_path={data.validation_path} and data.validation_split={data.validation_split} are both "
            f"set; keep one of them"
        )
    if data.validation_split is not None and data.name is None:
        raise DataError(
            f"data.validation_split={data.validation_split} is a split of a dataset, but data.name is not set; use "
            f"data.validation_path for files"
        )
    if data.config_name is not None and data.name is None:
        raise DataError(f"data.config_name={data.config_name} belongs to data.name, which is not set; remove it")
    separate = data.validation_path is not None or data.validation_split is not None
    if not separate and not 0 < data.validation_fraction < 1:
        raise DataError(
            f"data.validation_fraction={data.validation_fraction} must be above 0 and below 1, or give held-out data "
            f"with data.validation_path or data.validation_split"
        )
