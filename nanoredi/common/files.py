"""JSON and JSONL files in, with a sentence for whatever is wrong with them; whole lines of JSONL out."""

import json
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file that holds an object, or, with kind list, a list.

    Raises:
        UserError: when it is missing, broken, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}")
    return value


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL file, each with where it stands ("file, line n") for messages about it. Empty lines are
    skipped.

    Raises:
        UserError: when the file cannot be read or a line is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_json(where, line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def parse_json(where: str, text: str) -> Any:
    """
    Raises:
        UserError: naming `where`, when the text is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def write_row(file: FileIO, row: Any) -> None:
    """Add a line to a file without a buffer, so that whoever is killed meanwhile leaves whole lines."""
    # Anybody's text may hold half a surrogate pair, which UTF-8 cannot.
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")
    while line:
        line = line[file.write(line) :]
