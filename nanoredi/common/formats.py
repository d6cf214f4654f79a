"""Reading rows from files: JSONL or a single JSON value, either also compressed with gzip, CSV, Parquet and Arrow (the
last two need pyarrow). Rows are read one at a time: except for one JSON value, a file may be larger than the memory.
"""

import csv
import gzip
import json
import math
import os
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from nanoredi.common.disk import regular
from nanoredi.common.errors import UserError

MAX_CHARS, MAX_DEPTH = 1 << 28, 100  # of a JSON file, or of a line of a JSONL file
_TABLES = (".parquet", ".arrow")
_KINDS = (".jsonl", ".csv", *_TABLES)  # suffixes of files that hold nothing but rows
SUFFIXES = (".json", ".jsonl", *_TABLES, ".csv", ".tsv", ".gz")  # of all files that may hold rows
_ROWS_AT_ONCE = 64
# Fields of a JSON object that may hold the rows.
_ROWS = "data rows samples examples request_states results".split()


def num_rows(path: Path) -> int:
    """The number of rows in a file; lines are counted without parsing them."""
    if path.suffix.lower() in _TABLES:
        with _table(path) as (total, _):
            return total
    return sum(1 for _ in file_rows(path))


def check_is_file(path: Path) -> None:
    """Raise a UserError for a folder, suggesting a file in it, and for what may be a data set's name on the hub."""
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        inside = sorted(file for depth in ("*", "*/*") for file in path.glob(depth) if file.suffix.lower() in _KINDS)
        such_as = f", such as {inside[0]}" + f", the first of {len(inside)}" * (len(inside) > 1) if inside else ""
        raise UserError(f"{path} is a folder: give the file in it that holds the rows{such_as}")
    if len(path.parts) == 2 and path.suffix.lower() not in SUFFIXES and not os.path.isdir(path.parent):
        get = f"hf download {path} --repo-type dataset --local-dir {path.name}"
        raise UserError(f"there is no file {path}; if it is a data set on the hub: {get}; then give a file of it")


def file_rows(path: Path, fields: tuple[str, ...] | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its place for error messages. Rows of JSONL are unparsed bytes, all others values.

    Args:
        path: a file. Its suffix says whether it is .parquet, .arrow, .csv or .tsv; everything else is read as JSON.
        fields: the columns to read of a Parquet or Arrow file; None: all.

    Raises:
        UserError: when the file cannot be read.
    """
    check_is_file(path)
    if path.suffix.lower() not in _TABLES:
        rows_of = _csv_rows if path.suffix.lower() in (".csv", ".tsv") else _text_rows
        try:
            yield from rows_of(regular(path))
        except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:  # EOFError: a .gz is cut short
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        return
    with _table(path) as (_, batches):
        number = count(1)
        for batch in batches(fields):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                part = batch.slice(start, _ROWS_AT_ONCE)
                columns = {n: _cells(c) for n, c in zip(part.schema.names, part.columns) if not fields or n in fields}
                for i in range(part.num_rows):
                    yield f"{path}, row {next(number)}", {name: cells[i] for name, cells in columns.items()}


def _cells(column: Any) -> list[Any]:
    """A column as JSON values: times, decimals and UTF-8 become text, other bytes and numbers that are not finite null."""
    if not re.search("float|double|time|date|duration|decimal|binary|interval|extension", str(column.type)):
        return column.to_pylist()
    try:
        cells = column.to_pylist()
    except (ValueError, OverflowError):  # a time that Python's datetime cannot hold: nanoseconds, or a far year
        cells = column.cast("string").to_pylist()
    return json.loads(json.dumps(cells, default=_text), parse_constant=lambda _: None)


def _text(cell: Any) -> str | None:
    with suppress(UnicodeDecodeError):  # some writers do not say which of their columns are text
        return cell.decode() if isinstance(cell, bytes) else str(cell)


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_CHARS)
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        names = list(table.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: its first line names the column {twice[0]!r} twice")
        for number, row in enumerate(table, 1):
            if None in row:
                raise UserError(f"{path}, row {number} has more cells than the file's first line has names")
            yield f"{path}, row {number}", row


def _text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else open(path, "rb") as file:
        lines = (line.removeprefix(BOM_UTF8) for line in iter(partial(file.readline, MAX_CHARS + 1), b""))
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
        first = list(islice(lines, 2))
        line = first[0][1].strip() if first else b""
        is_row = len(first) > 1 and line[:1] + line[-1:] in (b"{}", b"[]")
        if not is_row and (line[:1] == b"[" or line[:1] == b"{" and ".json" in map(str.lower, path.suffixes)):
            rows = _rows(path, b"".join(line for _, line in first) + file.read())
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))
        else:
            yield from chain(first, lines)


def _rows(path: Path, text: bytes) -> list[Any]:
    """The rows of one JSON value: the items of a list; of an object rows by number, or columns, or the rows in one of
    its fields; otherwise the object itself is the only row."""
    kind = "a list" if text.lstrip().startswith(b"[") else "an object"
    value = parse_json(f"{path}, which begins as {kind},", text, max_chars=1 << 34)
    if isinstance(value, list):
        return value
    inner = list(value.values())
    if inner and all(isinstance(one, dict) for one in inner):
        if all(name.isdigit() for name in value):
            return inner
        if all(one.keys() == inner[0].keys() and all(name.isdigit() for name in one) for one in inner):
            inner = [list(one.values()) for one in inner]  # columns, in pandas' way
    if len(inner) > 1 and all(isinstance(one, list) and len(one) == len(inner[0]) for one in inner):
        if not any(isinstance(cell, dict) for one in inner for cell in one):
            return [dict(zip(value, row)) for row in zip(*inner)]
    lists = [one for name in _ROWS if isinstance(one := value.get(name), list) and isinstance((one or [{}])[0], dict)]
    is_row = {"problem", "question", "prompt"} & {name.lower() for name in value}
    return [value] if is_row or not lists else lists[0]


@contextmanager
def _table(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of rows of a Parquet or Arrow file, and a function from the columns to read to batches."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} takes pyarrow to read: pip install pyarrow") from None
    regular(path)
    try:
        if path.suffix.lower() == ".parquet":
            # By default whole row groups are loaded, and kept, and a row group may be the whole file.
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
                yield table.metadata.num_rows, lambda fields: table.iter_batches(_ROWS_AT_ONCE, columns=fields)
            return
        with pyarrow.memory_map(str(path)) as source:
            try:  # the format that pyarrow and pandas write, then the one that `datasets` writes
                reader = pyarrow.ipc.open_file(source)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = list(pyarrow.ipc.open_stream(source))
            yield sum(batch.num_rows for batch in batches), lambda _: batches
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def parse_json(where: str, text: str | bytes, max_chars: int | None = None) -> Any:
    """Parse JSON from outside: size and depth are bounded, all numbers finite, and no name has two different values.

    Raises:
        UserError: naming `where`, when the text breaks any of this or is not JSON.
    """
    max_chars = max_chars or MAX_CHARS
    if len(text) > max_chars:
        raise UserError(f"{where} is longer than {max_chars:,} characters")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = _JSON.decode(text)
        deep = text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH
    except RecursionError:
        deep = True
    except ValueError as error:
        kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise UserError(f"{where} is not {kind}: {error}") from None
    if deep:
        raise UserError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    return value


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs) and (twice := [name for name, one in pairs if value[name] != one]):
        raise ValueError(f"it has {twice[0][:80]!r} twice, with two values")
    return value


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object)
