"""Rows on disk in the order they come, to be read in another: memory holds two numbers or so for each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Spool:
    """Takes rows with their places, in any order; then gives them back by place.

    Args:
        path: of a new file, which whoever made its folder removes.
    """

    def __init__(self, path: Path):
        self.file = open(path, "w+b")
        self.rows: list[tuple[Any, int]] = []  # (place, offset in the file)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, place: Any, row: dict[str, Any]) -> None:
        """Take a row; places are whatever sorts, and of equal ones the first comes first."""
        self.rows.append((place, self.file.tell()))
        self.file.write(json.dumps(row).encode() + b"\n")

    def lines(self) -> Iterator[bytes]:
        """The rows as lines of JSON, by place."""
        for _, offset in sorted(self.rows):
            self.file.seek(offset)
            yield self.file.readline()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
