"""The tree of an answer's parts, and when two trees mean the same.

Leaves with a value are compared by their values at fixed points (expression.py), other leaves by their text.
"""

import functools
import re
from dataclasses import dataclass

from nanoredi.grader.expression import Expression
from nanoredi.grader.numbers import add, close, divide, is_real
from nanoredi.grader.symbols import GENERAL, LETTERS, NEGATIVE, WHOLE

# A single name: x, S_{10}, \\theta, AB, \\angle ABC, [ABC], \\bar{AB}, f(x), P(A|B), \\max f, The area.
_INDEX = r"(?:_\{(?![^{}]*\w[+-])[^{}]*\})?"  # a_{n+1} is no single name
LETTER = rf"(?:\\(?:{'|'.join(LETTERS)}) ?|[A-Za-z]){_INDEX}"
_ARGUMENT = rf"(?:{LETTER}|-?[0-9]+|[A-Z]+|[A-Za-z]{{3,}}(?: \w+)*)"
NAME = (
    rf"(?:(?:m ?)?\\(?:angle|triangle|odot|max|min|deg|dim) ?)?(?:\\?(?:max|min)|{LETTER}|[A-Z]{{2,}}{_INDEX}"
    rf"|(?!arc|sqrt|sinh|cosh|tanh|(?:[Ee]ven|[Cc]omposite|[Pp]rimes?)\b)[A-Za-z]{{4,}}(?: [A-Za-z]+){{0,4}})"
    rf"(?:\({_ARGUMENT}(?:[,|]{_ARGUMENT})*\))?|\[[A-Z]+\]|\\bar\{{[A-Z]{{2,}}\}}"
)


def points_for(*expressions: Expression) -> list[int]:
    """The points at which expressions must agree."""
    tokens = {token for one in expressions for token in one.tokens}
    return [*WHOLE] if tokens & {"⌊", "⌈"} else [*GENERAL, *(NEGATIVE if "abs" in tokens else [])]


def agree(a: Expression, b: Expression) -> bool:
    """Do both have the same value at every point?"""
    pairs = ((a.at(point), b.at(point)) for point in points_for(a, b))
    return all(x is not None and y is not None and close(x, y) for x, y in pairs)


@dataclass
class Reading:
    """A node of the tree. Its kind is "value", "text", "list", "system" (named values), "cases", "matrix", "row",
    "base", "time", "ratio", a relation ("=", "<", "≤", "≤<", ...), "≠", "∨" or a tuple's two brackets such as "[)"."""

    kind: str
    text: str  # the plain string
    parts: tuple["Reading", ...] = ()  # the nodes below
    expression: Expression | None = None  # only of a value
    bare: "Reading | None" = None  # a relation's value, 5 or an interval; (1,2) for (x,y)=(1,2); a time's ratio
    name: str = ""  # x for x = 5, x < 5, x ≡ 5 (mod 7); for a time am, pm or nothing
    braces: bool = False  # whether it was in braces, as a set is


def same(a: Reading, b: Reading) -> bool:
    """Do two trees mean the same?"""
    if a.kind == b.kind in ("=", "<", "≤") and (a.kind == "=" and match(a.parts, b.parts) or proportional(a, b)):
        return True
    # x and y, f(2) and f(3), am and pm are different, but y may be f(x), and x may be t.
    if a.name != b.name and re.fullmatch(r"(?s)[x-z] [x-z]|[ap]m .m|(.[^(_]*)[(_].* \1[(_].*", f"{a.name} {b.name}"):
        return False
    if a.kind == b.kind == "=":  # y = x and f(x) = x give names a value; p = q and r = q are equations between names
        named = a.name and b.name and a.bare and b.bare
        return bool(named) and ("(" in a.name + b.name or not re.fullmatch(NAME, a.bare.text)) and same(a.bare, b.bare)
    if a.text == b.text and a.kind == b.kind:
        return True
    if "system" in (a.kind, b.kind):
        return same_system(a, b)
    if (a.bare or b.bare) and not a.kind == b.kind == "time":
        return same(a.bare or a, b.bare or b)
    if a.kind != b.kind:
        return False
    # These are no products: ACB (not ABC), the number IV and the phrase "is it".
    words = "[A-Z]{3,}/[A-Z]{3,}|[IVX]{2}/[IVX]{2}|[A-Za-z ]*[a-z]{2} [A-Za-z /]*"
    if a.kind == "value" and agree(a.expression, b.expression) and not re.fullmatch(words, f"{a.text}/{b.text}"):
        return True
    if a.kind == "text" or re.fullmatch("[A-Za-z ]{2,}", a.text):
        return word(a.text) == word(b.text)  # a short word was read as a product
    if a.kind in ("list", "cases", "≠", "∨"):
        return match(a.parts, b.parts)
    return len(a.parts) == len(b.parts) > 0 and all(map(same, a.parts, b.parts))


@functools.lru_cache(maxsize=64)
def word(text: str) -> str:
    """A text without spaces, a word's case and plural, a sum's letter, braces around one thing; 5 mod 4 is 1 mod 4."""
    if re.fullmatch(r"[A-Za-z ,.'-]+", text) and re.search("[A-Za-z]{4}", text):  # a phrase; "team B wins" too
        text = re.sub(r"^(?:(?:an?|the|all|its) )+|(?<=[a-z]{3}[^s])s\b", "", text.lower())
    any_case = r"(?<![\\A-Za-z])(?:[A-Z]?[a-z]{2,}|[A-Z]{3,}|N[Oo])(?![A-Za-z])"
    text = re.sub(any_case, lambda found: found[0].lower(), text)
    for run in re.finditer(r"\\(?:sum|prod)_\{([a-z])=", text):
        text = re.sub(rf"(?<![A-Za-z\\]){run[1]}(?![A-Za-z])", "ζ", text)
    text = re.sub(r"\(mod([^()]+)\)", r"mod\1", re.sub(r"[ °]", "", text))
    text = re.sub("^([+-]?[0-9]+)mod([1-9][0-9]*)$", lambda one: f"{int(one[1]) % int(one[2])}mod{one[2]}", text)
    return re.sub(r"\{(\w|∞|\\[A-Za-z]+)\}", r"\1", text)


def distinct(nodes: list[Reading]) -> list[Reading]:
    """The nodes without those that are the same as an earlier one."""
    return [node for i, node in enumerate(nodes) if not any(same(node, other) for other in nodes[:i])]


def match(left: tuple[Reading, ...], right: tuple[Reading, ...]) -> bool:
    """Can the parts be paired off, in any order, each with one that is the same?"""
    rest = list(right)
    for part in left:
        twin = next((i for i, other in enumerate(rest) if same(part, other)), None)
        if twin is None:
            return False
        del rest[twin]
    return not rest


def same_system(a: Reading, b: Reading) -> bool:
    """x = 1, y = 2 against the same names, other names, (1, 2) or 1, 2, each in the order of its names; against 1, 2
    also in the order in which it is written. Values of one name, x_1 = 1, x_2 = 2, and a set have no order."""
    if a.kind != b.kind and (a.bare or b.bare) and same(a.bare or a, b.bare or b):  # also (r, t) = (1, 2) as written
        return True
    system, other = (a, b) if a.kind == "system" else (b, a)
    names, others = ({part.name for part in one.parts} - {""} for one in (system, other))
    bases = [{name.partition("_")[0] for name in some} for some in (names, others)]
    if other.kind == "list" and (others or other.braces or len(bases[0]) == 1):
        alike = len(bases[0]) == len(bases[1]) if others else not other.braces or names.isdisjoint("xyz")  # no point
        return alike and match(a.parts, b.parts)
    if other.kind not in ("system", "()", "list") or len(a.parts) != len(b.parts) or names != others and names & others:
        return False
    in_order = [sorted(one.parts, key=order) if one.kind == "system" else one.parts for one in (a, b)]
    return other.kind == "list" and all(map(same, a.parts, b.parts)) or all(map(same, *in_order))


def order(part: Reading) -> list[tuple[int, str]]:
    """A sort key that puts x_2 before x_10 and r before θ."""
    pieces = re.findall("([0-9]{1,9})|([^0-9]+)", part.name.replace("\\", "~"))
    return [(int(digits or -1), text) for digits, text in pieces]


def proportional(a: Reading, b: Reading) -> bool:
    """Are two relations multiples of each other, 2x + y = 5 and y = 5 - 2x? An inequality's factor is positive."""
    sides = [part.expression for part in (*a.parts, *b.parts)]
    if len(sides) != 4 or None in sides:
        return False
    table = [[side.at(point) for side in sides] for point in points_for(*sides)]
    if any(None in values for values in table):
        return False
    try:
        ratios = [divide(add(p, -q), add(r, -s)) for p, q, r, s in table]
    except ArithmeticError:
        return False
    allowed = bool(ratios[0]) if a.kind == "=" else is_real(ratios[0]) and ratios[0] > 0
    varies = any(not close(x, y) for values in table[1:3] for x, y in zip(table[0], values))
    return allowed and varies and all(close(ratio, ratios[0]) for ratio in ratios)
