"""A line on stderr that says how far something is; on a terminal it is gone when that has ended."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from nanoredi.common.errors import visible

# Seconds before the line and between two states of it: on a terminal it is replaced, in a log file each one stays.
_ON_A_TERMINAL, _IN_A_FILE = 0.1, 60.0


def progress(rows: Iterable[Any] | None, what: str, total: int | None, unit: str, **options: Any) -> tqdm:
    """Count rows as they are gone through, or, where rows is None, by update(). options: tqdm's."""
    interval = _ON_A_TERMINAL if sys.stderr.isatty() else _IN_A_FILE
    unit = f" {unit}"
    options |= {"mininterval": interval, "maxinterval": max(10.0, interval)}
    options["delay"] = max(interval, options.get("delay", 0))
    return tqdm(rows, visible(what), total, unit=unit, file=sys.stderr, leave=False, **options)
