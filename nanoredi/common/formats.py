"""Rows out of the files that people keep them in: JSONL or a list in JSON, plain or compressed with gzip, Parquet and
Arrow. One row at a time, so that a file which does not fit in memory passes through it (a JSON list must fit).

Parquet and Arrow ask for pyarrow.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nanoredi.common.disk import regular
from nanoredi.common.errors import UserError

MAX_CHARS, MAX_DEPTH = 1 << 28, 100  # of a JSON file, or of a line of a JSONL file
_TABLES = (".parquet", ".arrow")
_ROWS_AT_ONCE = 64


def num_rows(path: Path) -> int:
    """How many rows a file has; lines are not looked into."""
    if path.suffix in _TABLES:
        with _table(path) as (total, _):
            return total
    return sum(1 for _ in _text_rows(path))


def file_rows(path: Path, fields: tuple[str, ...] | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with where it stands, for messages about it: lines of JSONL as bytes, to be parsed, all
    others as values.

    Args:
        path: a file; .parquet and .arrow are tables by their names, whatever else is text.
        fields: the columns of a table that are wanted; all without it.

    Raises:
        UserError: when the file cannot be read.
    """
    if path.suffix not in _TABLES:
        yield from _text_rows(path)
        return
    with _table(path) as (_, batches):
        number = 0
        for batch in batches(fields):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row


def _text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open(regular(path), "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as file:
            first = True
            for number, line in enumerate(iter(partial(file.readline, MAX_CHARS + 1), b""), 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                if first and line.lstrip().startswith(b"["):
                    rows = parse_json(f"{path}, which begins as a list,", line + file.read(), max_chars=1 << 34)
                    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))
                    return
                first = False
                yield f"{path}, line {number}", line
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz that is cut short or damaged
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _table(path: Path) -> Iterator[tuple[int, Any]]:
    """How many rows a Parquet or Arrow file has, and a function of columns that gives its batches."""
    try:
        import pyarrow.parquet
    except ImportError:
        kind = path.suffix[1:].capitalize()
        raise UserError(f"{path} is a {kind} file, which takes pyarrow to read: pip install pyarrow") from None
    regular(path)
    try:
        if path.suffix == ".parquet":
            # By default whole row groups come into memory, and stay; a row group may be the whole file.
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
                names = table.schema_arrow.names
                yield (
                    table.metadata.num_rows,
                    lambda fields: table.iter_batches(_ROWS_AT_ONCE, columns=_chosen(names, fields)),
                )
            return
        with pyarrow.memory_map(str(path)) as source:
            try:  # what pyarrow and pandas write, then what `datasets` writes
                reader = pyarrow.ipc.open_file(source)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = list(pyarrow.ipc.open_stream(source))
            total = sum(batch.num_rows for batch in batches)
            yield total, lambda fields: (batch.select(_chosen(batch.schema.names, fields)) for batch in batches)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _chosen(names: list[str], fields: tuple[str, ...] | None) -> list[str]:
    return [name for name in names if fields is None or name in fields]


def parse_json(where: str, text: str | bytes, max_chars: int | None = None) -> Any:
    """JSON from outside: of bounded size and depth, all its numbers finite, and an object's names of one value.

    Raises:
        UserError: naming `where`, when it is anything else.
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
        raise ValueError(f"{text} is no finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs) and (twice := [name for name, one in pairs if value[name] != one]):
        raise ValueError(f"{twice[0][:80]!r} stands in it twice, with two values")
    return value


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object)
