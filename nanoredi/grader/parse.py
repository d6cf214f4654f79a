"""An answer's plain string (plain.py) to the tree of its parts (answer.py).

A part is a list or set, a tuple or interval, a matrix, an equation, an inequality, a number in a base, a time of day, a
value, else a text.

A grammar in functions, from the outside in: `several` takes lists apart, `one` knows what is none.
"""

import itertools
import re
from collections.abc import Iterator

from nanoredi.grader import latex as plain
from nanoredi.grader.compare import Expression, Reading, same
from nanoredi.grader.expression import MAX_DEPTH, Budget, Unreadable
from nanoredi.grader.numbers import inexact, is_real

MAX_PARTS = 100  # of a list; cells of a matrix
_NODE_WORK = 50

_INDEX = r"(?:_\{[^{}]*\})?"
_LETTER = rf"(?:\\(?!frac|sqrt|begin|text)[A-Za-z]+ ?|[A-Za-z]){_INDEX}"
# Of what stands before an = : x, S_{10}, f(x), f'(x), \theta, \angle ABC, Area, xy, P(A|B); \overline{AB}, \frac{m}{n},
# |S|, [ABC], (x,y).
_NAME = re.compile(
    r"(?:\\(?!frac|sqrt|begin)[A-Za-z]+ ?)?"
    rf"(?:[A-Z]+|[A-Za-z]{{4,}}(?: [A-Za-z]+){{0,4}}|(?:{_LETTER}){{1,3}}|(?<=[a-z]))"
    rf"{_INDEX}(?:\^\{{?-?[0-9n]\}}?)?'*(?:\([\w,=|']*\))?"
    rf"|\\(?:overline|bar|hat)\{{\w+\}}|\\frac\{{{_LETTER}\}}\{{{_LETTER}\}}|\|\w+\||\[[A-Z]+\]|\(\w(?:,\w)+\)"
)
_ONE_NAME = re.compile(rf"(?:{_LETTER}|[A-Z]{{2,}}|[A-Za-z]{{4,}})'*(?:\([\w,]*\))?")  # no product
_MATRIX = re.compile(r"([^⟦]{0,100})⟦([pbB]?matrix|smallmatrix|array|cases|aligned|align|gathered)¦([^⟦]*)⟧", re.DOTALL)
_BASE = re.compile(r"\(?([0-9A-Z]+)\)?(?:_\{(?:base ?)?| (?:in )?base )([0-9]{1,2})\}?")
_TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?(?:([AaPp])\.?[Mm]\.?)?")
_ALL_REALS = re.compile(r"(?:the )?(?:set of )?all real(?: number)?s|ℝ", re.IGNORECASE)
_SUCH_THAT = re.compile(r"(\w+)(?:∈ℝ)?[|:](.+)")
_FLIP = {">": "<", "≥": "≤"}
OPEN, CLOSE = "([{⦃⌊⌈⟦", ")]}⦄⌋⌉⟧"


def read(text: str) -> list[Reading]:
    """All that an answer may mean; its readings share one budget of work."""
    reader = _Reader(Budget())
    return [reader.read(one) for one in plain.readings(text) if one]


class _Reader:
    """Strings to trees, paid for from one budget."""

    def __init__(self, budget: Budget):
        self.budget = budget

    def read(self, text: str) -> Reading:
        try:
            self.budget.spend(_NODE_WORK)
            deepest = max(itertools.accumulate((char in OPEN) - (char in CLOSE) for char in "." + text))
            return self.as_text(text) if deepest > MAX_DEPTH else self.several(text)
        except (Unreadable, ArithmeticError, ValueError):
            return self.as_text(text)

    def as_text(self, text: str) -> Reading:
        if text.startswith("{") and text.endswith("}"):
            text = inside(text) or text
        return Reading("text", text.strip(" .,;").removeprefix("+"))

    def several(self, text: str) -> Reading:
        text = text.strip(" ,;").removesuffix(".").removeprefix("=")
        while (inner := inside(text)) is not None and (
            text[0] in "{⦃" or text[0] in "([" and len(split(inner, ",")) == 1
        ):  # brackets that only group
            if text[0] + text[-1] in ("(]", "[)"):
                raise Unreadable
            if not inner.strip():
                return self.as_text("∅")
            such_that = _SUCH_THAT.fullmatch(inner) if text[0] == "⦃" else None
            text = such_that[2] if such_that and is_name(such_that[1]) else inner
        pieces = split(text, ",;∪")
        unequal = [piece for piece in pieces[::2] if "≠" in piece]
        if unequal and pieces[0] == unequal[0]:  # x ≠ 1, 2 says x ≠ 1 and x ≠ 2
            name = pieces[0].partition("≠")[0]
            pieces = [piece if i % 2 or "≠" in piece else f"{name}≠{piece}" for i, piece in enumerate(pieces)]
        parts = [one for piece in pieces[::2] for one in signs(piece.strip()) if one]
        if len(parts) > MAX_PARTS:
            raise Unreadable
        if len(parts) == 1:
            return self.one(parts[0])
        nodes = tuple(map(self.read, parts))
        names = {node.name for node in nodes}
        system = len(names) == len(nodes) and "" not in names and "∪" not in pieces
        return Reading("system" if system else "list", text, nodes)

    def one(self, text: str) -> Reading:
        """Not a list: a relation, a matrix, a tuple, a base, a time, a ratio or a value."""
        members = split(text, "∈")
        if len(members) == 3 and is_name(members[0]):
            return self.read(members[2])
        if _ALL_REALS.fullmatch(text):
            return self.read("(-∞,∞)")
        removed = split(text, "∖")
        if len(removed) == 3 and _ALL_REALS.fullmatch(removed[0]):
            return self.without(split(inside(removed[2]) or removed[2], ",")[::2], text)
        exact = split(text, "≈")[::2]  # x ≈ 3.2 says 3.2, √2 ≈ 1.4 says √2
        if len(exact) > 1:
            return self.read(exact[1] if not exact[0] or is_name(exact[0]) else exact[0])
        sides = split(text, "=<>≤≥≠")
        if len(sides) > MAX_PARTS:
            raise Unreadable
        if len(sides) > 1:
            return self.relation(text, sides[::2], sides[1::2])
        if matrix := _MATRIX.fullmatch(text):
            return self.matrix(text, *matrix.groups())
        if base := _BASE.fullmatch(text):
            return Reading("base", f"{base[1].lstrip('0')}_{base[2]}")
        if time := _TIME.fullmatch(text.replace(" ", "")):
            return self.time(time, text)
        parts = split(inside(text) or "", ",")[::2]
        if len(parts) > 1 and text[0] in "([":
            return Reading(text[0] + text[-1], text, tuple(map(self.read, parts)))
        ratio = split(text, ":")[::2]
        if len(ratio) > 2:
            return Reading("ratio", text, tuple(map(self.read, ratio)))
        quotient = "/".join(f"({part})" for part in ratio) if len(ratio) == 2 else text
        return Reading("value", text, expression=Expression(quotient, self.budget))

    def time(self, time: re.Match, text: str) -> Reading:
        """Of day, as seconds from midnight or noon; the name is the half of the day, where it is known. 10:30 may also
        be a ratio."""
        hour, minute, second = (int(part or 0) for part in time.groups()[:3])
        half = f"{time[4]}m".lower() if time[4] else "pm" if hour > 12 else "am" if hour == 0 else ""
        ratio = None if time[3] or time[4] else Expression(text.replace(":", "/"), self.budget)
        return Reading("time", str((hour % 12 * 60 + minute) * 60 + second), expression=ratio, name=half)

    def without(self, points: list[str], text: str) -> Reading:
        """The real line without points, in one shape however it is written: x ≠ 3 or (-∞,3) ∪ (3,∞)."""
        nodes = tuple(map(self.read, points))
        values = [node.expression.at(0) if node.expression and not node.expression.letters else None for node in nodes]
        if any(v is None or not is_real(v) for v in values):
            return Reading("≠", text, nodes)
        ends = [
            "-∞",
            *(points[i] for i in sorted(range(len(points)), key=lambda i: inexact(values[i]))),
            "∞",
        ]
        return self.several(",".join(f"({a},{b})" for a, b in itertools.pairwise(ends)))

    def matrix(self, text: str, factor: str, kind: str, body: str) -> Reading:
        rows = [row for row in body.split("\\\\") if row.strip()]
        if len(rows) + body.count("&") > MAX_PARTS:
            raise Unreadable
        if kind in ("aligned", "align", "gathered"):
            return self.several(",".join(row.replace("&", "").strip(" ,") for row in rows))
        if factor.strip("([{⦃"):  # a number before a matrix multiplies each of its cells
            rows = ["&".join(f"({factor})*({cell})" for cell in row.split("&")) for row in rows]
        if kind == "cases":
            rows = [re.sub(r",?\s*&|,\s*(?:if|for|when)\b", "&", row) for row in rows]
            rows = [re.sub(r"\b(?:if|for|when)\s*|,\s*$", "", row) for row in rows]
        nodes = tuple(Reading("row", row, tuple(self.read(cell.strip()) for cell in row.split("&"))) for row in rows)
        return Reading("cases" if kind == "cases" else "matrix", text, nodes)

    def relation(self, text: str, sides: list[str], signs: list[str]) -> Reading:
        """An equation, or an inequality: as the interval of a name where it is one, otherwise from the smallest side
        up."""
        if set(signs) == {"="}:
            parts = tuple(map(self.read, sides))
            name = sides[0] if len(sides) == 2 and is_name(sides[0]) else ""
            return Reading("=", text, parts, bare=without_name(sides, parts), name=name)
        if signs == ["≠"] and is_name(sides[0]):
            return self.without(sides[1:], text)
        if set(signs) <= {">", "≥"}:
            sides, signs = sides[::-1], [_FLIP[sign] for sign in signs[::-1]]
        if set(signs) <= {"<", "≤"}:
            if len(sides) == 2 and is_name(sides[0]) != is_name(sides[1]):
                sides, signs = (["-∞", *sides], ["<", *signs]) if is_name(sides[0]) else ([*sides, "∞"], [*signs, "<"])
            if len(sides) == 3 and is_name(sides[1]):
                brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
                return self.read(f"{brackets[0]}{sides[0]},{sides[2]}{brackets[1]}")
        return Reading("".join(signs), text, tuple(map(self.read, sides)))


def without_name(sides: list[str], parts: tuple[Reading, ...]) -> Reading | None:
    """x = 5 and 5 = x say 5, and so do m + n = 5 and x = 10/2 = 5; 2x + y = 5 does not."""
    names = len(list(itertools.takewhile(is_name, sides[:-1])))
    rest = parts[names:]
    if all(map(same, rest, rest[1:])) and (names or rest[-1].kind == "value"):
        return rest[-1]
    return parts[0] if len(sides) == 2 and _ONE_NAME.fullmatch(sides[1]) else None


def is_name(text: str) -> bool:
    """A name, or a sum of names."""
    return all(_NAME.fullmatch(part.strip()) for part in re.split(r"[+-]", text))


def inside(text: str) -> str | None:
    """What stands between the first and last characters where these are brackets that belong together."""
    if len(text) < 2 or text[0] not in OPEN or text[-1] not in CLOSE:
        return None
    depths = list(itertools.accumulate((char in OPEN) - (char in CLOSE) for char in text))
    return text[1:-1] if min(depths[:-1]) > 0 and depths[-1] == 0 else None


def split(text: str, separators: str) -> list[str]:
    """Pieces and the separators between them, in turn, looking only outside brackets."""
    pieces, start, depth = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in OPEN) - (char in CLOSE)
        if depth < 0:
            raise Unreadable
        if depth == 0 and char in separators:
            pieces += [text[start:i], char]
            start = i + 1
    return [*pieces, text[start:]]


def signs(text: str) -> Iterator[str]:
    """Each ± stands for two answers; with a ∓ in it, all signs change together."""
    pieces = re.split("([±∓])", text)
    if len(pieces) > 9:
        raise Unreadable
    marks = pieces[1::2]
    choices = itertools.product("+-", repeat=len(marks))
    if "∓" in marks:
        choices = [tuple("+-"[(mark == "∓") ^ turned] for mark in marks) for turned in (False, True)]
    for choice in choices:
        yield "".join(itertools.chain(*itertools.zip_longest(pieces[::2], choice, fillvalue="")))
