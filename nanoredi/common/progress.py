"""A progress line on stderr; on a terminal it disappears at the end."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from nanoredi.common.errors import visible

# Seconds before the line first appears and between updates: a terminal overwrites it, a log file keeps every update.
_ON_A_TERMINAL, _IN_A_FILE = 0.1, 60.0


def progress(rows: Iterable[Any] | None, what: str, total: int | None, unit: str, delay: float = 0, **options) -> tqdm:
    """A tqdm bar over rows or, if rows is None, one that is advanced by update(). options: tqdm's own."""
    interval = _ON_A_TERMINAL if sys.stderr.isatty() else _IN_A_FILE
    options |= {"mininterval": interval, "maxinterval": max(10.0, interval), "delay": max(interval, delay)}
    return tqdm(rows, visible(what), total, unit=f" {unit}", file=sys.stderr, leave=False, **options)
