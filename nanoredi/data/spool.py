"""A temporary file of rows, written in one order and read in another: memory holds about two numbers per row."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


class Spool(AbstractContextManager):
    """Takes rows with sort keys in any order, and returns them sorted. `path` is a new file; the caller removes it."""

    def __init__(self, path: Path):
        self.file = open(path, "w+b")
        self.rows: list[tuple[Any, int]] = []  # (sort key, offset in the file)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, key: Any, row: dict[str, Any]) -> None:
        """Take a row. Rows with equal keys stay in the order in which they were added."""
        self.rows.append((key, self.file.tell()))
        self.file.write(json.dumps(row).encode() + b"\n")

    def lines(self) -> Iterator[bytes]:
        """The rows as lines of JSON, sorted by their keys."""
        for _, offset in sorted(self.rows):
            self.file.seek(offset)
            yield self.file.readline()

    def __exit__(self, *_) -> None:
        self.file.close()
