"""Raw rows out of JSONL and Parquet files, one at a time: what does not fit in memory passes through it.

Parquet asks for pyarrow. A file's rows are numbered from 1 in messages about them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_rows

# A Parquet file's other columns are not read.
_FIELDS = (
    *("problem_is_valid", "source", "problem", "generations", "correctness"),
    *("prompt", "messages", "completion", "finish_reason", "sample", "answer", "correct"),
)
_ROWS_AT_ONCE = 64


def find_files(paths: list[str]) -> list[Path]:
    """The raw files behind the paths given: files as they are, of a folder its files in the order of their names."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
            # Both kinds side by side are likely the same rows twice.
            if len({file.suffix for file in found}) != 1:
                holds = "both" if found else "none"
                raise UserError(f"the folder {path} must hold either .jsonl or .parquet files; it holds {holds}")
        files += found
    return files


def num_rows(file: Path) -> int:
    """How many rows a raw file has; the rows themselves are not looked at."""
    if file.suffix == ".parquet":
        with _parquet(file) as parquet:
            return parquet.metadata.num_rows
    try:
        with open(file, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def raw_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a raw file, each with where it stands, for messages about it.

    Raises:
        UserError: when the file cannot be read, and for a row that is no object.
    """
    if file.suffix != ".parquet":
        for where, row in read_rows(str(file)):
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object")
            yield where, row
        return
    with _parquet(file) as parquet:
        columns = [name for name in _FIELDS if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns)
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
            yield f"{file}, row {number}", row


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """An open pyarrow ParquetFile, whose faults speak to the user."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} is a Parquet file, which takes pyarrow to read: pip install pyarrow") from None
    try:
        # By default whole row groups come into memory, and stay; a row group may be the whole file.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from None
