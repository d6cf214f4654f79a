r"""The grader: the last boxed answer, normalised and compared with the gold answer.

Benchmarks are scored on what stands in the last \boxed{...} after the thinking, and one value has many spellings:
\frac12, 0.5, 1/2 and x=\tfrac{1}{2} are the same answer, 0.33 and 1/3 are not. An answer goes through three steps:

    clean   LaTeX to a plain string (plain.py)
    read    the string to a small tree: a list or set, a tuple or interval, a matrix, an equation, an inequality,
        a number in a base, a time of day, a value, else a text
    same    two trees compared node by node

A value is known by its values at fixed points (expression.py), so expanded and factored forms agree.

Responses are untrusted: nothing in them is executed, every size, depth and amount of work is bounded, no input raises,
and what cannot be read is compared as a string. Left out on purpose: sums, integrals and limits (compared as strings),
conversion of units and of number bases, solving (an inequality is what it says, not its solutions).
"""

import itertools
import re

from nanoredi.grader import deepscaler
from nanoredi.grader.compare import same
from nanoredi.grader.parse import read

MAX_BOX = 10_000  # characters looked through for a box's closing brace
MAX_LENGTH = 1_000  # a longer answer is compared as a string

_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{|(-?[0-9][0-9.,/]*))"
)  # \boxed{5} or \boxed 5; a mere mention of \boxed is no box
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are no braces


def grade(response: str, gold: str | list[str], style: str = "nanoredi") -> bool:
    """Is the response's boxed answer equal to the gold answer, or to any one of several?

    Args:
        response: the model's text.
        gold: the answer or answers that count as right.
        style: "nanoredi" compares by value; "deepscaler" is the stricter reading of the paper's evaluation.
    """
    same = {"nanoredi": equal, "deepscaler": strictly_equal}[style]
    answer = extract_answer(response)
    if style == "deepscaler" and f"boxed{{{answer}}}" not in response:
        return False  # it knows no \boxed {5} and no \boxed 5
    golds = [gold] if isinstance(gold, str) else gold
    return bool(answer and answer.strip()) and any(same(answer, one) for one in golds)


def extract_answer(response: str) -> str | None:
    """What the last box after the thinking holds. None: still thinking, no box, or the last box never closes."""
    thinking, closed, text = response.partition("</think>")
    if not closed:
        text = "" if "<think>" in thinking else thinking
    box = None
    for box in _BOX.finditer(text):  # to the last; a list of 100,000 would take its time
        pass
    if box is None or box[1]:
        return box and box[1]
    start, depth = box.end(), 1
    for token in _BRACE.finditer(text, start, start + MAX_BOX):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return text[start : token.start()]
    return None


def equal(answer: str, gold: str) -> bool:
    """Do two answers mean the same? Symmetric; what cannot be read is compared as a string."""
    answer, gold = sorted((answer.strip(), gold.strip()))  # so that the order cannot matter
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    return any(same(x, y) for x, y in itertools.product(read(answer), read(gold)))


def strictly_equal(answer: str, gold: str) -> bool:
    """Is the answer right by DeepScaleR's rules?"""
    return max(len(answer), len(gold)) <= MAX_LENGTH and deepscaler.equal(answer, gold)
