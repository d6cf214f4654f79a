"""Raw traces to the training rows of both stages: sft.jsonl and pairs.jsonl.

    python -m nanoredi.prepare --raw PATH ... --tokenizer DIR --out DIR
    python -m nanoredi.prepare --raw PATH ... --tokenizer DIR --out DIR --decontaminate benchmarks/*.json [--drop]
    python -m nanoredi.prepare --raw samples.jsonl --tokenizer DIR --out DIR --grade

PATH is a JSONL or a Parquet file, or a folder of one kind (its files are taken in the order of their names; Parquet
asks for pyarrow). Its rows are those of OpenR1-Math-Raw, or one's own (own.py), which --grade labels with nanoredi's
grader. Numbering, shuffle, gates and lengths are the original's, so that its counts and its order come out.

The raw rows are more than fit in memory, and the shuffle wants them in another order. So they are read once in theirs
(after a quick count of the lines), what is kept goes to a spool on disk, and the spool is copied in the shuffled
order: memory holds the rows at hand and a few numbers for each, the disk holds the kept rows twice for a moment.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nanoredi.common.errors import UserError, run_script
from nanoredi.common.flags import option, read_flags, resolve
from nanoredi.common.formats import num_rows
from nanoredi.common.progress import progress
from nanoredi.data import own_responses as own
from nanoredi.data.decontaminate import Overlap
from nanoredi.data.filters import SFT_GATE, Gates, Traces
from nanoredi.data.raw import find_files, raw_rows
from nanoredi.data.spool import Spool
from nanoredi.data.tokenizer import Tokenizer

PUBLISHED_COUNTS = (77_629, 53_175)  # the paper's SFT traces and pairs, of all of OpenR1-Math-Raw
_FILES = ("sft.jsonl", "pairs.jsonl", "too_long.jsonl", "overlaps.jsonl")


def prepare(
    files: list[Path],
    tokenizer: Tokenizer,
    out: Path,
    max_prompt_tokens: int = 800,
    max_response_tokens: int = 19_000,
    seed: int = 42,
    grading: bool = False,
    overlap: Overlap | None = None,
) -> dict[str, int]:
    """Write out/sft.jsonl and out/pairs.jsonl from raw files; beside them too_long.jsonl, the lengths of the pairs
    beyond the limits, and with benchmarks to compare with overlaps.jsonl.

    Args:
        files: of raw rows.
        tokenizer: whose tokens are counted.
        out: folder for what is written.
        max_prompt_tokens, max_response_tokens: a pair's limits.
        seed: of the shuffle.
        grading: label the responses with the grader.
        overlap: the benchmarks to compare with; it keeps what was found.

    Returns:
        {gate: rows that passed it and all before it}, rows dropped for an overlap included.

    Raises:
        UserError: naming file, line and field of a malformed row; when no row is left; when out holds such files
        already.
    """
    for name in _FILES:
        if (out / name).exists():
            raise UserError(f"{out / name} is there already: move it away or give another --out")
    total = sum(map(num_rows, files))
    if not total:
        raise UserError(f"there are no rows in {', '.join(map(str, files))}")
    gates = Gates(max_prompt_tokens, max_response_tokens)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: an output that is there is whole.
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as beside, ExitStack() as stack:
            own_rows, sft, pairs, too_long = (
                stack.enter_context(Spool(Path(beside, f"{name}.spool"))) for name in ("own", *_FILES[:3])
            )
            total, rows = _raw_rows(files, total, own_rows, tokenizer, grading)
            # Shuffled row k is raw row permutation[k], so a raw row's place is the inverse. Each gate looks at one row:
            # dropping rows before they move leaves the same rows in the same order as dropping them after.
            place = np.argsort(np.random.default_rng(seed).permutation(total))
            candidates = _candidates(progress(rows, "reading", total, "rows", delay=1), gates, tokenizer)
            for traces, encodings in tokenizer.encode_rows(candidates):
                lengths = [len(encoding) + 1 for encoding in encodings]  # plus 1 as in the original
                fits = gates.fits(lengths)
                if overlap and overlap.check(traces, fits) and overlap.drop:
                    continue
                at = int(place[traces.index])
                sft.add(at, traces.sft_row(lengths))
                if fits:
                    pairs.add(at, traces.pair(lengths))
                elif traces.rejected is not None:
                    too_long.add(at, traces.pair_facts(lengths))
            if not len(sft):
                raise UserError(f"no row is left: {_summary(gates.counts)}")
            for name, spool in zip(_FILES, (sft, pairs, too_long)):
                with open(Path(beside, name), "wb") as file:
                    file.writelines(progress(spool.lines(), f"writing {name}", len(spool), "rows", delay=1))
            if overlap:
                overlap.write(Path(beside, _FILES[3]))
            for path in Path(beside).glob("*.jsonl"):
                path.rename(out / path.name)
    except OSError as error:  # of writing: reading has its own words
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    return gates.counts


def _raw_rows(
    files: list[Path], total: int, spool: Spool, tokenizer: Tokenizer, grading: bool
) -> tuple[int, Iterable[tuple[str, dict[str, Any]]]]:
    """How many raw rows come of the files' rows, and the raw rows, each with where it stands; one's own are labelled,
    and those of one problem made one."""
    rows = chain.from_iterable(map(raw_rows, files))
    first = next(rows)
    rows = chain([first], rows)
    if "completion" in first[1]:
        total = own.gather(progress(rows, "gathering", total, "rows", delay=1), spool, tokenizer, grading)
        return total, own.gathered(spool)
    if grading or "correct" in first[1]:
        return total, ((where, own.labelled(where, row, grading)) for where, row in rows)
    return total, rows


def _candidates(
    rows: Iterable[tuple[str, dict[str, Any]]], gates: Gates, tokenizer: Tokenizer
) -> Iterator[tuple[str, list[str], Traces]]:
    """The rows that stage 1 learns from, with the texts to be measured."""
    for index, (where, row) in enumerate(rows):
        traces = gates.sift(where, row, index)
        if traces is not None:
            yield where, traces.texts(tokenizer), traces


def _summary(counts: dict[str, int]) -> str:
    """Where the rows were lost that none is left for stage 1."""
    if counts[SFT_GATE]:
        return f"all {counts[SFT_GATE]:,} overlap with a benchmark"
    gates = list(counts)
    return ", ".join(f"{counts[gate]:,} {gate}" for gate in gates[: gates.index(SFT_GATE) + 1])


def table(counts: dict[str, int]) -> str:
    """The rows left after each gate, to be read, and whether they are the paper's."""
    width = max(map(len, counts))
    lines = [f"{gate:{width}}  {rows:>9,}" for gate, rows in counts.items()]
    rows_read, *_, pairs = counts.values()
    if rows_read > 100_000 and (counts[SFT_GATE], pairs) != PUBLISHED_COUNTS:
        lines.append(
            "These are not the paper's counts: it has {:,} SFT traces and {:,} pairs of all of OpenR1-Math-Raw.".format(
                *PUBLISHED_COUNTS
            )
        )
    return "\n".join(lines)


@dataclass
class PrepareFlags:
    """The command's flags."""

    raw: list[str] = option([], "raw rows: JSONL or Parquet files, or folders of them")
    tokenizer: str = option("", "Hugging Face folder whose tokenizer and chat template measure lengths")
    out: str = option("", "folder for sft.jsonl and pairs.jsonl")
    max_prompt_tokens: int = option(800, "longest prompt of a pair", low=1)
    max_response_tokens: int = option(19_000, "longest response of a pair", low=1)
    seed: int = option(42, "of the shuffle", low=0)
    grade: bool = option(False, "label the responses with the grader, by the rows' gold answers")
    decontaminate: list[str] = option([], "benchmarks to look for in the rows kept: JSON or JSONL files with `problem`")
    drop: bool = option(False, "leave out the rows that overlap with a benchmark")


def main(argv: list[str]) -> None:
    _, given = read_flags(__doc__, argv, "prepare", PrepareFlags, takes_recipe=False)
    flags = resolve(PrepareFlags, "prepare", given)
    missing = [f"--{name}" for name in ("raw", "tokenizer", "out") if not getattr(flags, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; --help lists the flags")
    if flags.drop and not flags.decontaminate:
        raise UserError("--drop needs --decontaminate FILE ..., the benchmarks whose overlaps it drops")
    overlap = Overlap(flags.decontaminate, flags.drop) if flags.decontaminate else None
    out = Path(flags.out)
    counts = prepare(
        find_files(flags.raw),
        Tokenizer(flags.tokenizer),
        out,
        flags.max_prompt_tokens,
        flags.max_response_tokens,
        flags.seed,
        flags.grade,
        overlap,
    )
    print(table(counts))
    if overlap:
        print(f"\n{overlap.table()}")
    print(f"Wrote {' and '.join(str(out / name) for name in _FILES[:2])}.")


if __name__ == "__main__":
    run_script(main)
