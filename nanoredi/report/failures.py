"""The incorrect samples of an evaluation, for reading: answer, gold answer, and the end of the response."""

from collections.abc import Iterator
from pathlib import Path

from nanoredi.common.files import check, read_rows
from nanoredi.evaluation.samples import SAMPLE
from nanoredi.evaluation.scores import Row

KINDS = ("wrong", "cut_off", "no_answer")
_TAIL = 600  # how many characters of a response are shown


def failures(folder: str, only: str = "") -> Iterator[str]:
    """How many samples there are of each kind, then each incorrect sample as a paragraph.

    Args:
        folder: the output of evaluate.py or train_redi.py, with samples.jsonl.
        only: one of KINDS: wrong (another answer than the gold one), cut_off (by length), no_answer (neither).

    Raises:
        UserError: if the file is missing or broken.
    """
    path = Path(folder) / "samples.jsonl"
    counts, shown = dict.fromkeys(("right", *KINDS), 0), []
    for where, row in read_rows(str(path)):
        kind = "right" if check(where, row, SAMPLE)["correct"] else "no_answer" if row["answer"] is None else "wrong"
        if kind != "right" and row["finish_reason"] == "length":
            kind = "cut_off"
        counts[kind] += 1
        if kind == only or not only and kind != "right":
            shown.append(_paragraph(kind, row))
    yield f"{folder}: " + ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items())
    yield from shown


def _paragraph(kind: str, row: Row) -> str:
    head = f"--- {row['model']}, {row['benchmark']}, problem {row['problem'] + 1}, sample {row['sample']}: "
    count = row["tokens"]
    tokens = "" if count is None else f" after {count:,} token{'' if count == 1 else 's'}"
    answer = "none" if row["answer"] is None else row["answer"]
    tail = row["response"][-_TAIL:].strip()
    cut = "..." if len(row["response"]) > _TAIL else ""
    gold = " or ".join(row["gold"])
    return f"{head}{kind.replace('_', ' ')}{tokens}\nanswer  {answer}\ngold    {gold}\n\n{cut}{tail}"
