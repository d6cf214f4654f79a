"""OpenR1-Math-Raw to the training rows of both stages: sft.jsonl and pairs.jsonl.

    python -m nanoredi.prepare --raw PATH ... --tokenizer DIR --out DIR

PATH is a JSONL or a Parquet file, or a folder of one kind (its files are taken in the order of their names; Parquet
asks for pyarrow). A row holds a problem, several generations for it and two verdicts on each; a generation is correct
when both say so. Stage 1 learns the first correct generation of a problem, stage 2 the first correct against the first
incorrect. Numbering, shuffle, filters and lengths are the original's, so that its counts and its order come out.

The raw rows are more than fit in memory, and the shuffle wants them in another order. So they are read once in theirs
(after a quick count of the lines), what is kept goes to a spool on disk, and the spool is copied in the shuffled
order: memory holds the row at hand and a few numbers for each, the disk holds the kept rows twice for a moment.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanoredi.config import option, read_flags, resolve
from nanoredi.errors import UserError, run_script
from nanoredi.files import read_rows
from nanoredi.tokenizer import Tokenizer, user_message

SFT_GATE = "SFT: has a correct generation"
PUBLISHED_COUNTS = (77_629, 53_175)  # the paper's SFT traces and pairs, of all of OpenR1-Math-Raw
_FIELDS = ("problem_is_valid", "source", "problem", "generations", "correctness")
_LABELS = ("llama_verification", "math_verify_reparsed_answer")


def prepare(
    files: list[Path],
    tokenizer: Tokenizer,
    out: Path,
    max_prompt_tokens: int = 800,
    max_response_tokens: int = 19_000,
    seed: int = 42,
) -> dict[str, int]:
    """Write out/sft.jsonl and out/pairs.jsonl from raw files.

    Returns:
        {gate: rows that passed it and all before it}. A pair's correct generation is its SFT row's, so the pairs'
        gates follow on.

    Raises:
        UserError: naming file, line and field of a malformed row; when no row is left; when out holds such files
        already.
    """
    names = ("sft.jsonl", "pairs.jsonl")
    for name in names:
        if (out / name).exists():
            raise UserError(f"{out / name} is there already: move it away or give another --out")
    total = sum(map(_num_rows, files))
    if not total:
        raise UserError(f"there are no rows in {', '.join(map(str, files))}")
    # Shuffled row k is raw row permutation[k], so a raw row's place is the inverse. Each filter looks at one row:
    # dropping rows before they move leaves the same rows in the same order as dropping them after.
    place = np.argsort(np.random.default_rng(seed).permutation(total))
    gates = (
        "rows read",
        "problem_is_valid is yes",
        "source is not cn_k12",
        "has a problem",
        "has generations",
        "has both labels of each generation",
        SFT_GATE,
        "pairs: has a correct and an incorrect one",
        f"pairs: prompt within {max_prompt_tokens:,} tokens",
        f"pairs: both responses within {max_response_tokens:,} tokens",
    )
    counts = dict.fromkeys(gates, 0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: an output that is there is whole.
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as beside:
            spools = [_Spool(Path(beside, f"{name}.spool")) for name in names]
            with tqdm(
                chain.from_iterable(map(_rows, files)), "reading", total, unit=" rows", file=sys.stderr, leave=False
            ) as rows:
                for index, (where, row) in enumerate(rows):
                    passed, *kept = _sift(where, row, index, tokenizer, max_prompt_tokens, max_response_tokens)
                    for gate, _ in zip(gates, takewhile(bool, passed)):
                        counts[gate] += 1
                    for spool, kept_row in zip(spools, kept):
                        if kept_row is not None:
                            spool.add(int(place[index]), kept_row)
            if not counts[SFT_GATE]:
                raise UserError(
                    "no row is left: "
                    + ", ".join(f"{counts[gate]:,} {gate}" for gate in gates[: gates.index(SFT_GATE) + 1])
                )
            for spool, name in zip(spools, names):
                spool.copy(Path(beside, name))
            for name in names:
                Path(beside, name).rename(out / name)
    except OSError as error:  # of writing: reading has its own words
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    return counts


def _sift(
    where: str, row: Any, index: int, tokenizer: Tokenizer, max_prompt_tokens: int, max_response_tokens: int
) -> tuple[list[bool], dict | None, dict | None]:
    """Whether a raw row passes the gates, one after the other (those behind a failed one may be missing), its SFT row,
    its pair."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object")
    for name in ("problem_is_valid", "source"):
        if name not in row:  # null there says something about the problem; no such field means rows of another layout
            raise UserError(f"{where} has no field {name!r}")
    valid, source, problem = (_take(where, row, name, str) for name in ("problem_is_valid", "source", "problem"))
    generations = _take(where, row, "generations", list, str) or []
    correctness = _take(where, row, "correctness", dict) or {}
    labels = [_take(f"{where}: 'correctness'", correctness, name, list, bool) for name in _LABELS]

    labelled = all(verdicts is not None and len(verdicts) == len(generations) for verdicts in labels)
    passed = [
        True,
        (valid or "").strip().lower() == "yes",
        source != "cn_k12",
        bool(problem),
        bool(generations),
        labelled,
    ]
    if not all(passed):
        return passed, None, None
    correct = [all(verdicts) for verdicts in zip(*labels)]  # a null verdict is not true
    # differs from the original: an empty generation, which the trainer would refuse, is neither correct nor incorrect
    chosen, rejected = (
        next((i for i, text in enumerate(generations) if text and correct[i] is wanted), None)
        for wanted in (True, False)
    )
    passed += [chosen is not None, rejected is not None]
    if chosen is None:
        return passed, None, None
    prompt, answer = user_message(problem), [{"role": "assistant", "content": generations[chosen]}]
    sft = {"messages": prompt + answer, "original_index": index, "source": source, "generation_index": chosen}
    if rejected is None:
        return passed, sft, None
    pair = {
        "prompt": prompt,
        "chosen": answer,
        "rejected": [{"role": "assistant", "content": generations[rejected]}],
        "original_index": index,
        "source": source,
        "chosen_index": chosen,
        "rejected_index": rejected,
    }
    prompt_tokens, *response_tokens = _lengths(where, pair, tokenizer)
    passed += [prompt_tokens <= max_prompt_tokens, max(response_tokens) <= max_response_tokens]
    return passed, sft, pair if all(passed) else None


def _lengths(where: str, pair: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Tokens of prompt, chosen and rejected as the original counted them: each templated alone without a generation
    prompt, so that a response has the default system prompt in front, plus 1. The trainer sees other lengths, but
    these decide who is in."""
    try:
        texts = [tokenizer.render(pair[part]) for part in ("prompt", "chosen", "rejected")]
        return [len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(texts)]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


_KINDS = {
    (str, None): "text",
    (dict, None): "an object",
    (list, str): "a list of texts",
    (list, bool): "a list of true and false",
}


def _take(where: str, row: dict[str, Any], name: str, kind: type, item: type | None = None) -> Any:
    """A field's value, or None where it is null or missing (`datasets` reads both alike). A list's items may be null
    too."""
    value = row.get(name)
    if value is not None and (
        not isinstance(value, kind) or item and not all(v is None or isinstance(v, item) for v in value)
    ):
        raise UserError(f"{where}: {name!r} must be {_KINDS[kind, item]}, not {str(value)[:60]!r}")
    return value


class _Spool:
    """Rows on disk in the order they come, to be copied in another."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "w+b")
        self.rows: list[tuple[int, int]] = []  # (place, offset in the file)

    def add(self, place: int, row: dict[str, Any]) -> None:
        self.rows.append((place, self.file.tell()))
        self.file.write(json.dumps(row).encode() + b"\n")

    def copy(self, to: Path) -> None:
        """Write the rows by place, and drop the spool."""
        with self.file, open(to, "wb") as out:
            for _, offset in tqdm(sorted(self.rows), f"writing {to.name}", unit=" rows", file=sys.stderr, leave=False):
                self.file.seek(offset)
                out.write(self.file.readline())
        self.path.unlink()


def find_files(paths: list[str]) -> list[Path]:
    """The raw files behind the paths given: files as they are, of a folder its files in the order of their names."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
            # Both kinds side by side are likely the same rows twice.
            if len({file.suffix for file in found}) != 1:
                raise UserError(
                    f"the folder {path} must hold either .jsonl or .parquet files; it holds {'both' if found else 'none'}"
                )
        files += found
    return files


def _num_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        with _parquet(file) as parquet:
            return parquet.metadata.num_rows
    try:
        with open(file, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a raw file, each with where it stands, for messages about it."""
    if file.suffix != ".parquet":
        yield from read_rows(str(file))
        return
    with _parquet(file) as parquet:
        columns = [name for name in _FIELDS if name in parquet.schema_arrow.names]
        rows = chain.from_iterable(batch.to_pylist() for batch in parquet.iter_batches(batch_size=64, columns=columns))
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """An open pyarrow ParquetFile, whose faults speak to the user."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} is a Parquet file, which takes pyarrow to read: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def table(counts: dict[str, int]) -> str:
    """The rows left after each gate, to be read."""
    width = max(map(len, counts))
    lines = [f"{gate:{width}}  {rows:>9,}" for gate, rows in counts.items()]
    rows_read, *_, pairs = counts.values()
    if rows_read > 100_000 and (counts[SFT_GATE], pairs) != PUBLISHED_COUNTS:
        lines.append(
            "The paper has {:,} SFT traces and {:,} pairs of all of OpenR1-Math-Raw.".format(*PUBLISHED_COUNTS)
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


def main(argv: list[str]) -> None:
    _, given = read_flags(__doc__, argv, "prepare", PrepareFlags, takes_recipe=False)
    flags = resolve(PrepareFlags, "prepare", given)
    missing = [f"--{name}" for name in ("raw", "tokenizer", "out") if not getattr(flags, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; --help lists the flags")
    out = Path(flags.out)
    counts = prepare(
        find_files(flags.raw),
        Tokenizer(flags.tokenizer),
        out,
        flags.max_prompt_tokens,
        flags.max_response_tokens,
        flags.seed,
    )
    print(table(counts))
    print(f"Wrote {out / 'sft.jsonl'} and {out / 'pairs.jsonl'}.")


if __name__ == "__main__":
    run_script(main)
