"""Rows of tables, compared with what pandas reads of the same files."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pandas
import pytest

from loqt_ds.data.errors import DataError
from loqt_ds.data.tables import read_rows

TEXTS = ["plain", 'a "quoted" word', '"begins and never ends', "tab-free, with commas", "Ísland – 日本", " spaces "]


def rows_of(path: Path, **options: object) -> list[dict[str, object]]:
    return [row for _, row in read_rows(path, "data.path", **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tsv_as_pandas_reads_it_without_quoting(tmp_path: Path, compressed: bool) -> None:
    lines = ["label\ttext"] + [f"{number % 2}\t{text}" for number, text in enumerate(TEXTS)]
    data = ("\ufeff" + "\n".join(lines) + "\n\n").encode()
    path = tmp_path / ("rows.tsv.gz" if compressed else "rows.tsv")
    path.write_bytes(gzip.compress(data) if compressed else data)
    reference = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, encoding="utf-8-sig")
    assert rows_of(path) == reference.to_dict("records")


def test_a_csv_as_pandas_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    texts = [*TEXTS, "a line\n\nand another,", ""]
    pandas.DataFrame({"text": texts, "label": [str(number) for number in range(len(texts))]}).to_csv(path, index=False)
    reference = pandas.read_csv(path, dtype=str, keep_default_na=False)
    assert rows_of(path) == reference.to_dict("records")
    assert [row["text"] for row in rows_of(path)] == texts


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    rows = [{"text": text, "label": number} for number, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.jsonl") == rows_of(tmp_path / "rows.parquet") == rows


def test_columns_without_a_header_are_their_places(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("a\t1\t\tfirst\nb\t0\t*\tsecond\n")
    found = rows_of(tmp_path / "rows.tsv", header=False)
    assert found[1] == {"0": "b", "1": "0", "2": "*", "3": "second"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.tsv", "a\tb\n1\t2\n1\n", r"line 3 has 1 columns, the first line has 2.*data.quoting"),
        ("rows.tsv", "a\tb\n1\t2\t3\n", "line 2 has 3 columns"),
        ("rows.tsv", "a\ta\n1\t2\n", "names a column twice.*data.header=false"),
        ("rows.csv", 'a,b\n1,"2\n', "data.quoting=none"),
        ("rows.jsonl", '{"a": 1}\n[1]\n', "line 2 holds a list"),
        ("rows.jsonl", "{a: 1}\n", "line 1 is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name)


def test_wrong_bytes_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_bytes(b"a\tb\n1\t2\n1\t\xff\n")
    with pytest.raises(DataError, match=r"byte 0xff at byte 10 \(line 3\)"):
        rows_of(tmp_path / "rows.tsv")


def test_short_rows_are_given_where_they_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("a\tb\n1\t2\n1\n")
    assert rows_of(tmp_path / "rows.tsv", is_lenient=True) == [{"a": "1", "b": "2"}, {"a": "1"}]
