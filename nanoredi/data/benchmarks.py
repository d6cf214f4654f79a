"""Benchmarks: problems with their gold answers.

The five of the paper and AIME25 by name, and any file of rows with `problem` or `question`, and with `answer`, another
name of GOLDS, or a `solution` with the answer in its last box. The case of names and all other fields are ignored.
"""

import ast
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError, nearest
from nanoredi.common.files import read_rows
from nanoredi.common.formats import SUFFIXES
from nanoredi.data.messages import PARTS, is_empty, user_message, with_system
from nanoredi.grader import extract_answers

# {name: number of problems}
PAPER = {"math500": 500, "aime24": 30, "amc23": 83, "minerva": 272, "olympiad_bench": 675}
NAMED = {**PAPER, "aime25": 30}
# Fields with gold answers. The sure ones can be nothing else; `answer` may also be a model's, so it comes after them.
SURE_GOLDS = "gold gts gt ground_truth gold_answer expected_answer correct_answer reference_answer".split()
GOLDS = (*SURE_GOLDS, "answer", "final_answer", "answer_number")
_TEXT = r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\""""  # as repr and JSON write it
_LIST = re.compile(rf"\s*\[(?:(?:{_TEXT})[\s,]*)+\]\s*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MOST_WORDS = 14  # in an answer; those of the named benchmarks have at most 12
IDS = ("id", "unique_id", "problem_id", "question_id", "doc_id", "idx", "index", "uid")  # fields that name a row

# The prompt of the paper's evaluation, with the two spaces that both of its programs have after "clearly."
PAPER_TEMPLATE = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before answering."
    "\n\n{problem}"
)


def frame(problem: str, template: str = "", system: str = "") -> list[dict[str, str]]:
    """The messages that ask a problem.

    Args:
        template: the user's message: paper (PAPER_TEMPLATE), plain or empty (the problem alone), or a text in which
            {problem} is replaced; other braces stay.
        system: the system message; empty: none, so that the chat template may write its default.
    """
    text = {"paper": PAPER_TEMPLATE, "plain": "{problem}", "": "{problem}"}.get(template, template)
    return with_system(user_message(text.replace("{problem}", problem)), system)


@dataclass(frozen=True)
class Benchmark:
    """Problems in the order of their file."""

    name: str  # in the table
    problems: list[str]
    questions: list[str]  # the user's message: the problem in its template
    golds: list[list[str]]  # for each question the answers that count as right
    # {one of IDS: the problems' values of it, as text}, for those fields whose values are all different
    ids: dict[str, list[str]] = field(default_factory=dict)


def load_all(names: list[str], folder: str, limit: int = 0, template: str = "") -> list[Benchmark]:
    """Load several benchmarks. Each is named after its file; if names are equal, folders are added in front until they
    differ.

    Raises:
        UserError: as load does, and for a file that is named twice.
    """
    paths = [find(name, folder).resolve() for name in names]
    if twice := next((name for name, path in zip(names, paths) if paths.count(path) > 1), None):
        raise UserError(f"--benchmarks names {twice} twice")
    shown = unique_names([Path(name) if name in NAMED else path for name, path in zip(names, paths)])
    return [replace(load(name, folder, limit, template), name=unique) for name, unique in zip(names, shown)]


def unique_names(paths: list[Path]) -> list[str]:
    """The names of folders, or of files without their suffix, with as many folders in front as make them different."""
    names = lasts = [path.name if path.is_dir() else path.stem for path in paths]
    for depth in range(2, 1 + max((len(path.parts) for path in paths), default=0)):
        longer = ["/".join((*path.parts[-depth:-1], last)) for path, last in zip(paths, lasts)]
        names = [long if names.count(name) > 1 else name for name, long in zip(names, longer)]
    return [path.name if names.count(name) > 1 else name for path, name in zip(paths, names)]


def find(name: str, folder: str) -> Path:
    """The file of a benchmark: for one of NAMED name.json or similar in the folder, otherwise the name as a path.

    Raises:
        UserError: for an unknown name, and when the folder has no such file.
    """
    path = Path(name)
    if name in NAMED:
        if not folder:
            raise UserError(f"the benchmark {name} needs {name}.json: give --data DIR (train_redi.py: --evaluate.data)")
        found = [file for suffix in SUFFIXES if (file := Path(folder, name + suffix)).exists()]
        if not os.path.isdir(folder):
            own = f"; give a file of your own by its path: --benchmarks {folder}" * os.path.isfile(folder)
            raise UserError(f"--data takes the folder with {name}.json, and {folder} is no folder{own}")
        if not found:
            raise UserError(f"{folder} holds no file {name} that ends in {', '.join(SUFFIXES)}")
        return found[0]
    if path.suffix.lower() not in SUFFIXES and not os.path.isdir(path):
        known = f"one of {', '.join(NAMED)}, or a file that ends in {', '.join(SUFFIXES)}"
        raise UserError(f"there is no benchmark {name!r}{nearest(name, NAMED)}; give {known}")
    return path


def load(name: str, folder: str, limit: int = 0, template: str = "") -> Benchmark:
    """Load a benchmark.

    Args:
        name: one of NAMED, or the path of a file.
        folder: the folder with the files of NAMED.
        limit: the number of problems to take from the start; 0: all.
        template: as in `frame`; empty: paper for those of NAMED, plain for other files.

    Raises:
        UserError: for an unknown name, a missing or broken file, a malformed row, and a file of another length than
        that of NAMED.
    """
    path = find(name, folder)
    rows = []
    for where, row in read_problems(path):
        letter = str(row["answer"]).lower()  # in some files each choice is a field: A, B, ... or option_a, ...
        names = ("choices", "options", f"option_{letter}", letter if {"a", "b"} <= row.keys() else "")
        if field := next((name for name in names if not is_empty(row.get(name))), None):
            raise UserError(f"{where} is multiple choice ({field!r}); write the choices into the problem instead")
        rows.append((golds_of(where, row["answer"]), row))
    if not rows:
        raise UserError(f"{path} holds no problems")
    if name in NAMED and len(rows) != NAMED[name]:
        own = f"give another set by its path: --benchmarks {path}"
        raise UserError(f"{path} holds {len(rows)} problems, but {name} has {NAMED[name]}; {own}")
    golds, rows = zip(*rows[: limit or None])
    check_golds(path, golds)
    problems = [row["problem"] for row in rows]
    template = template or ("paper" if name in NAMED else "plain")
    questions = [frame(problem, template)[-1]["content"] for problem in problems]
    ids = {key: [str(row.get(key)) for row in rows] for key in IDS}
    ids = {key: own for key, own in ids.items() if len({*own}) == len(own)}
    return Benchmark(path.stem, problems, questions, list(golds), ids)


def read_problems(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a benchmark's file, each with its place. Their keys are in lower case, `problem` is a text, and
    `answer` is what golds_of takes, or None."""
    for where, row in read_rows(str(path)):
        row = in_one_case(where, row, str.lower) if isinstance(row, dict) else {}
        texts = {name: text for name, text in row.items() if isinstance(text, str) and text.strip()}
        # A question comes after the context or body that belongs to it (OlympiadBench, SVAMP).
        parts = ("problem",) if "problem" in texts else PARTS["question"] if "question" in texts else ()
        if not parts:
            raise UserError(f"{where} has no text in 'problem' or 'question'; it has {', '.join(row) or 'no fields'}")
        answer = next((row[key] for key in GOLDS if row.get(key) not in (None, "", [])), None)
        if answer is None and isinstance(row.get("solution"), str):
            answer = row["solution"] if extract_answers(row["solution"]) else None
        yield where, {**row, "problem": "\n".join(texts[n] for n in parts if n in texts), "answer": answer}


def in_one_case(where: str, row: dict[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    """A row with its keys changed by `name`. Raises a UserError if two keys with different values become equal."""
    named = {name(key): value for key, value in row.items()}
    if other := next((key for key, value in row.items() if named[name(key)] != value), None):
        raise UserError(f"{where} has {other!r} in two spellings, with different values")
    return named


def golds_of(where: str, answer: Any) -> list[str]:
    """The answers that count as right.

    Args:
        where: "file, line n", for error messages.
        answer: as in the file: text, a number (142.0 for 142), a list of these, or a Python list written as text
            ("['9.6\\n', '9.60']"). Of a whole solution, its last box is taken, or all of several boxes that are joined
            to one list, or without a box the part after its last #### (GSM8K).

    Raises:
        UserError: for anything else.
    """
    answers = listed(answer)
    golds = [_gold(one) for one in (answers if isinstance(answers, list) else [answers])]
    if not golds or not all(golds):
        raise UserError(f"{where} has no 'answer', which is text, a number, or a list of these")
    return golds


def check_golds(path: str | Path, golds: Sequence[list[str]]) -> None:
    """Refuse a file in which most answers are whole sentences: solutions that do not mark their answer."""
    num_solutions = sum(any(len(_WORD.findall(gold)) > _MOST_WORDS for gold in own) for own in golds)
    if 2 * num_solutions > len(golds):
        raise UserError(f"{path}: {num_solutions} of {len(golds)} answers are solutions without a box or #### in them")


def listed(value: Any) -> Any:
    """The list of texts that a text such as "['9.6\\n', '9.60']" spells (numpy omits commas); else the value."""
    if isinstance(value, str) and _LIST.fullmatch(value):
        with contextlib.suppress(ValueError, SyntaxError):  # an unknown escape
            return [ast.literal_eval(text) for text in re.findall(_TEXT, value)]
    return value


def _gold(answer: Any) -> str:
    """One answer as text; empty if it is not an answer."""
    if isinstance(answer, float) and math.isfinite(answer):
        return f"{Decimal(repr(answer)):f}".removesuffix(".0")  # every digit, and no exponent
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str):
        return ""
    return (", ".join(reversed(extract_answers(answer))) or answer.rpartition("####")[2]).strip()
