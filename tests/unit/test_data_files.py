"""Reading files: every format in every compression gives the same documents; each mistake is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from loqt_ds.data.errors import DataError
from loqt_ds.data.files import check_files, open_binary, read_documents, resolve_paths

TEXTS = ["first\n  line\r\n", "zweites: \u00e4\u00f6\u00fc \U0001f600 \u2581", "three\x00\t\u2028 end", "4"]


def zstd(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), sink)
    return sink.getvalue().to_pybytes()


def read(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(path, field)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".parquet"])
def test_formats_and_compressions(tmp_path: Path, ending: str, compression: str) -> None:
    content = {
        ".txt": "\n<|endoftext|>\n".join(TEXTS).encode(),
        ".jsonl": json_lines(TEXTS),
        ".json": json_lines(TEXTS),
        ".parquet": parquet(TEXTS),
    }[ending]
    path = tmp_path / f"some{ending}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    assert read(path) == TEXTS
    assert resolve_paths(str(path)) == [path]


def test_text_without_separators_is_one_document(tmp_path: Path) -> None:
    text = "a\n\n\nb\r\n\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("size", [1, 100, (1 << 20) - 7, (1 << 20) - 6, (1 << 20) + 3])
def test_separator_across_blocks(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.txt").write_text("x" * size + "<|endoftext|>" + "y" * size + "<|endoftext|>")
    assert read(tmp_path / "a.txt") == ["x" * size, "y" * size]


def test_tinystories(real_data: Path) -> None:
    path = real_data / "en" / "tinystories_sample.txt.gz"
    parts = gzip.decompress(path.read_bytes()).decode().split("<|endoftext|>")
    texts = read(path)
    assert len(texts) == len(parts) == 2317
    assert texts == [part.removeprefix("\n").removesuffix("\n") for part in parts[:-1]] + [parts[-1].removeprefix("\n")]


def test_c4_fields(real_data: Path) -> None:
    path = real_data / "en" / "c4" / "c4_en_part1.jsonl.gz"
    expected = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert read(path) == [row["text"] for row in expected]
    assert read(path, "url") == [row["url"] for row in expected]


def test_lines_and_bytes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ok\n<|endoftext|>\nfine\nbad \xff here")
    with pytest.raises(DataError, match=r"data.path=.*a\.txt is not UTF-8: byte 0xff at byte 26 \(line 4\)"):
        read(path)
    assert path.read_bytes()[26] == 0xFF
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "ok"}\n{"text": "\xe9"}\n'))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is not UTF-8: byte 0xe9 at byte 25 \(line 2\)"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"body": "x", "id": 3}\n', r"data.text_field=text: .* line 1 has no such field; it has: 'body', 'id'"),
        (b'{"text": "x"}\n{"text": "y"\n', r"line 2 is not JSON"),
        (b'["x"]\n', r"line 1 holds a list, not an object"),
        (b'[{"text": "x"}]\n', r"line 1 holds a list, .*: jq -c '\.\[\]' .*a\.jsonl > x\.jsonl"),
        (b'[\n  {"text": "x"}\n]\n', r"line 1 is not JSON .*: jq -c '\.\[\]' .*a\.jsonl > x\.jsonl"),
        (b'{\n  "text": "x"\n}\n', r"line 1 is not JSON .*: jq -c '\.' .*a\.jsonl > x\.jsonl"),
        ('{"text": "x"}\n'.encode("utf-16"), r"is not UTF-8 but UTF-16: .*iconv -f utf-16 -t utf-8"),
        (b'{"text": 3}\n', r"data.text_field=text: .* line 1 holds a int there"),
        (b'{"text": "\\ud800"}\n', r"line 1 is not UTF-8: the escape \\ud800"),
        (b"\n\n", r"is empty: no document in it"),
    ],
)
def test_json_mistakes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        check_files([path], "text")
        read(path)


def test_parquet_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(TEXTS))
    with pytest.raises(DataError, match=r"data.text_field=body: .* has no such field; it has: 'id', 'text'"):
        check_files([path], "body")
    with pytest.raises(DataError, match=r"holds a int in this column"):
        check_files([path], "id")
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"damaged or no Parquet file"):
        check_files([path], "text")


@pytest.mark.parametrize("compression", [ending for ending in COMPRESS if ending])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_compression(tmp_path: Path, compression: str, damage: str) -> None:
    data = COMPRESS[compression](json_lines([text * 500 for text in TEXTS]))
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(data[: len(data) * 2 // 3] if damage == "cut" else b"not compressed at all " * 9)
    with pytest.raises(DataError, match=r"data.path=.*a\.jsonl.*(damaged or cut short|is not JSON)"):
        read(path)


def test_resolving(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl.gz", "deep/c.parquet", "deep/d.csv", ".hidden/e.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    told: list[str] = []
    names = [path.relative_to(tmp_path).as_posix() for path in resolve_paths(str(tmp_path), say=told.append)]
    assert names == ["a.jsonl.gz", "b.txt", "deep/c.parquet"]
    assert "1 with other endings passed over" in told[0]
    assert resolve_paths(f"{tmp_path}/*.txt") == [tmp_path / "b.txt"]
    assert resolve_paths(f"{tmp_path}/**/c.*") == [tmp_path / "deep" / "c.parquet"]
    both = resolve_paths([f"{tmp_path}/b.txt", f"{tmp_path}/*.txt", f"{tmp_path}/a.jsonl.gz"])
    assert [path.name for path in both] == ["b.txt", "a.jsonl.gz"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nothing.txt", r"data.path=.*nothing.txt: no such file or directory"),
        ("*.jsonl", r"data.path=.*\*.jsonl matches no file"),
        ("table.csv", r"table.csv: files with this ending cannot be read; known: .txt, .jsonl"),
        ("empty.txt", r"empty.txt is empty \(0 bytes\)"),
        ("folder", r"folder: no file in it that can be read"),
    ],
)
def test_paths_refused(tmp_path: Path, value: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=message):
        resolve_paths(str(tmp_path / value))


def test_empty_list_and_empty_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path=\[\] names no file"):
        resolve_paths([])
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"a.txt.gz is empty"):
        check_files([path], "text")


def test_zstd_stream_reads_lines(tmp_path: Path) -> None:
    lines = [f"line {number}\n".encode() for number in range(5000)]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd(b"".join(lines)))
    with open_binary(path) as stream:
        assert list(stream) == lines
