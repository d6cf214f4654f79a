"""Raw rows of every kind, and runs of prepare on them."""

import json
from pathlib import Path

from nanoredi import prepare
from nanoredi.data.decontaminate import Overlap
from nanoredi.data.tokenizer import Tokenizer


def raw(
    problem="a=1",
    generations=("b=1", "b=2"),
    llama=(True, False),
    math=(True, False),
    valid="Yes",
    source="olympiads",
    **more,
):
    labels = {
        "llama_verification": llama and list(llama),
        "math_verify_reparsed_answer": math and list(math),
        "math_verify": None,
    }
    return {
        "problem": problem,
        "solution": "",
        "source": source,
        "problem_is_valid": valid,
        "generations": generations if generations is None else list(generations),
        "correctness": labels,
    } | more


# With the toy's tokenizer a text of n characters is templated as <user> or <assistant> and n more tokens, and measures
# n + 2.
ROWS = {
    "plain pair": raw(),
    "not valid": raw(valid="No"),
    "spaces and case": raw("a=2", valid="  yES\n", source=None),
    "validity unknown": raw(valid=None),
    "cn_k12": raw(source="cn_k12"),
    "cn_k12 and not valid": raw(source="cn_k12", valid="Incomplete"),
    "empty problem": raw(""),
    "null problem": raw(None),
    "null generations": raw(generations=None, llama=None, math=None),
    "no generations": raw(generations=(), llama=(), math=()),
    "short list": raw(llama=(True,)),
    "long list": raw(math=(True, False, True)),
    "null list": raw(llama=None),
    "null correctness": raw(correctness=None),
    "one judge each": raw("a=3", llama=(True, False), math=(False, True)),
    "null label": raw("a=4", llama=(None, True), math=(True, True)),
    "all correct": raw("a=5", llama=(True, True), math=(True, True)),
    "first of each": raw(
        "a=6", ("a", "b", "c", "d", "e"), (False, True, True, True, False), (True, False, True, True, False)
    ),
    "prompt fits": raw("a=1111"),
    "prompt too long": raw("a=11111"),
    "responses fit": raw("a=7", ("b=123456", "c=123456")),
    "chosen too long": raw("a=8", ("b=1234567", "b=1")),
    "rejected too long": raw("a=9", ("b=1", "b=1234567")),
    "empty generation": raw("a=10", ("", "b=3", "", "b=4"), (True, True, False, False), (True, True, True, False)),
}


LIMITS = {"max_prompt_tokens": 8, "max_response_tokens": 10}

COUNTS = [24, 21, 20, 18, 16, 12, 11, 10, 9, 7]


def write(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepared(files: list[Path], tokenizer: Tokenizer, out: Path, **flags: int | float | bool) -> dict[str, int]:
    """The counts that prepare reports."""
    return prepare.prepare(files, tokenizer, out, prepare.PrepareFlags(**flags), Overlap([]))
