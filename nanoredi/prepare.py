"""Make the training rows of both stages, sft.jsonl and pairs.jsonl, from raw traces.

    python -m nanoredi.prepare --raw PATH ... --tokenizer DIR --out DIR
    python -m nanoredi.prepare ... --decontaminate benchmarks/*.json --drop
    python -m nanoredi.prepare ... --raw samples.jsonl --grade

PATH is a file (JSONL, JSON, CSV, Parquet or Arrow), or a folder of JSONL, Parquet or Arrow files, read in the order of
their names. The rows are those of OpenR1-Math-Raw, or your own (docs/data.md), which --grade labels with nanoredi's
grader. Numbering, shuffle, filters and lengths are the original's, to reproduce its counts and its order.

The raw rows may be larger than the memory. They are read once, in their own order; what is kept goes to a temporary
file, which is then copied in the shuffled order. For a moment the disk holds the kept rows twice.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nanoredi.common.disk import remove, remove_leftovers, writing_together
from nanoredi.common.errors import UserError, run_script
from nanoredi.common.files import check, read_rows
from nanoredi.common.flags import option, read_flags, resolve
from nanoredi.common.formats import num_rows
from nanoredi.common.progress import progress
from nanoredi.data import own_responses as own
from nanoredi.data.benchmarks import GOLDS
from nanoredi.data.decontaminate import Overlap
from nanoredi.data.filters import SFT_GATE, Gates, say_dropped
from nanoredi.data.messages import PARTS, PROMPTS, SIDES, THINKING_NAMES, UNSHOWN
from nanoredi.data.spool import Spool
from nanoredi.data.tokenizer import Tokenizer

PUBLISHED_COUNTS = (77_629, 53_175)  # the paper's SFT traces and pairs, of all of OpenR1-Math-Raw
# The only columns of a Parquet or Arrow file that are read.
_FIELDS = (
    *"problem_is_valid source generations correctness correct system system_prompt completion sample reward_model".split(),
    *("finish_reason", "finish_reasons", *GOLDS, *PROMPTS, *chain(*PARTS.values()), *UNSHOWN, *THINKING_NAMES),
)
_KINDS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
Rows = Iterable[tuple[str, dict[str, Any]]]  # (file and line, for error messages; row)
_FILES = ("sft.jsonl", "pairs.jsonl", "too_long.jsonl", "overlaps.jsonl")


@dataclass
class PrepareFlags:
    """The command's flags."""

    raw: list[str] = option([], "files of raw rows, or folders of such files")
    tokenizer: str = option("", "Hugging Face folder whose tokenizer and chat template measure lengths")
    out: str = option("", "folder for sft.jsonl and pairs.jsonl")
    max_prompt_tokens: int = option(800, "longest prompt of a pair", low=1)
    max_response_tokens: int = option(19_000, "longest response of a pair", low=1)
    seed: int = option(42, "seed of the shuffle, and of the choice of pairs to swap", low=0)
    grade: bool = option(False, "label the responses by comparing them with the rows' gold answers")
    decontaminate: list[str] = option([], "files of benchmarks, to find the problems that overlap with theirs")
    drop: bool = option(False, "leave out the rows that overlap with a benchmark")
    swap: float = option(0.0, "fraction of pairs in which chosen and rejected are swapped", low=0, high=1)
    strict_negatives: bool = option(False, "reject only responses that both verifiers call incorrect")


def prepare(
    files: list[Path], tokenizer: Tokenizer, out: Path, flags: PrepareFlags, overlap: Overlap
) -> dict[str, int]:
    """Write sft.jsonl, pairs.jsonl, too_long.jsonl (lengths of pairs beyond the limits) and maybe overlaps.jsonl.

    Args:
        files: files of raw rows.
        tokenizer: counts the tokens.
        out: the folder for the files written.
        flags: the gates' limits, and all else that changes what is written.
        overlap: the benchmarks to compare with; it collects the overlaps.

    Returns:
        {gate: rows that passed it and all before it}, including rows dropped for an overlap.

    Raises:
        UserError: naming file, line and field of a malformed row; if no row is left; if `out` has such files already.
    """
    remove_leftovers(out)
    for name in _FILES:
        if (out / name).exists():
            raise UserError(f"{out / name} is there already: move it away or give another --out")
    if not (total := sum(map(num_rows, files))):
        raise UserError(f"there are no rows in {', '.join(map(str, files))}")
    gates = Gates(flags.max_prompt_tokens, flags.max_response_tokens, flags.strict_negatives)
    with ExitStack() as stack:
        beside = stack.enter_context(writing_together(out))
        own_rows, *spools = (stack.enter_context(Spool(beside / f"{n}.spool")) for n in ("own", *_FILES[:3]))
        total, rows = _as_raw_rows(files, total, own_rows, tokenizer, flags.grade)
        _sift(progress(rows, "reading", total, "rows", delay=1), total, flags.seed, gates, tokenizer, overlap, spools)
        for name, spool in zip(_FILES, spools):
            lines = _swapped(spool, flags) if name == "pairs.jsonl" else spool.lines()
            with open(beside / name, "wb") as file:
                file.writelines(progress(lines, f"writing {name}", len(spool), "rows", delay=1))
        if overlap.files:
            overlap.write(beside / _FILES[3])
        for path in beside.glob("*.spool"):
            remove(path)
    return gates.counts


def find_files(paths: list[str]) -> list[Path]:
    """The files among the paths, and the files of the folders among them, sorted by name."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        kinds = {kind: found for kind in _KINDS if (found := [f for f in inside if f.name.lower().endswith(kind)])}
        if len(kinds) != 1:  # files of two kinds probably hold the same rows
            holds = "both " + " and ".join(kinds) if kinds else "none"
            raise UserError(f"the folder {path} must hold one kind of {', '.join(_KINDS)} files; it holds {holds}")
        files += next(iter(kinds.values()))
    return files


def _as_raw_rows(files: list[Path], total: int, spool: Spool, tokenizer: Tokenizer, grading: bool) -> tuple[int, Rows]:
    """The number of raw rows in the files, and the raw rows. The user's own rows are labelled and, if there is a row
    for each response, those of one problem joined."""
    rows = ((where, check(where, row, dict)) for file in files for where, row in read_rows(str(file), _FIELDS))
    rows = chain([first := next(rows)], rows)
    if "completion" in first[1]:
        total = own.gather(progress(rows, "gathering", total, "rows", delay=1), spool, tokenizer, grading)
        return total, own.gathered(spool)
    if grading or "correct" in first[1]:
        if "generations" not in first[1]:
            raise UserError(f"{first[0]} has no responses: 'generations', a list of texts, or 'completion', a text")
        return total, ((where, own.labelled(where, row, tokenizer, grading)) for where, row in rows)
    return total, rows


def _sift(
    rows: Rows, total: int, seed: int, gates: Gates, tokenizer: Tokenizer, overlap: Overlap, spools: list[Spool]
) -> None:
    """Pass rows through the gates to the spools of SFT rows, of pairs, and of pairs that are too long."""
    sft, pairs, too_long = spools
    # Shuffled row k is raw row permutation[k], so the inverse gives a raw row's new place. Each gate looks at a single
    # row, so dropping rows before the shuffle leaves the same rows in the same order as dropping them after it.
    place = np.argsort(np.random.default_rng(seed).permutation(total))
    learned = (gates.sift(where, row, index) for index, (where, row) in enumerate(rows))
    parts = ((traces.where, traces.prompt, traces.answers, traces) for traces in learned if traces)
    for traces, lengths in tokenizer.lengths_of_rows(parts):
        fits = gates.fits(lengths)
        if overlap.check(traces, fits) and overlap.drop:
            continue
        at = int(place[traces.index])
        sft.add(at, traces.sft_row(lengths))
        if fits:
            pairs.add(at, traces.pair(lengths))
        elif traces.rejected is not None:
            facts = traces.pair(lengths).items()
            too_long.add(at, {name: fact for name, fact in facts if name not in ("prompt", *SIDES)})
    print("".join(f"{count:,} {what}.\n" for what, count in gates.remarks.items() if count), end="", file=sys.stderr)
    say_dropped("rows", "text holds half a surrogate pair, which is not a character", gates.unreadable, total)
    if not len(sft):
        raise UserError(f"no row is left: {_summary(gates.counts)}")


def _swapped(spool: Spool, flags: PrepareFlags) -> Iterator[bytes]:
    """The spool's pairs, chosen and rejected swapped in a fraction of them (the paper's ablation of the verifier)."""
    order = np.random.default_rng((flags.seed, 1)).permutation(len(spool))
    swapped = set(order[: round(flags.swap * len(spool))].tolist())
    for number, line in enumerate(spool.lines()):
        if number in swapped:
            row = json.loads(line)
            for end in ("", "_index", "_tokens"):
                chosen, rejected = f"chosen{end}", f"rejected{end}"
                row[chosen], row[rejected] = row[rejected], row[chosen]
            line = json.dumps(row | {"swapped": True}).encode() + b"\n"
        yield line


def _summary(counts: dict[str, int]) -> str:
    """The counts of stage 1's gates, or the overlaps: where all rows were lost."""
    if counts[SFT_GATE]:
        return f"all {counts[SFT_GATE]:,} overlap with a benchmark"
    return ", ".join(f"{count:,} {gate}" for gate, count in counts.items() if not gate.startswith("pairs: "))


def table(counts: dict[str, int]) -> str:
    """The rows left after each gate, as a table to print, with a note if they should be the paper's and are not."""
    width = max(map(len, counts))
    lines = [f"{gate:{width}}  {rows:>9,}" for gate, rows in counts.items()]
    rows_read, *_, pairs = counts.values()
    if rows_read > 100_000 and (counts[SFT_GATE], pairs) != PUBLISHED_COUNTS:
        published = "{:,} SFT traces and {:,} pairs of OpenR1-Math-Raw".format(*PUBLISHED_COUNTS)
        lines.append(f"These are not the paper's counts: it has {published}.")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    _, given = read_flags(__doc__, argv, "prepare", PrepareFlags)
    flags = resolve(PrepareFlags, "prepare", given)
    if missing := [f"--{name}" for name in ("raw", "tokenizer", "out") if not getattr(flags, name)]:
        raise UserError(f"{' and '.join(missing)} must be given; --help lists the flags")
    if flags.drop and not flags.decontaminate:
        raise UserError("--drop needs --decontaminate FILE ..., the benchmarks whose overlaps it drops")
    out, overlap = Path(flags.out), Overlap(flags.decontaminate, flags.drop)
    counts = prepare(find_files(flags.raw), Tokenizer(flags.tokenizer), out, flags, overlap)
    print(table(counts))
    if overlap.files:
        print(f"\n{overlap.table()}")
    print(f"Wrote {' and '.join(str(out / name) for name in _FILES[:2])}.")


if __name__ == "__main__":
    run_script(main)
