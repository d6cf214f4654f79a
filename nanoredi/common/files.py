"""Reading JSON and rows with bounds and checks against a declared shape, and writing them as whole files (disk.py) or
whole lines."""

import contextlib
import json
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from nanoredi.common.disk import may_crash, regular, writing
from nanoredi.common.errors import UserError
from nanoredi.common.formats import MAX_CHARS, file_rows, parse_json

KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}
KINDS |= {dict: "an object", list: "a list"}


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file: an object or, with kind list, a list.

    Raises:
        UserError: when it is missing, broken, or holds something else.
    """
    value = parse_json(str(path), read_text(path))
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}")
    return value


def read_text(path: Path) -> str:
    """The content of a text file, cut to one character more than JSON may have.

    Raises:
        UserError: when it cannot be read or is not UTF-8.
    """
    try:
        with open(regular(path), encoding="utf-8-sig") as file:  # editors on Windows begin a file with a mark
            return file.read(MAX_CHARS + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def read_rows(path: str, fields: tuple[str, ...] | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a file in any of the formats (formats.py), each with its place ("file, line n") for error messages.
    Empty lines are skipped.

    Args:
        fields: the columns to read of a Parquet or Arrow file; None: all.

    Raises:
        UserError: when the file cannot be read or a line is not JSON.
    """
    kinds = "; rows are JSONL (an object a line), a JSON list, either also as .gz, CSV, Parquet or Arrow"
    for where, row in file_rows(Path(path), fields):
        if isinstance(row, bytes):
            try:
                row = parse_json(where, row)
            except UserError as error:
                raise UserError(f"{error}{kinds}") from None
        kinds = ""  # after one good row the format is known to be right
        yield where, row


def check(where: str, value: Any, shape: Any, name: str = "") -> Any:
    """Check a value from outside against a declared shape, and return it.

    Args:
        where: file and line, for error messages.
        shape: a type; a value, such as None; range(low, end) for whole numbers; [shape] for a list of such items;
            {name: shape} for an object with these fields, optional if the name ends in "?"; {str: shape} for an object
            with any names; a tuple of alternative shapes.

    Raises:
        UserError: naming where, the field, its value and what it must be.
    """
    if isinstance(shape, tuple):
        for one in shape:
            with contextlib.suppress(UserError):
                return check(where, value, one, name)
    elif isinstance(shape, dict) and type(value) is dict:
        for key, inner in shape.items():
            for found in value if key is str else [key.removesuffix("?")]:
                if found in value:
                    check(where, value[found], inner, f"{name}.{found}" if name else found)
                elif not key.endswith("?"):
                    raise UserError(f"{where}: {name or 'the object'} has no field {found!r}")
        return value
    elif isinstance(shape, list) and type(value) is list:
        for i, inner in enumerate(value):
            check(where, inner, shape[0], f"{name}[{i}]")
        return value
    elif isinstance(shape, range) and type(value) is int and value in shape:
        return value
    elif shape in (type(value), value) or shape is float and type(value) is int and abs(value) < 1e300:
        return value
    raise UserError(f"{where}: {name or 'it'} is {repr(value)[:80]}; it must be {_words(shape)}")


def _words(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, range):
        return f"a whole number from {shape.start:,} to {shape.stop - 1:,}"
    return KINDS.get(type(shape) if isinstance(shape, (list, dict)) else shape, repr(shape))


def write_row(file: FileIO, row: Any) -> None:
    """Append a line to an unbuffered file, so that a killed process leaves at most one incomplete line."""
    # Text may hold half a surrogate pair, which UTF-8 cannot encode.
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")
    while line:
        may_crash()
        try:
            line = line[file.write(line) :]
        except OSError as error:
            error.filename = file.name  # for the message; a write does not know it
            raise
    may_crash()


def write_text(path: Path, text: str) -> None:
    """Write a text file, by way of a temporary one (disk.writing)."""
    with writing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, by way of a temporary one (disk.writing)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
