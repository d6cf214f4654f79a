"""How long prompts and responses are, and how much the limits cut.

The lengths are those that prepare wrote into the rows; for pairs.jsonl the rows of too_long.jsonl are added, so that
pairs beyond the limits are visible, too. With --tokenizer the rows are tokenised to get their lengths, as in prepare.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_rows
from nanoredi.data.messages import SIDES, Messages, conversation, pair
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.report.tables import Table, as_text

Lengths = dict[str, np.ndarray]  # {part of a pair or of an SFT row: tokens (rows,)}
_PAIR, _SFT = ("prompt", *SIDES), ("prompt", "response")
_QUANTILES = (0, 10, 25, 50, 75, 90, 99, 100)  # percent
_BINS, _BAR = 12, 50  # lines of a histogram, and the characters of its longest bar


def show(data: str, tokenizer: str, max_prompt_tokens: int, max_response_tokens: int) -> str:
    """The lengths of the rows of DATA, as text. Raises UserErrors as read_lengths does.

    Args:
        data: a folder that prepare wrote, or a JSONL file.
        tokenizer: Hugging Face folder to tokenise the rows with; empty: take the lengths in the rows.
        max_prompt_tokens, max_response_tokens: a pair's limits.
    """
    path = Path(data)
    files = [path / name for name in ("sft.jsonl", "pairs.jsonl")] if path.is_dir() else [path]
    measure = Tokenizer(tokenizer) if tokenizer else None
    limits = {"prompt": max_prompt_tokens, **dict.fromkeys(SIDES, max_response_tokens)}
    return "\n\n".join(table(str(file), read_lengths(file, measure), limits) for file in files)


def read_lengths(file: Path, tokenizer: Tokenizer | None = None) -> Lengths:
    """The lengths of a file's rows, by the tokenizer or, without one, as written in the rows.

    Raises:
        UserError: with file and line, if a row is malformed or has no lengths.
    """
    if tokenizer:
        found = list(tokenizer.lengths_of_rows(_parts(file)))
    else:
        too_long = file.with_name("too_long.jsonl")
        files = [file, too_long] if file.name == "pairs.jsonl" and too_long.exists() else [file]
        found = [_known(where, row) for path in files for where, row in read_rows(str(path))]
    if not found:
        raise UserError(f"{file} holds no rows")
    if len({names for names, _ in found}) > 1:
        raise UserError(f"{file} holds both pairs and rows with messages; it must hold one kind")
    return dict(zip(found[0][0], np.array([lengths for _, lengths in found]).T))


def _known(where: str, row: Any) -> tuple[tuple[str, ...], list[int]]:
    """The names of a row's parts, and the lengths written in the row."""
    for names in (_PAIR, _SFT):
        lengths = [row.get(f"{name}_tokens") if isinstance(row, dict) else None for name in names]
        if all(type(length) is int and 0 < length < 2**31 for length in lengths):
            return names, lengths
    raise UserError(f"{where} holds no lengths; --tokenizer DIR measures them")


def _parts(file: Path) -> Iterator[tuple[str, Messages, Messages, tuple[str, ...]]]:
    """Each row's "file, line n", its prompt and answers, and their names."""
    for where, row in read_rows(str(file)):
        if isinstance(row, dict) and "chosen" in row:
            yield where, *pair(where, row), _PAIR
        else:
            *prompt, answer = conversation(where, row)
            yield where, prompt, [answer], _SFT


def table(name: str, parts: Lengths, limits: dict[str, int]) -> str:
    """Quantiles, how many rows the limits cut, and a histogram of each part, as text."""
    pairs, total = "chosen" in parts, len(parts["prompt"])
    heads = ["", "min", *(f"{q} %" for q in _QUANTILES[1:-1]), "max", "mean", *(["limit", "longer"] if pairs else [])]
    cells = [heads]
    for part, lengths in parts.items():
        cells.append([part, *(f"{x:,.0f}" for x in (*np.percentile(lengths, _QUANTILES), lengths.mean()))])
        cells[-1] += [f"{limits[part]:,}", f"{(lengths > limits[part]).sum():,}"] if pairs else []
    text = [f"{name}: tokens of {total:,} {'pairs' if pairs else 'rows'}", "", as_text(Table(cells))]
    if pairs:
        cut = np.any([lengths > limits[part] for part, lengths in parts.items()], axis=0).sum()
        text += ["", f"The limits cut {cut:,} of {total:,} pairs ({cut / total:.1%})."]
    for part, lengths in parts.items():
        text += ["", part, *histogram(lengths, limits[part] if pairs else math.inf)]
    return "\n".join(text)


def histogram(lengths: np.ndarray, limit: float) -> list[str]:
    """One line a bin, lighter for lengths over the limit. The last bin also takes the longest one percent."""
    smallest = max(np.percentile(lengths, 99) / _BINS, 1)
    size = 10 ** math.floor(math.log10(smallest))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= smallest)  # 1, 2, 5, 10, 20, 50, ...
    bins = np.minimum((lengths - 1) // step, _BINS - 1)  # the upper edge belongs to the bin, like a limit
    counts = np.bincount(bins, minlength=_BINS)
    longer = np.bincount(bins[lengths > limit], minlength=_BINS)
    lines = []
    for i in range(int(bins.max()) + 1):
        kept, cut = (round(_BAR * n / counts.max()) for n in (counts[i] - longer[i], longer[i]))
        to = "more" if i == _BINS - 1 and lengths.max() > _BINS * step else f"{(i + 1) * step:,}"
        lines.append(f"{i * step + 1:>9,} to {to:<9}{'█' * kept}{'░' * cut} {counts[i]:,}")
    return lines
