"""The user's own problems and responses, converted to raw rows for the gates.

    one row per problem     {"problem", "generations": [...], "answer"}, maybe "finish_reasons": [...]
    one row per response    {"prompt", "completion", "answer"}: what sample.py writes; a problem's rows may be anywhere

The problem is `problem`, `question` or `prompt` (text or messages), or `messages`. The rows are labelled by `correct`
(true or false; in the first layout a list of these), or by the grader from `answer` or another name of GOLDS.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from nanoredi.common.errors import UserError, naming
from nanoredi.common.files import check
from nanoredi.data.benchmarks import GOLDS, golds_of
from nanoredi.data.filters import say_dropped
from nanoredi.data.messages import answer_of, folded, prompt_of
from nanoredi.data.spool import Spool
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.grader import grade

Row = dict[str, Any]


def labelled(where: str, row: Row, tokenizer: Tokenizer, grading: bool) -> Row:
    """A row of the first layout as a raw row. With grading, it may also be one of OpenR1's own rows.

    Args:
        where: file and line, for error messages.
        row: a row of the first layout.
        tokenizer: if its template opens <think> in the prompt, that is added to the responses.
        grading: label with the grader, whatever labels the row has.

    Raises:
        UserError: naming what is missing or malformed.
    """
    generations = [text or "" for text in check(where, row.get("generations") or [], [(str, None)], "generations")]
    if not generations and row.get("completion") is not None:
        raise UserError(f"{where} has a 'completion', unlike the rows before it, which have 'generations'")
    # As in the raw set, a row whose problem is null or empty is stopped by a gate.
    prompt = [] if "prompt" not in row and row.get("problem", "?") in (None, "") else prompt_of(where, row)
    with naming(where):
        generations = tokenizer.opened(prompt, generations) if prompt and any(generations) else generations
    correct = row.get("correct")
    if grading:
        golds = _golds(where, row)
        # A truncated response never came to an end, so it is not to be learned as correct, whatever it boxed.
        reasons = check(where, row.get("finish_reasons") or [], list, "finish_reasons")
        cut = {i for i, reason in enumerate(reasons) if reason == "length"}
        graded = (i not in cut and grade(text, golds) for i, text in enumerate(generations))
        correct = [*graded] if golds else None  # without an answer there are no labels, and a gate stops the row
    elif not isinstance(correct, list) or not all(isinstance(one, bool) for one in correct):
        raise UserError(f"{where}: 'correct' must say true or false of each response; or let --grade label the row")
    return {
        "problem_is_valid": row.get("problem_is_valid", "yes"),
        "source": row.get("source"),
        "problem": "\n\n".join(message["content"] for message in prompt if message["role"] == "user"),
        "prompt": prompt,
        "generations": generations,
        "correct": correct,
    }


def gather(rows: Iterable[tuple[str, Row]], spool: Spool, tokenizer: Tokenizer, grading: bool) -> int:
    """Label rows of the second layout, as `labelled` does, and put them on the spool, sorted by problem and sample. A
    problem whose rows have different gold answers is dropped, and reported.

    Returns:
        The number of problems that `gathered` will yield.

    Raises:
        UserError: naming file and line of a malformed row.
    """
    problems: dict[str, tuple[int, str, Any]] = {}  # {prompt: (number, where, answer) of its first row}
    unclear: dict[int, str] = {}
    for where, row in rows:
        if not isinstance(row.get("completion"), str):
            raise UserError(f"{where} must hold 'completion', a text, like all rows of the file")
        [answer] = answer_of(where, row, "completion")
        own = {"generations": [folded(answer)["content"]], "correct": [row.get("correct")]}
        raw = labelled(where, {**row, **own, "finish_reasons": [row.get("finish_reason")]}, tokenizer, grading)
        gold = _golds(where, row) if grading else row.get("answer")
        number, first, known = problems.setdefault(json.dumps(raw["prompt"]), (len(problems), where, gold))
        if gold != known:
            unclear.setdefault(number, f"{first} and {where}")
        sample = row.get("sample") if isinstance(row.get("sample"), int) else 0
        spool.add((number, sample), {"where": where, "number": number, **raw})
    say_dropped("problems", "rows give more than one answer", list(unclear.values()), len(problems))
    spool.rows = [(key, offset) for key, offset in spool.rows if key[0] not in unclear]
    return len(problems) - len(unclear)


def gathered(spool: Spool) -> Iterator[tuple[str, Row]]:
    """The spool's problems as raw rows, in the order of their first responses, each with its first response's place."""
    for _, group in groupby(map(json.loads, spool.lines()), key=lambda row: row["number"]):
        rows = list(group)
        # Without a gold answer, `correct` is None in all rows of the problem.
        joined = {name: [one for row in rows for one in row[name] or ()] for name in ("generations", "correct")}
        yield rows[0]["where"], rows[0] | joined


def _golds(where: str, row: Row) -> list[str] | None:
    """The gold answers, read as a benchmark's; None if all are empty. In verl's layout they are within `reward_model`."""
    row = row | (row["reward_model"] if isinstance(row.get("reward_model"), dict) else {})  # else a model's name
    if not (given := [row[name] for name in GOLDS if name in row]):
        raise UserError(f"{where} has no field 'answer', the gold answer to grade against")
    return next((golds_of(where, answer) for answer in given if answer not in (None, "", [])), None)
