"""Rows with named columns from local files: `.tsv`, `.csv`, `.jsonl` (also `.json`), `.parquet`, each also compressed.

A file without a header has its columns named by their places: 0, 1, 2, ... Quotation marks in a `.tsv` are text, as in
the files of GLUE (where a row may begin with one that never ends); in a `.csv` they enclose a field that may hold
commas and line breaks. `data.quoting` says otherwise.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loqt_ds.data.errors import DataError
from loqt_ds.data.files import damage_told, file_format, json_object, parquet_rows, text_lines

TABLES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]


def read_rows(
    path: Path, option: str, *, header: bool = True, quoting: str = "auto", is_lenient: bool = False
) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) for every row of a file that is not blank.

    Args:
        option: how messages name the file's option, such as data.path.
        header: whether the first row of a .tsv or .csv names the columns.
        quoting: none (quotation marks are text), csv (they enclose fields), auto (csv in a .csv, none in a .tsv).
        is_lenient: rows of a .tsv or .csv that have fewer columns than the first are given as they are.

    Raises DataError naming file and line: not UTF-8, not JSON, another number of columns than the first row, damaged.
    """
    ending = file_format(path, TABLES)
    with damage_told(path, option):
        if ending == ".parquet":
            yield from (
                (f"{path} row {number}", row) for number, row in parquet_rows(path, option, lambda names: names)
            )
        elif ending in (".tsv", ".csv"):
            yield from _separated(path, option, header=header, quoting=quoting, is_lenient=is_lenient)
        else:
            yield from (
                (f"{path} line {number}", json_object(line, path, number, option))
                for number, line in text_lines(path, option)
            )


def _separated(path: Path, option: str, *, header: bool, quoting: str, is_lenient: bool) -> Iterator[tuple[str, Row]]:
    names: list[str] | None = None
    for number, fields in _fields(path, option, quoting):
        if names is None:
            names = fields if header else [str(place) for place in range(len(fields))]
            if len(set(names)) < len(names):
                raise DataError(
                    f"{option}={path}: its first line names a column twice ({', '.join(map(repr, names))}); correct "
                    f"it, or set data.header=false if it is a row (columns are then called 0, 1, ...)"
                )
            if header:
                continue
        if len(fields) > len(names) or (len(fields) < len(names) and not is_lenient):
            raise DataError(
                f"{option}={path} line {number} has {len(fields)} columns, the first line has {len(names)}; correct it "
                f"(or set data.quoting, if quotation marks are read wrongly)"
            )
        yield f"{path} line {number}", dict(zip(names, fields, strict=False))


def _fields(path: Path, option: str, quoting: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row."""
    is_csv = file_format(path, TABLES) == ".csv"
    delimiter = "," if is_csv else "\t"
    if quoting == "none" or (quoting == "auto" and not is_csv):
        yield from ((number, line.rstrip("\r\n").split(delimiter)) for number, line in text_lines(path, option))
        return
    csv.field_size_limit(sys.maxsize)
    lines = (line for _, line in text_lines(path, option, blank=True))  # one may be part of a field
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield from ((rows.line_num, fields) for fields in rows if fields)
    except csv.Error as error:
        raise DataError(
            f"{option}={path} near line {rows.line_num}: {error}; correct it, or set data.quoting=none if quotation "
            f"marks are text there"
        ) from error
