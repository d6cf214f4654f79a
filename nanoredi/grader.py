r"""The grader: the last boxed answer, normalised and compared with the gold answer.

Benchmarks are scored on what stands in the last \boxed{...} after the thinking, and one value has many spellings:
\frac12, 0.5, 1/2 and x=\tfrac{1}{2} are the same answer, 0.33 and 1/3 are not. An answer goes through three steps:

    clean   LaTeX to a plain string: layout, fonts, units, %, degrees and $ are dropped, \leq becomes the character ≤
    ...
    read    the string to a small tree: a list, a tuple or interval, a matrix, an equation, an inequality, a value,
        else a text
    same    two trees compared node by node

A value is known by its values at two sample points (expression.py), so expanded and factored forms agree.

Responses are untrusted: nothing in them is executed, every size, depth and exponent is bounded, no input raises, and
what cannot be read is compared as a string. Left out on purpose: set-builder notation, integrals, number bases, unit
conversion.
"""

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction

from nanoredi.expression import FUNCTIONS, MAX_DEPTH, Number, Unreadable, value_at

MAX_BOX = 10_000  # characters looked through for a box's closing brace
MAX_LENGTH = 1_000  # a longer answer is compared as a string
MAX_PARTS = 100
TOLERANCE = 1e-12  # relative, and only where a float is involved

BOX = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{|(-?[0-9][0-9.,/]*))"
)  # \boxed{5} or \boxed 5; a mere mention of \boxed is no box
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are no braces


@dataclass(frozen=True)
class Reading:
    kind: str  # "value", "text", "list", "matrix", "row", "=", "≠", "<", "≤", or a tuple's two brackets such as "[)"
    text: str
    parts: tuple["Reading", ...] = ()
    values: tuple[Number, ...] = ()  # of a value: one for each sample point
    bare: "Reading | None" = None  # of an equation: what it says when the name on one side is dropped


def grade(response: str, gold: str | list[str]) -> bool:
    """Is the response's boxed answer equal to the gold answer, or to any one of several?"""
    answer = extract_answer(response)
    golds = [gold] if isinstance(gold, str) else gold
    return bool(answer and answer.strip()) and any(equal(answer, one) for one in golds)


def extract_answer(response: str) -> str | None:
    """What the last box after the thinking holds. None: still thinking, no box, or the last box never closes."""
    thinking, closed, text = response.partition("</think>")
    if not closed:
        text = "" if "<think>" in thinking else thinking
    box = None
    for box in BOX.finditer(text):  # to the last; a list of 100,000 would take its time
        pass
    if box is None or box[1]:
        return box and box[1]
    start, depth = box.end(), 1
    for token in BRACE.finditer(text, start, start + MAX_BOX):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return text[start : token.start()]
    return None


def equal(answer: str, gold: str) -> bool:
    """Do two answers mean the same? Symmetric; what cannot be read is compared as a string."""
    if answer.strip() == gold.strip():
        return True
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    return any(same(x, y) for x in readings(answer) for y in readings(gold))


def same(a: Reading, b: Reading) -> bool:
    if a.text == b.text or (a.kind == b.kind == "=" and match(a.parts, b.parts)):
        return True
    if a.bare or b.bare:
        return same(a.bare or a, b.bare or b)
    if a.kind != b.kind:
        return False
    if a.kind == "value" and all(map(close, a.values, b.values)):
        return True
    if a.kind == "text" or re.fullmatch(
        "[A-Za-z ]{2,}", a.text
    ):  # the case of words does not matter; a short one reads as a product
        return a.text.replace(" ", "").casefold() == b.text.replace(" ", "").casefold()
    if a.kind in ("list", "≠"):
        return match(a.parts, b.parts)
    return len(a.parts) == len(b.parts) > 0 and all(map(same, a.parts, b.parts))


def match(left: tuple[Reading, ...], right: tuple[Reading, ...]) -> bool:
    """Can the parts be paired off, in any order, each with one that is the same?"""
    rest = list(right)
    for part in left:
        twin = next((i for i, other in enumerate(rest) if same(part, other)), None)
        if twin is None:
            return False
        del rest[twin]
    return not rest


def close(x: Number, y: Number) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    try:
        return abs(x - y) <= TOLERANCE * max(abs(x), abs(y))
    except OverflowError:  # an exact value beyond the floats' range is not equal to any float
        return False


# ---- clean: LaTeX to a plain string

MACROS = {
    macro: new
    for macros, new in [
        (", ; : > space quad qquad", " "),
        ("! $ % ( ) [ ] left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits bf rm it", ""),
        ("dfrac tfrac cfrac", "\\frac"),
        ("cdot times ast", "*"),
        ("div", "/"),
        ("pm", "±"),
        ("cup", "∪"),
        ("in", "∈"),
        ("infty", "∞"),
        ("emptyset varnothing", "∅"),
        ("pi", "π"),
        ("circ degree", "°"),
        ("lvert rvert vert", "|"),
        ("{", "⦃"),
        ("}", "⦄"),
        ("langle", "("),
        ("rangle", ")"),
        ("lt", "<"),
        ("gt", ">"),
        ("leq le leqslant", "≤"),
        ("geq ge geqslant", "≥"),
        ("neq ne", "≠"),
    ]
    for macro in macros.split()
} | {" ": " ", "\n": " "}
CHARACTERS = str.maketrans(
    {
        "~": " ",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "÷": "/",
        "−": "-",
        "–": "-",
        "√": "\\sqrt",
        "²": "^2",
        "³": "^3",
        "$": "",
        "%": "",
    }
)
FONT = r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|mathit|mathsf)\s*"
UNIT = FONT + r"\{(?!\s*[ie]\s*\})[^{}0-9](?:[^{}]|\{[^{}]*\})*\}(?:\^\{?-?[0-9]\}?)?"  # 2\mathrm{i} has no unit
REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"(?:\^\s*)?(?:°|\{\s*°\s*\})(?:\s*[CF]\b)?", ""),
        (r"<=", "≤"),
        (r">=", "≥"),
        (r"!=", "≠"),
        (r"\*\*", "^"),
        (r"_\s*(\w|\\[A-Za-z]+)", r"_{\1}"),
        (r"\\operatorname\*?\s*\{(\w+)\}", r"\\\1 "),
        (FONT + r"\{\s*(" + "|".join(FUNCTIONS) + r")\s*\}", r"\\\1 "),
        (r"\s(?:or|and)\s|" + FONT + r"\{\s*(?:or|and)\s*\}", " , "),
        (r"(?<=[0-9)}π])\s*(?:" + UNIT + r"[\s/*]*)+", " "),
        (r"(?<=[0-9}])\s+[A-Za-z]{4,}(?:\s+[A-Za-z]{4,})?\s*$", ""),  # 5 square units
        (FONT + r"\{([^{}]*)\}", r" \1 "),
        (FONT + r"\{([^{}]*)\}", r" \1 "),  # twice, for a font in a font
        (r"\\frac\s*([0-9])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"(\\sqrt(?:\[[0-9]\])?)\s*([0-9])", r"\1{\2}"),
        (
            r"(?<![0-9./^])([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}",
            r"(\1+\2/\3)",
        ),  # a mixed number is a sum
        (r"(?<![0-9./^])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"(\1+\2/\3)"),
    ]
]


def clean(text: str) -> str:
    text = re.sub(r"(?:\{,\}|,\s*\\!)\s*(?=[0-9]{3})", "", text)  # these commas group digits, wherever they stand
    text = re.sub(r"\\([A-Za-z]+|[^A-Za-z])", lambda macro: MACROS.get(macro[1], macro[0]), text).translate(CHARACTERS)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text


def readings(text: str) -> list[Reading]:
    """A bare 12,345 is one number or a list of two, and 12 345 one number or unreadable: both are tried."""
    text = clean(text)
    texts = [text]
    if not re.search(r"[(\[⦃]", text):
        grouped = r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])"
        texts.append(re.sub(grouped, lambda number: re.sub("[ ,]", "", number[0]), text))
    # A space counts only between two letters or digits: 1 1/3 is not 11/3.
    return [read(re.sub(r"\s+(?=\W)|(?<=\W)\s+", "", one.strip())) for one in dict.fromkeys(texts)]


# ---- read: a clean string to a tree

NAME = re.compile(  # of what stands before an = : x, S_{10}, f(x), \theta, \angle ABC, Area, |S|, (x,y)
    r"(?:\\([A-Za-z]+) ?)?(?:[A-Za-z]|[A-Z]{2,}|[A-Za-z]{4,}|(?<=[a-z]))(?:_\{\w+\})?'*(?:\([\w,]*\))?|\|\w+\||\(\w(?:,\w)+\)"
)
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]+\})?(.*)\\end\{\1\}", re.DOTALL)
OPEN, CLOSE = "([{⦃", ")]}⦄"


def read(text: str) -> Reading:
    try:
        deepest = max(itertools.accumulate((char in OPEN) - (char in CLOSE) for char in "." + text))
        return Reading("text", text) if deepest > MAX_DEPTH else read_list(text)
    except (Unreadable, ArithmeticError, ValueError):
        return Reading("text", text.strip(" .").removeprefix("+"))


def read_list(text: str) -> Reading:
    text = text.strip(" ,;").removesuffix(".")
    while (inner := inside(text)) is not None and (
        text[0] in "{⦃" or len(split(inner, ",")) == 1
    ):  # brackets that only group
        if text[0] + text[-1] in ("(]", "[)"):
            raise Unreadable
        text = inner
    parts = [sign for part in split(text, ",;∪")[::2] for sign in plus_minus(part.strip()) if sign]
    if len(parts) > MAX_PARTS:
        raise Unreadable
    return read_one(parts[0]) if len(parts) == 1 else Reading("list", text, tuple(map(read, parts)))


def read_one(text: str) -> Reading:
    """Not a list: a relation, a matrix, a tuple or a value."""
    members = split(text, "∈")
    if len(members) == 3 and is_name(members[0]):
        return read(members[2])
    sides = split(text, "=<>≤≥≠")
    if len(sides) > MAX_PARTS:
        raise Unreadable
    if len(sides) > 1:
        return read_relation(text, sides[::2], sides[1::2])
    matrix = MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in matrix[2].split("\\\\") if row.strip()]
        return Reading("matrix", text, tuple(Reading("row", row, tuple(map(read, row.split("&")))) for row in rows))
    parts = split(inside(text) or "", ",")[::2]
    if len(parts) > 1:
        return Reading(text[0] + text[-1], text, tuple(map(read, parts)))
    return Reading("value", text, values=tuple(value_at(text, point) for point in range(2)))


def read_relation(text: str, sides: list[str], signs: list[str]) -> Reading:
    """An equation, or an inequality: as the interval of a name where it is one, otherwise from the smallest side up."""
    if set(signs) == {"="}:
        parts = tuple(map(read, sides))
        return Reading("=", text, parts, bare=without_name(sides, parts))
    if set(signs) <= {">", "≥"}:
        sides, signs = sides[::-1], [{">": "<", "≥": "≤"}[sign] for sign in signs[::-1]]
    if set(signs) <= {"<", "≤"}:
        if len(sides) == 2 and is_name(sides[0]) != is_name(sides[1]):
            sides, signs = (["-∞", *sides], ["<", *signs]) if is_name(sides[0]) else ([*sides, "∞"], [*signs, "<"])
        if len(sides) == 3 and is_name(sides[1]):
            return read(
                ("(" if signs[0] == "<" else "[") + sides[0] + "," + sides[2] + (")" if signs[1] == "<" else "]")
            )
    return Reading("".join(signs), text, tuple(map(read, sides)))


def without_name(sides: list[str], parts: tuple[Reading, ...]) -> Reading | None:
    """x = 5 and 5 = x say 5, and so do m + n = 5 and x = 10/2 = 5; 2x + y = 5 does not."""
    names = len(list(itertools.takewhile(is_name, sides[:-1])))
    rest = parts[names:]
    if all(map(same, rest, rest[1:])) and (names or rest[-1].kind == "value"):
        return rest[-1]
    return parts[0] if len(sides) == 2 and is_name(sides[1]) else None


def is_name(text: str) -> bool:
    """A name, or a sum of names."""
    names = [NAME.fullmatch(part.strip()) for part in re.split(r"[+-]", text)]
    return all(name and name[1] not in FUNCTIONS for name in names)


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


def plus_minus(text: str) -> list[str]:
    """Each ± stands for two answers."""
    pieces = text.split("±")
    if len(pieces) > 4:
        raise Unreadable
    return [
        "".join(itertools.chain(*zip(pieces, [*signs, ""])))
        for signs in itertools.product("+-", repeat=len(pieces) - 1)
    ]
