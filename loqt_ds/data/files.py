"""Local files as documents: `.txt`, `.jsonl` (also `.json`), `.parquet`, each also as `.gz`, `.bz2`, `.xz`, `.zst`.

What one document is:

* `.txt`: the file is one document, unless it contains the separator `<|endoftext|>`; then each stretch between two
  separators is one, without the line break on either side of the separator. Blank lines never separate documents:
  in prose they separate paragraphs.
* `.jsonl` and `.json`: JSON Lines, one object a line, the document in `data.text_field` (C4 calls such files `.json`).
* `.parquet`: one row a document, in the column `data.text_field`.

Text must be UTF-8 (a byte order mark at the start is taken off); nothing else about it is changed, line endings
included. A wrong byte is an error that names file, line and byte, because a replacement character trained on is a
mistake that nobody sees.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from loqt_ds.data.errors import DataError

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SEPARATOR = b"<|endoftext|>"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One document. `origin` says where it stands (for messages); `split_key` decides train or validation where it is
    given, otherwise the content does."""

    text: str
    origin: str
    split_key: str | None = None


def file_format(path: Path, formats: tuple[str, ...] = FORMATS) -> str | None:
    """Which of `formats` the path ends in (such as `.txt`), any compression's ending taken off, or None."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((ending for ending in formats if name.endswith(ending)), None)


def _known_endings(formats: tuple[str, ...]) -> str:
    return f"{', '.join(formats)}, each also with {', '.join(COMPRESSIONS)}"


def _walk(directory: Path, option: str, say: Callable[[str], None], formats: tuple[str, ...]) -> list[Path]:
    found, num_passed_over = [], 0
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and file_format(path, formats):
                found.append(path)
            else:
                num_passed_over += 1
    if not found:
        raise DataError(f"{option}={directory}: no file in it that can be read; known: {_known_endings(formats)}")
    if num_passed_over:
        say(f"{option}={directory}: {len(found)} files are read, {num_passed_over} with other endings passed over")
    return found


def resolve_paths(
    value: str | list[str],
    option: str = "data.path",
    say: Callable[[str], None] = print,
    formats: tuple[str, ...] = FORMATS,
) -> list[Path]:
    """The files that a path, a glob (`**` allowed), a directory (searched in depth), or a list of them names.

    Sorted within each entry, each file once, in the order of the entries. Raises DataError for a missing path, a glob
    that matches nothing, an ending that is none of `formats`, an empty file, an empty list.
    """
    entries = [value] if isinstance(value, str | os.PathLike) else list(value)
    if not entries:
        raise DataError(f"{option}={value!r} names no file; give a path, a glob, a directory, or a list of them")
    paths: dict[Path, None] = {}
    for entry in entries:
        path = Path(os.path.expanduser(entry))
        if path.is_dir():
            paths |= dict.fromkeys(_walk(path, option, say, formats))
        elif path.exists():
            paths[path] = None
        elif glob.has_magic(str(entry)):
            matches = sorted(Path(name) for name in glob.glob(os.path.expanduser(entry), recursive=True))
            files = [match for match in matches if match.is_file()]
            if not files:
                raise DataError(f"{option}={entry} matches no file (looked from {Path.cwd()}); correct the pattern")
            paths |= dict.fromkeys(files)
        else:
            raise DataError(f"{option}={entry}: no such file or directory (looked from {Path.cwd()}); correct the path")
    for path in paths:
        if file_format(path, formats) is None:
            raise DataError(f"{option}={path}: files with this ending cannot be read; known: {_known_endings(formats)}")
        if path.stat().st_size == 0:
            raise DataError(f"{option}={path} is empty (0 bytes); remove it or give a file with text")
    return list(paths)


def open_binary(path: Path) -> BinaryIO:
    """The file's bytes, decompressed by its ending."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if ending == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if ending == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if ending == ".zst":
        import pyarrow  # pyarrow comes with `datasets` and carries zstd; Python has it from 3.14 on only

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return cast(BinaryIO, io.BufferedReader(_RawArrow(stream), _BLOCK_BYTES))
    return path.open("rb")


class _RawArrow(io.RawIOBase):
    """An arrow stream as a raw Python stream: arrow's own has no `readline`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def read_documents(path: Path, text_field: str, option: str = "data.path") -> Iterator[Document]:
    """The documents of one file, in order (see the module's docstring). Empty ones are yielded too: the caller counts.

    Raises DataError naming file and line, row or byte: not UTF-8, not JSON, no such field, not a string, damaged.
    """
    readers = {".txt": _read_text, ".parquet": _read_parquet}
    reader = readers.get(file_format(path) or "", _read_json_lines)
    with damage_told(path, option):
        yield from reader(path, text_field, option)


@contextmanager
def damage_told(path: Path, option: str) -> Iterator[None]:
    """Turns what a decompressor says of a damaged file into a DataError."""
    try:
        yield
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(f"{option}={path} is damaged or cut short ({error}); fetch or compress it again") from error
    except OSError as error:
        if error.errno is not None and not path.suffix.lower() == ".zst":
            raise  # a real input/output error, not a decompressor's
        raise DataError(f"{option}={path} is damaged or cut short ({error}); fetch or compress it again") from error


def check_files(paths: list[Path], text_field: str, option: str = "data.path") -> None:
    """Read the first document of each file, so that a wrong field or format is known before any work is done."""
    for path in paths:
        if next(read_documents(path, text_field, option), None) is None:
            raise DataError(f"{option}={path} is empty: no document in it; remove it or give a file with text")


def decode(data: bytes, path: Path, option: str, *, first_byte: int, first_line: int) -> str:
    """UTF-8 text; DataError naming the wrong byte, its place in the file and its line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        is_utf16 = first_byte == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found, encoding = ("UTF-8 but UTF-16", "utf-16") if is_utf16 else ("UTF-8", "latin1")
        raise DataError(
            f"{option}={path} is not {found}: byte 0x{data[error.start]:02x} at byte {first_byte + error.start} (line "
            f"{line}): {error.reason}; convert it, for example: iconv -f {encoding} -t utf-8"
        ) from error


def _read_text(path: Path, text_field: str, option: str) -> Iterator[Document]:
    """Reads in blocks, so that a large file with separators is never in memory as a whole."""
    del text_field  # a text file has no fields
    with open_binary(path) as stream:
        buffer = bytearray()
        searched, first_byte, first_line, num_separators, num_bytes = 0, 0, 1, 0, 0
        ended = False
        while not ended:
            block = stream.read(_BLOCK_BYTES)
            num_bytes += len(block)
            ended = not block
            buffer += block
            while True:
                at = buffer.find(SEPARATOR, searched)
                if at < 0:
                    searched = max(0, len(buffer) - len(SEPARATOR))
                    break
                yield _text_document(bytes(buffer[:at]), path, option, first_byte, first_line, num_separators, True)
                consumed = at + len(SEPARATOR)
                first_line += buffer.count(b"\n", 0, consumed)
                first_byte += consumed
                del buffer[:consumed]
                searched = 0
                num_separators += 1
        if num_bytes and (buffer.strip() or not num_separators):
            yield _text_document(bytes(buffer), path, option, first_byte, first_line, num_separators, False)


def _text_document(
    data: bytes, path: Path, option: str, first_byte: int, first_line: int, num_before: int, separator_follows: bool
) -> Document:
    text = decode(data, path, option, first_byte=first_byte, first_line=first_line)
    if first_byte == 0:
        text = text.removeprefix("\ufeff")
    if num_before:  # the line break that ends the separator's line
        text = text.removeprefix("\r\n") if text.startswith("\r\n") else text.removeprefix("\n")
    if separator_follows:  # the line break that begins it
        text = text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")
    return Document(text, f"{path} line {first_line}")


def text_lines(path: Path, option: str, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """(number, line) of each line, its end included, without the byte order mark; of blank lines if they are wanted."""
    first_byte = 0
    with open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            text = decode(line, path, option, first_byte=first_byte, first_line=number)
            first_byte += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if blank or text.strip():
                yield number, text


def json_object(line: str, path: Path, number: int, option: str) -> dict[str, Any]:
    """The object that a line of JSON Lines holds."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{option}={path} line {number} is not JSON ({error.msg} at character {error.pos}); "
            f"{_how_to_write(line, path, number)}"
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{option}={path} line {number} holds a {type(record).__name__}, not an object; "
            f"{_how_to_write(line, path, number)}"
        )
    return record


def _how_to_write(line: str, path: Path, number: int) -> str:
    """What JSON Lines are, and how a file becomes that which seems to be one array, or indented."""
    remedy, start = "JSON Lines has one object a line", line.strip()
    if number == 1 and (start.startswith("[") or start == "{"):
        remedy += f"; to make it so: jq -c '{'.[]' if start.startswith('[') else '.'}' {path} > x.jsonl"
    return remedy


def _read_json_lines(path: Path, text_field: str, option: str) -> Iterator[Document]:
    for number, line in text_lines(path, option):
        yield _json_document(json_object(line, path, number, option), path, number, text_field, option)


def _json_document(record: dict[str, Any], path: Path, number: int, text_field: str, option: str) -> Document:
    if text_field not in record:
        raise DataError(
            f"data.text_field={text_field}: {path} line {number} has no such field; it has: "
            f"{', '.join(map(repr, record)) or 'none'}"
        )
    text = record[text_field]
    if text is None:
        text = ""  # counted as an empty document
    if not isinstance(text, str):
        raise DataError(
            f"data.text_field={text_field}: {path} line {number} holds a {type(text).__name__} there, not a string; "
            f"name a field that holds text"
        )
    check_text(text, f"{option}={path} line {number}")
    return Document(text, f"{path} line {number}")


def check_text(text: str, where: str) -> None:
    """Raises DataError, naming `where`, for text that UTF-8 cannot carry, and a tokenizer cannot take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} is not UTF-8: the escape \\u{ord(text[error.start]):04x} is half of a surrogate pair; correct "
            f"the line"
        ) from error


def _read_parquet(path: Path, text_field: str, option: str) -> Iterator[Document]:
    def chosen(names: list[str]) -> list[str]:
        check_column(names, text_field, str(path))
        return [text_field]

    for number, row in parquet_rows(path, option, chosen):
        text = row[text_field]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"data.text_field={text_field}: {path} holds a {type(text).__name__} in this column, not a string; "
                f"name a column that holds text"
            )
        yield Document(text or "", f"{path} row {number}")


def parquet_rows(
    path: Path, option: str, columns: Callable[[list[str]], list[str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of each row, with those of its columns that `columns` chooses among the names there are."""
    import pyarrow
    import pyarrow.parquet

    # Parquet is read from its end: a compressed one is unpacked into memory, a plain one is mapped.
    if path.suffix.lower() in COMPRESSIONS:
        with open_binary(path) as stream:
            source: Any = pyarrow.BufferReader(stream.read())
    else:
        source = str(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as table:
            for batch in table.iter_batches(batch_size=1024, columns=columns(table.schema_arrow.names)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{option}={path} is damaged or no Parquet file ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{option}={path} is not UTF-8 after row {number}: {error}; write it again") from error


def check_column(names: list[str], text_field: str, where: str) -> None:
    """Raise DataError where `text_field` is none of the columns; the message lists those there are."""
    if text_field not in names:
        raise DataError(
            f"data.text_field={text_field}: {where} has no such field; it has: {', '.join(map(repr, names)) or 'none'}"
        )
