"""Benchmarks: problems with their gold answers.

The five of the paper by name, in the files its evaluation reads, and any JSON or JSONL file of rows with `problem` and
`answer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoredi.errors import UserError, nearest
from nanoredi.files import read_json, read_rows

# Name: number of problems.
PAPER = {"math500": 500, "aime24": 30, "amc23": 83, "minerva": 272, "olympiad_bench": 675}

# The question's frame in the paper's evaluation.
PAPER_TEMPLATE = (
    "Solve the following math problem efficiently and clearly. The last line of your response should be of the following format: "
    "'Therefore, the final answer is: $\\boxed{{ANSWER}}$. I hope it is correct' (without quotes) where ANSWER is just the final "
    "number or expression that solves the problem. Think step by step before answering.\n\n{problem}"
)


@dataclass(frozen=True)
class Benchmark:
    """Problems in the order of their file.

    Attributes:
        name: of the table's row.
        questions: what the user's message says.
        golds: for each question the answers that count as right.
    """

    name: str
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
            f"there is no benchmark {name!r}{nearest(name, PAPER)}; it is one of {', '.join(PAPER)}, or a .json or .jsonl file"
        )
    questions, golds = [], []
    for where, row in read_problems(path):
        questions.append(PAPER_TEMPLATE.format(problem=row["problem"]) if name in PAPER else row["problem"])
        golds.append(read_golds(where, row.get("answer")))
    if not questions:
        raise UserError(f"{path} holds no problems")
    if name in PAPER and len(questions) != PAPER[name]:
        raise UserError(f"{path} holds {len(questions)} problems; {name} has {PAPER[name]}")
    end = limit or len(questions)
    return Benchmark(path.stem, questions[:end], golds[:end])


def read_problems(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a benchmark's file, each with where it stands; each has a text in `problem`."""
    if path.suffix == ".jsonl":
        rows = read_rows(str(path))
    else:
        rows = ((f"{path}, problem {i}", row) for i, row in enumerate(read_json(path, list), 1))
    for where, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("problem"), str) or not row["problem"].strip():
            raise UserError(f"{where} has no text in 'problem'")
        yield where, row


def read_golds(where: str, answer: Any) -> list[str]:
    """The answers that count as right: the file has text, a number (142.0 for 142), or a list of these."""
    answers = answer if isinstance(answer, list) else [answer]
    golds = [
        f"{a:g}" if isinstance(a, float) and a.is_integer() and abs(a) < 1e15 else str(a).strip()
        for a in answers
        if isinstance(a, (str, int, float)) and not isinstance(a, bool)
    ]
    if not golds or len(golds) != len(answers) or not all(golds):
        raise UserError(f"{where} has no 'answer', which is text, a number, or a list of these")
    return golds
