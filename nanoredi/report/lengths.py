"""How long prompts and responses are, and what the limits cut.

    python -m nanoredi.report --lengths DATA [--out FIGURE.png]

DATA is a folder that prepare wrote, or a JSONL file of rows. Lengths are those in the rows, which prepare puts there;
beside pairs.jsonl those in too_long.jsonl count too, so that what the limits have cut is still seen. With --tokenizer
the rows are measured, as prepare does it. The figure takes matplotlib.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_rows
from nanoredi.common.flags import option, read_flags, resolve
from nanoredi.data.messages import conversation, pair
from nanoredi.data.tokenizer import Tokenizer

Lengths = dict[str, np.ndarray]  # {part: tokens (rows,)}, the parts being those of a pair or of an SFT row
_PAIR, _SFT = ("prompt", "chosen", "rejected"), ("prompt", "response")
_QUANTILES = (0, 10, 25, 50, 75, 90, 99, 100)  # percent
_BINS, _BAR = 12, 50  # lines of a histogram, and its longest bar's characters


@dataclass
class LengthsFlags:
    """The command's flags."""

    lengths: str = option("", "rows: a folder that prepare wrote, or a JSONL file")
    tokenizer: str = option("", "Hugging Face folder to measure the rows with; empty: they hold their lengths")
    max_prompt_tokens: int = option(800, "longest prompt of a pair", low=1)
    max_response_tokens: int = option(19_000, "longest response of a pair", low=1)
    out: str = option("", "PNG file for the figure; it must not exist")


def main(argv: list[str]) -> None:
    _, given = read_flags(__doc__, argv, "lengths", LengthsFlags, takes_recipe=False)
    flags = resolve(LengthsFlags, "lengths", given)
    if flags.out and Path(flags.out).exists():
        raise UserError(f"{flags.out} exists; give another --out")
    path = Path(flags.lengths)
    files = [path / name for name in ("sft.jsonl", "pairs.jsonl")] if path.is_dir() else [path]
    tokenizer = Tokenizer(flags.tokenizer) if flags.tokenizer else None
    limits = {"prompt": flags.max_prompt_tokens, **dict.fromkeys(("chosen", "rejected"), flags.max_response_tokens)}
    lengths = {str(file): read_lengths(file, tokenizer) for file in files}
    print("\n\n".join(show(name, parts, limits) for name, parts in lengths.items()))
    if flags.out:
        draw(lengths, limits, Path(flags.out))
        print(f"\nWrote {flags.out}.")


def read_lengths(file: Path, tokenizer: Tokenizer | None = None) -> Lengths:
    """The lengths of a file's rows, by the tokenizer or, without one, those in the rows.

    Raises:
        UserError: naming file and line of a row that is malformed or holds no lengths.
    """
    if tokenizer:
        rows = tokenizer.encode_rows(_texts(file, tokenizer))
        found = [(names, tokenizer.lengths(encodings, exact)) for (names, exact), encodings in rows]
    else:
        too_long = file.with_name("too_long.jsonl")
        files = [file, too_long] if file.name == "pairs.jsonl" and too_long.exists() else [file]
        found = [_known(where, row) for where, row in chain.from_iterable(map(read_rows, map(str, files)))]
    if not found:
        raise UserError(f"{file} holds no rows")
    names = found[0][0]
    if any(others != names for others, _ in found):
        raise UserError(f"{file} holds both pairs and rows with messages; it must hold one kind")
    return dict(zip(names, np.array([lengths for _, lengths in found]).T))


def _known(where: str, row: Any) -> tuple[tuple[str, ...], list[int]]:
    """The parts of a row, and the lengths that it holds."""
    for names in (_PAIR, _SFT):
        lengths = [row.get(f"{name}_tokens") if isinstance(row, dict) else None for name in names]
        if all(type(length) is int and 0 < length < 2**31 for length in lengths):
            return names, lengths
    raise UserError(f"{where} holds no lengths; --tokenizer DIR measures them")


def _texts(file: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, list[str], tuple[tuple[str, ...], bool]]]:
    """Each row's place, its parts as text, and their names and whether the text is training's."""
    for where, row in read_rows(str(file)):
        if isinstance(row, dict) and "chosen" in row:
            names, (prompt, answers) = _PAIR, pair(where, row)
        else:
            *prompt, answer = conversation(where, row)
            names, answers = _SFT, [answer]
        try:
            texts, as_trained = tokenizer.measured(prompt, answers)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        yield where, texts, (names, as_trained)


def show(name: str, parts: Lengths, limits: dict[str, int]) -> str:
    """Quantiles, what the limits cut, and a histogram of each part, as text."""
    pairs = "chosen" in parts
    total = len(parts["prompt"])
    lines = [f"{name}: tokens of {total:,} {'pairs' if pairs else 'rows'}", ""]
    heads = ["min", *(f"{q} %" for q in _QUANTILES[1:-1]), "max", "mean", *(["limit", "longer"] if pairs else [])]
    lines.append(f"{'':9}" + "".join(f"{head:>9}" for head in heads))
    for part, lengths in parts.items():
        cells = [f"{x:,.0f}" for x in (*np.percentile(lengths, _QUANTILES), lengths.mean())]
        if pairs:
            cells += [f"{limits[part]:,}", f"{(lengths > limits[part]).sum():,}"]
        lines.append(f"{part:9}" + "".join(f"{cell:>9}" for cell in cells))
    if pairs:
        cut = np.any([lengths > limits[part] for part, lengths in parts.items()], axis=0).sum()
        lines += ["", f"The limits cut {cut:,} of {total:,} pairs ({cut / total:.1%})."]
    for part, lengths in parts.items():
        lines += ["", part, *histogram(lengths, limits[part] if pairs else math.inf)]
    return "\n".join(lines)


def histogram(lengths: np.ndarray, limit: float) -> list[str]:
    """A line a bin; what is longer than the limit is drawn lighter. The last bin takes the longest hundredth too."""
    step = _round_up(np.percentile(lengths, 99) / _BINS)
    bins = np.minimum((lengths - 1) // step, _BINS - 1)  # a bin ends with its upper edge, as a limit does
    counts = np.bincount(bins, minlength=_BINS)
    longer = np.bincount(bins[lengths > limit], minlength=_BINS)
    used = int(bins.max()) + 1
    lines = []
    for i in range(used):
        rest = i == _BINS - 1 and lengths.max() > _BINS * step
        kept, cut = (round(_BAR * n / counts.max()) for n in (counts[i] - longer[i], longer[i]))
        to = "more" if rest else f"{(i + 1) * step:,}"
        lines.append(f"{i * step + 1:>9,} to {to:<9}{'█' * kept}{'░' * cut} {counts[i]:,}")
    return lines


def _round_up(x: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    size = 10 ** math.floor(math.log10(max(x, 1)))
    return next(int(size * m) for m in (1, 2, 5, 10) if size * m >= x)


def draw(lengths: dict[str, Lengths], limits: dict[str, int], path: Path) -> None:
    """The histograms as a figure: a row a file, a panel a part."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure takes matplotlib to draw: pip install matplotlib") from None
    columns = max(map(len, lengths.values()))
    figure = Figure(figsize=(4 * columns, 3 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), columns, squeeze=False)
    for row, (name, parts) in zip(panels, lengths.items()):
        for panel in row[len(parts) :]:
            panel.remove()
        for panel, (part, tokens) in zip(row, parts.items()):
            panel.hist(tokens, bins=60, color="tab:blue")
            panel.set(xlabel=f"{part}, tokens", ylabel="rows", title=Path(name).name)
            if "chosen" in parts:
                cut = (tokens > limits[part]).mean()
                panel.axvline(limits[part], color="tab:red", label=f"limit {limits[part]:,}: {cut:.1%} longer")
                panel.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a name that ends in no known format
        raise UserError(f"cannot write {path}: {error}") from None
