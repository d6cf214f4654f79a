r"""The grader: the last boxed answer, normalised and compared with the gold answer.

Benchmarks are scored on the last \boxed{...} after the thinking, and one value has many spellings: \frac12, 0.5, 1/2
and x=\tfrac{1}{2} are the same answer, 0.33 and 1/3 are not. An answer goes through four steps:

    clean       LaTeX to a plain string (latex.py)
    readings    the string, and others that it may mean: without a remark, a unit, a choice's letter (readings.py)
    read        each string to a small tree (parse.py): a list or set, a tuple or interval, a matrix, an equation, an
                inequality, a number in a base, a time of day, a value, otherwise a text
    same        two trees compared node by node (compare.py)

Expressions are compared by their values at fixed points (expression.py), so expanded and factored forms agree.

Responses are untrusted: nothing in them is executed, every size, depth and amount of work is bounded, no input raises,
and what cannot be read is compared as a string. Left out on purpose: integrals, limits and infinite sums (compared as
strings), conversion of units and of number bases, solving. docs/grading.md lists the policies.
"""

import itertools
import re
from collections import deque

from nanoredi.grader import deepscaler
from nanoredi.grader.compare import same
from nanoredi.grader.expression import MAX_LENGTH
from nanoredi.grader.parse import read

MAX_BOX = 10_000  # characters searched for a box's closing brace
MAX_BOXES = 20  # joined into one list

# \boxed{5} or \boxed 5; a mere mention of \boxed is no box.
_BOX = re.compile(r"\\(?:boxed|fbox|framebox(?:\s*\[[^\]]*\]){0,2})\s*(?:\{(\s*\})?|(-?[0-9][0-9.,/]*))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are no braces
# The text before an empty box that is the answer; any other empty box after a full one is a mention: "in a \boxed{}".
_INTRODUCED = re.compile(r"(?:[:=]|\bis|\n)[\s$*\\(\[]*$")
# The text between the boxes of one list: at least a comma, "and" or "or", and no end of a sentence.
_JOINT = re.compile(
    r"(?=[^A-Za-z,;]*(?:,|;|and\b|or\b|\\))"
    r"(?:[\s$,;&()]|\\[()\[\],;:! ]|\\q?quad|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)+"
)


def grade(response: str, gold: str | list[str], style: str = "nanoredi") -> bool:
    """Is the response's boxed answer equal to the gold answer, or to any one of several?

    Args:
        response: the model's text.
        gold: the answer or answers that count as right.
        style: "nanoredi" compares by value, and tries boxes joined by commas or "and" as one list after the last box
            alone; "deepscaler" is the stricter reading of the paper's evaluation.
    """
    golds = [gold] if isinstance(gold, str) else gold
    answers, matches = extract_answers(response), equal
    if style == "deepscaler":  # it knows neither \boxed {5} nor \boxed 5
        answers, matches = [one for one in answers[:1] if f"boxed{{{one}}}" in response], deepscaler.equal
    elif len(answers) > 1:
        answers = [answers[0], ", ".join(reversed(answers))]
    return any(matches(answer, one) for answer in answers if answer.strip() for one in golds)


def extract_answer(response: str) -> str | None:
    """The content of the last box after the thinking; None without a box, or if the thinking or the box never ends."""
    return next(iter(extract_answers(response)), None)


def extract_answers(response: str) -> list[str]:
    """The contents of the last box and of the boxes joined to it, last first."""
    thinking, closed, text = response.partition("</think>")
    if not closed:
        text = "" if "<think>" in thinking else thinking
    boxes: deque[re.Match] = deque(maxlen=MAX_BOXES)
    for box in _BOX.finditer(text):
        if not box[1] or not boxes or _INTRODUCED.search(text, max(0, box.start() - 20), box.start()):
            boxes.append(box)
    answers: list[str] = []
    start = len(text)
    for box in reversed(boxes):
        content, end = (box[2], box.end()) if box[2] else _content(text, box.end() - len(box[1] or ""))
        if content is None or answers and not _JOINT.fullmatch(text, end, start):
            break
        answers.append(content)
        start = box.start()
    return answers


def _content(text: str, start: int) -> tuple[str | None, int]:
    """A box's content up to its closing brace, None without one, and where the box ends."""
    depth = 1
    for token in _BRACE.finditer(text, start, start + MAX_BOX):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return text[start : token.start()], token.end()
    return None, start


def equal(answer: str, gold: str) -> bool:
    """Do two answers mean the same? Symmetric; what cannot be read is compared as a string."""
    answer, gold = sorted((answer.strip(), gold.strip()))  # makes it symmetric
    if answer == gold or max(len(answer), len(gold)) > MAX_LENGTH:
        return answer == gold
    # The details that each answer leaves out must agree, sort by sort, if both have some of that sort.
    return any(
        same(x, y) and {sort for sort, _ in a - b}.isdisjoint(sort for sort, _ in b - a)
        for (x, a), (y, b) in itertools.product(read(answer), read(gold))
    )
