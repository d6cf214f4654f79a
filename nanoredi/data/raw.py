"""Raw rows out of the files that --raw names, one at a time: what does not fit in memory passes through it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_rows
from nanoredi.data.messages import THINKING_NAMES

# A table's other columns are not read.
_FIELDS = (
    *("problem_is_valid", "source", "problem", "generations", "correctness"),
    *("prompt", "messages", "completion", "finish_reason", "sample", "answer", "correct", *THINKING_NAMES),
)
_KINDS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")


def find_files(paths: list[str]) -> list[Path]:
    """The raw files behind the paths given: files as they are, of a folder its files in the order of their names."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        kinds = {kind: sorted(path.glob(f"*{kind}")) for kind in _KINDS}
        found = [some for some in kinds.values() if some]
        # Two kinds side by side are likely the same rows twice.
        if len(found) != 1:
            holds = "both " + " and ".join(kind for kind, some in kinds.items() if some) if found else "none"
            raise UserError(f"the folder {path} must hold one kind of {', '.join(_KINDS)} files; it holds {holds}")
        files += found[0]
    return files


def raw_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a raw file, each with where it stands, for messages about it.

    Raises:
        UserError: when the file cannot be read, and for a row that is no object.
    """
    for where, row in read_rows(str(file), _FIELDS):
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object")
        yield where, row
