"""The tree of an answer's parts, and when two trees mean the same.

A leaf that has a value is compared by its values at fixed points (expression.py), every other by its text.
"""

import re
from dataclasses import dataclass

from nanoredi.grader.expression import GENERAL, NEGATIVE, WHOLE, Budget, Unreadable, evaluate, tokens_of
from nanoredi.grader.numbers import Number, add, close, divide, is_real


class Expression:
    """A text that has a value.

    Attributes:
        letters: whether it has any, so that its value depends on the point.

    Raises:
        Unreadable, ArithmeticError, ValueError: when it has no value, or none within the bounds.
    """

    def __init__(self, text: str, budget: Budget):
        self.tokens, self.budget = tokens_of(text), budget
        first, self.letters = evaluate(self.tokens, 0, budget)
        self._values: dict[int, Number | None] = {0: first}

    def at(self, point: int) -> Number | None:
        """The value at a point; None where it has none."""
        point = point if self.letters else 0
        if point not in self._values:
            try:
                self._values[point] = evaluate(self.tokens, point, self.budget)[0]
            except (Unreadable, ArithmeticError, ValueError):
                self._values[point] = None
        return self._values[point]

    def has(self, *tokens: str) -> bool:
        return any(token in self.tokens for token in tokens)


def points_for(*expressions: Expression) -> list[int]:
    """The points at which expressions must agree."""
    if any(e.has("⌊", "⌈") for e in expressions):
        return list(WHOLE)
    return [*GENERAL, *(NEGATIVE if any(e.has("abs") for e in expressions) else [])]


def agree(a: Expression, b: Expression) -> bool:
    """Have they the same value at every point?"""
    for point in points_for(a, b) if a.letters or b.letters else GENERAL[:1]:
        x, y = a.at(point), b.at(point)
        if x is None or y is None or not close(x, y):
            return False
    return True


@dataclass
class Reading:
    """A node of the tree.

    Attributes:
        kind: "value", "text", "list", "system" (named values), "cases", "matrix", "row", "base", "time", a relation
            ("=", "<", "≤", "≤<", ...), "≠", or a tuple's two brackets such as "[)".
        text: the plain string.
        parts: the nodes below.
        expression: of a value.
        bare: of an equation: what it says when the name on one side is dropped.
        name: of an equation x = 5: x; of a time: am, pm or nothing.
    """

    kind: str
    text: str
    parts: tuple["Reading", ...] = ()
    expression: Expression | None = None
    bare: "Reading | None" = None
    name: str = ""


def same(a: Reading, b: Reading) -> bool:
    if "time" in (a.kind, b.kind):
        if a.kind == b.kind:
            return a.text == b.text and (a.name == b.name or not a.name or not b.name)
        return bool(a.expression and b.expression) and agree(a.expression, b.expression)
    if a.text == b.text:
        return True
    if a.kind == b.kind == "=" and (match(a.parts, b.parts) or proportional(a, b)):
        return True
    if a.bare or b.bare:
        return same(a.bare or a, b.bare or b)
    if "system" in (a.kind, b.kind):
        return same_system(a, b)
    if a.kind != b.kind:
        return False
    if a.kind == "value" and agree(a.expression, b.expression):
        return True
    if a.kind == "text" or re.fullmatch("[A-Za-z ]{2,}", a.text):
        # The case of words does not matter; a short word reads as a product.
        return word(a.text) == word(b.text)
    if a.kind in ("list", "cases", "≠"):
        return match(a.parts, b.parts)
    if a.kind in ("<", "≤") and proportional(a, b):
        return True
    return len(a.parts) == len(b.parts) > 0 and all(map(same, a.parts, b.parts))


def word(text: str) -> str:
    """A text without what does not matter in it: spaces, case, braces around one letter or macro."""
    return re.sub(r"\{(\w|\\[A-Za-z]+)\}", r"\1", re.sub(r"[ °]", "", text)).casefold()


def match(left: tuple[Reading, ...], right: tuple[Reading, ...]) -> bool:
    """Can the parts be paired off, in any order, each with one that is the same?"""
    if len(left) != len(right):
        return False
    rest = list(right)
    for part in left:
        twin = next((i for i, other in enumerate(rest) if same(part, other)), None)
        if twin is None:
            return False
        del rest[twin]
    return True


def same_system(a: Reading, b: Reading) -> bool:
    """x = 1, y = 2 against the same names in any order, against other names or (1, 2) in this order, or a list."""
    if a.kind == b.kind:
        names = [{part.name for part in system.parts} for system in (a, b)]
        if names[0] == names[1]:
            a, b = (Reading("()", "", tuple(sorted(s.parts, key=lambda part: part.name))) for s in (a, b))
        elif names[0] & names[1]:
            return False
    elif {a.kind, b.kind} == {"system", "list"}:
        return match(a.parts, b.parts)
    elif {a.kind, b.kind} != {"system", "()"}:
        return False
    return len(a.parts) == len(b.parts) and all(map(same, a.parts, b.parts))


def proportional(a: Reading, b: Reading) -> bool:
    """Are two relations, brought to left - right, multiples of each other: 2x + y = 5 and y = 5 - 2x? An inequality's
    factor is positive."""
    sides = [part.expression for part in (*a.parts, *b.parts)]
    if len(sides) != 4 or None in sides or not any(side.letters for side in sides):
        return False
    ratios = []
    for point in GENERAL:
        values = [side.at(point) for side in sides]
        if None in values:
            return False
        try:
            ratios.append(divide(add(values[0], -values[1]), add(values[2], -values[3])))
        except ArithmeticError:
            return False
    if not ratios[0] or a.kind != "=" and not (is_real(ratios[0]) and ratios[0] > 0):
        return False
    varies = any(not close(side.at(GENERAL[0]), side.at(point)) for side in sides for point in GENERAL[1:])
    return varies and all(close(ratio, ratios[0]) for ratio in ratios)
