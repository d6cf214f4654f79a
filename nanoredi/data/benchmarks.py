"""Benchmarks: problems with their gold answers.

The five of the paper by name, in the files its evaluation reads or in those of Hugging Face, and any JSON or JSONL file
of rows with `problem` and `answer` (or `Problem` and `Answer`); what else a row has does not matter.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError, nearest
from nanoredi.common.files import read_json, read_rows
from nanoredi.data.tokenizer import user_message

# Name: number of problems.
PAPER = {"math500": 500, "aime24": 30, "amc23": 83, "minerva": 272, "olympiad_bench": 675}

# The question's frame in the paper's evaluation.
PAPER_TEMPLATE = (
    "Solve the following math problem efficiently and clearly. The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before answering."
    "\n\n{problem}"
)


def frame(problem: str, template: str = "", system: str = "") -> list[dict[str, str]]:
    """The messages that ask a problem.

    Args:
        template: what the user's message says: paper (PAPER_TEMPLATE), plain or empty (the problem alone), or a text in which {problem}
            stands for it; its other braces are its own.
        system: the system message; empty: none, and the chat template may put its default one.
    """
    text = {"paper": PAPER_TEMPLATE, "plain": "{problem}", "": "{problem}"}.get(template, template)
    return with_system(user_message(text.replace("{problem}", problem)), system)


def with_system(messages: list[dict[str, str]], system: str) -> list[dict[str, str]]:
    """Messages behind a system message, unless it is empty or they begin with one of their own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


@dataclass(frozen=True)
class Benchmark:
    """Problems in the order of their file.

    Attributes:
        name: of the table's row.
        problems: their texts.
        questions: what the user's message says: the problem, in the paper's frame where it is one of the five.
        golds: for each question the answers that count as right.
    """

    name: str
    problems: list[str]
    questions: list[str]
    golds: list[list[str]]


def load(name: str, folder: str, limit: int = 0) -> Benchmark:
    """Load a benchmark.

    Args:
        name: one of PAPER, or the path of a JSON or JSONL file.
        folder: where the paper's five lie, as name.json or name.jsonl.
        limit: take only so many problems from the start; 0 takes all.

    Raises:
        UserError: for an unknown name, a missing or broken file, a malformed row, and a file of another length than
        the paper's.
    """
    path = Path(name)
    if name in PAPER:
        if not folder:
            raise UserError(f"the benchmark {name} needs its file: give --data DIR, the folder that holds {name}.json")
        path = next((p for p in (Path(folder) / f"{name}.json", Path(folder) / f"{name}.jsonl") if p.exists()), None)
        if path is None:
            raise UserError(f"{folder} holds neither {name}.json nor {name}.jsonl")
    elif path.suffix not in (".json", ".jsonl"):
        raise UserError(
            f"there is no benchmark {name!r}{nearest(name, PAPER)}; it is one of {', '.join(PAPER)}, or a .json or "
            ".jsonl file"
        )
    problems, golds = [], []
    for where, row in read_problems(path):
        problems.append(row["problem"])
        golds.append(golds_of(where, row.get("answer")))
    if not problems:
        raise UserError(f"{path} holds no problems")
    if name in PAPER and len(problems) != PAPER[name]:
        raise UserError(f"{path} holds {len(problems)} problems; {name} has {PAPER[name]}")
    problems = problems[: limit or None]
    questions = [PAPER_TEMPLATE.replace("{problem}", p) for p in problems] if name in PAPER else problems
    return Benchmark(path.stem, problems, questions, golds[: len(problems)])


def read_problems(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a benchmark's file, their keys in lower case, each with where it stands and a text in `problem`."""
    if path.suffix == ".jsonl":
        rows = read_rows(str(path))
    else:
        rows = ((f"{path}, problem {i}", row) for i, row in enumerate(read_json(path, list), 1))
    for where, row in rows:
        row = {key.lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        if not isinstance(row.get("problem"), str) or not row["problem"].strip():
            raise UserError(f"{where} has no text in 'problem'")
        yield where, row


def golds_of(where: str, answer: Any) -> list[str]:
    """The answers that count as right.

    Args:
        where: "file, line n", for messages.
        answer: as a file has it: text, a number (142.0 for 142), a list of these, or a Python list written as text
            ("['9.6\\n', '9.60']").

    Raises:
        UserError: when it is nothing of that.
    """
    if isinstance(answer, str) and answer.strip().startswith(("['", '["')):
        try:
            answer = ast.literal_eval(answer.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # not a list after all: LaTeX may begin so too
    answers = answer if isinstance(answer, list) else [answer]
    golds = [
        f"{a:g}" if isinstance(a, float) and a.is_integer() and abs(a) < 1e15 else str(a).strip()
        for a in answers
        if isinstance(a, (str, int, float)) and not isinstance(a, bool)
    ]
    if not golds or len(golds) != len(answers) or not all(golds):
        raise UserError(f"{where} has no 'answer', which is text, a number, or a list of these")
    return golds
