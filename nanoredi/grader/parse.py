"""An answer's plain strings (readings.py) to the tree of its parts (compare.py).

The grammar is a set of functions, from the outside in: `several` splits lists and sets, and `one` reads anything else: a
relation, a matrix, a tuple or interval, a number in a base, a time of day, a value, otherwise a text.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from nanoredi.grader import matrices, sets
from nanoredi.grader.compare import LETTER, NAME, Reading, distinct, same
from nanoredi.grader.expression import MAX_DEPTH, NO_VALUE, Budget, Expression
from nanoredi.grader.readings import Details, readings
from nanoredi.grader.sets import EMPTY
from nanoredi.grader.symbols import Unreadable

MAX_PARTS = 100  # of a list
_NODE_WORK = 50

# Other left sides that a bare value may leave out: |S|, \\bar{x}, \\Delta x, f^{-1}(3), f(g(2)), (f+g)(x), P(X=2), E[X].
_QUANTITY = (
    rf"(?:{NAME}|\|(?:{NAME})\||\\(?:bar|hat|Delta) ?\{{?(?:{NAME})\}}?"
    rf"|\w\^\{{-1\}}\(-?\w+\)|\w\(\w\(-?\w+\)\)|\([f-h][∘+*/-]?[f-h]\)\(-?\w+\)"
    r"|(?:[A-Z]|\\?Pr)\([^()]*[=<>≤≥∩∪∧∨][^()]*\)|[A-Z]\[\w+\]|\\?(?:max|min|[A-Z][a-z]+) ?[(\[⦃][^=<>≤≥]*[)\]⦄])"
)
_STANDS_FOR = re.compile(rf"{_QUANTITY}|\\frac\{{{_QUANTITY}\}}\{{{_QUANTITY}\}}")
_NAMES_TUPLE = re.compile(rf"\({LETTER}(?:,{LETTER})+\)")
_WHOLE_SIDE = re.compile(rf"{_NAMES_TUPLE.pattern}|ð_\{{\w+\}}(?:{NAME})?|[A-Za-z]'+(?:\(-?\w+\))?")  # also f'(x)
_COMPUTED = re.compile(r"\\(?:lim|limsup|liminf|sum|prod|i+nt|oint|det|sup|inf) ?(?![A-Za-z])|\bmod\b|⟦vmatrix")
_STACKED = re.compile(r"[^⟦]*⟦(cases|align(?:ed)?|gather(?:ed)?|equation|split)¦([^⟦]*)⟧")
_BASE = re.compile(r"\(?([0-9A-Z]+|[0-9][0-9a-f]+)\)?(?:_\{\(?(?:base)?|\(?(?:in)?base)([0-9]{1,2})\)?\}?")
_TIME = re.compile(r"([0-9]{1,2})(?:(?=[AaPp]\.?[Mm])|:([0-5][0-9]))(?::([0-5][0-9]))?(?:([AaPp])\.?[Mm]\.?)?")
_REALS = {"": "(-∞,∞)", "positive ": "(0,∞)", "negative ": "(-∞,0)", "nonnegative ": "[0,∞)"}
_ALL_REALS = re.compile(rf"(?:the )?(?:set of )?(?:all |any )?({'|'.join(_REALS)})real(?: numbers?|s| [a-z])|ℝ", re.I)
_SUCH_THAT = re.compile(rf"({NAME})(?:∈ℝ)?[|:](.+)")
OPEN, CLOSE = "([{⦃⌊⌈⟦", ")]}⦄⌋⌉⟧"


def read(text: str) -> list[tuple[Reading, Details]]:
    """All that an answer may mean, each with the details that it leaves out; they share one budget of work."""
    reader = _Reader(Budget())
    return [(reader.read(one), details) for one, details in readings(text) if one]


class _Reader:
    """Strings to trees, within one budget of work."""

    def __init__(self, budget: Budget):
        self.budget = budget

    def read(self, text: str) -> Reading:
        with contextlib.suppress(*NO_VALUE):
            self.budget.spend(_NODE_WORK + len(text) // 4)
            if max(itertools.accumulate((char in OPEN) - (char in CLOSE) for char in "." + text)) <= MAX_DEPTH:
                return self.several(text)
        return self.as_text(text)

    def as_text(self, text: str) -> Reading:
        text = ((text[:1] == "{" and inside(text)) or text).strip(" .,;").removeprefix("+")
        name, _, residue = text.partition("≡")  # n ≡ 5 (mod 4) is 5 mod 4
        return Reading("text", residue, name=name) if is_name(name) and "mod" in residue else Reading("text", text)

    def several(self, text: str) -> Reading:
        text, braces = text.strip(" ,;").removesuffix(".").removeprefix("="), ""
        while (inner := inside(text)) is not None and (
            text[0] in "{⦃" or text[0] + text[-1] in ("()", "[]") and len(split(inner, ",;")) == 1
        ):  # brackets that only group
            if text[0] == "⦃" in braces:  # a set of sets
                return Reading("list", f"⦃{text}⦄", (self.read_set(text),), braces=True)
            if not inner.strip():
                return self.as_text("∅")
            if text[0] == "⦃" and (such_that := _SUCH_THAT.fullmatch(inner)):
                node = self.read(such_that[2])
                if node.name == such_that[1]:  # {x | x = 5} is {5}
                    node = replace(node.bare or node, name="", braces=node.kind == "=")
                return node
            braces += text[0].strip("([")
            text = inner
        groups = [split(group, ",")[::2] for group in split(text, ";")[::2]]
        pieces = [piece for group in groups for piece in group]
        pairs = len(groups) > 1 and len(groups[0]) > 1 and len({*map(len, groups)}) == 1  # 1,2;3,4
        nodes = [self.group(group) for group in groups] if pairs else self.members(pieces, "⦃" in braces)
        system = is_system(nodes)
        if not system and (braces or all(one.kind in ("system", "()") for one in nodes)):
            nodes = distinct(nodes)  # a repeated member counts once
        node, *others = nodes
        if others or node.kind == "list" and "⦃" in braces:
            ordered = all(re.fullmatch("[TF]|(?i:true|false|yes|no)", one.text) for one in nodes)  # one a question
            node = Reading("system" if system else "()" if ordered else "list", text, tuple(nodes))
        return replace(node, braces=node.braces or bool(braces))

    def group(self, pieces: list[str]) -> Reading:
        nodes = tuple(map(self.read, pieces))
        return Reading("system" if is_system(nodes) else "()", ",".join(pieces), nodes)

    def members(self, pieces: list[str], of_set: bool) -> list[Reading]:
        """The members of a list. Conditions on one name are one member, like "a=0 or b=0"; x=1,y=2,x=3,y=4 are two."""
        words = {piece.strip()[:1] for piece in pieces} & {"∨", "∧"}
        pieces = [piece.strip(" ∨∧") for piece in pieces]
        # x ≠ 1, 2 says x ≠ 1 and x ≠ 2, and n ≡ 1, 3 (mod 4) says the same as n ≡ 1 (mod 4), n ≡ 3 (mod 4).
        before = re.findall("^.*≠", pieces[0])
        words -= {"∨"} if before and not re.search("[=<>≤≥≠]", pieces[-1]) else set()  # x ≠ 1 or 2 says neither
        after = re.findall(r"\(?mod[^()]+\)?$" if "≡" in pieces[0] else r"^[^≡]*(\(mod[^()]+\))$", pieces[-1])
        pieces = [one if re.search("^$|[=<>≤≥≠]|mod", one) else "".join([*before, one, *after]) for one in pieces]
        parts = [one for piece in pieces for one in each_sign(piece) if one]
        if not 0 < len(parts) <= MAX_PARTS:
            raise Unreadable
        if len(parts) == 1:
            return [self.one(parts[0])]
        if re.search("[<>≤≥≠∈]", "".join(parts)) and (condition := self.condition(parts, words)):
            return [condition]
        nodes = []
        for part in parts:
            node = self.read_set(part) if of_set and part[0] == "⦃" else self.read(part)
            several = node.kind == "system" and part[0] != "(" or node.kind == "list" and len(split(part, "∪∈")) > 1
            nodes += node.parts if several else [node]
        names = [node.name for node in nodes]
        if "∨" in words and is_system(nodes) and len({name.partition("_")[0] for name in names}) > 1:
            return [Reading("∨", ",".join(parts), (Reading("system", ",".join(parts), tuple(nodes)),))]
        size = names.index(names[0], 1) if names[0] in names[1:] else 0
        if size > 1 and names == names[:size] * (len(names) // size) and is_system(nodes[:size]):
            chunks = [tuple(nodes[i : i + size]) for i in range(0, len(nodes), size)]
            return [Reading("system", ",".join(node.text for node in chunk), chunk) for chunk in chunks]
        return nodes

    def read_set(self, text: str) -> Reading:
        """A set that is a member of another one; it remains a set even with a single member."""
        node = self.read(text)
        return node if node.kind == "list" or node.text == EMPTY.text else Reading("list", text, (node,))

    def condition(self, parts: list[str], words: set[str]) -> Reading | None:
        """Conditions on one name as a set: with "and" all hold, with "or" one does, with commas all do if they can."""
        names = [[side for side in split(part, "=<>≤≥≠∈")[::2] if is_name(side)] for part in parts]
        signs = "∪" if "∨" in words else "∩" if "∧" in words else "∩∪"
        for sign in signs if len(names[0]) == 1 and all(one == names[0] for one in names) else "":
            with contextlib.suppress(Unreadable):
                node = self.union(sign.join(parts), [piece for part in parts for piece in (part, sign)][:-1])
                if (node.text != EMPTY.text or "∧" in words) and not any(part.kind == "≠" for part in node.parts):
                    return replace(node, name=names[0][0])
        return Reading("∨", ",".join(parts), tuple(map(self.read, parts))) if "∨" in words else None

    def one(self, text: str) -> Reading:
        """Anything but a list: a relation, union, matrix, base, time, tuple, ratio or value."""
        members = split(text, "∈")
        if len(members) == 3 and (is_name(members[0]) or _NAMES_TUPLE.fullmatch(members[0])):
            return self.read(members[2])
        if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{1,2}/[0-9]{1,2}/(?:19|20)[0-9]{2}", text):  # a date
            raise Unreadable
        if reals := _ALL_REALS.fullmatch(text.replace("non-", "non")):
            return self.read(_REALS[(reals[1] or "").lower()])
        exact = split(text, "≈")[::2]  # x ≈ 3.2 says 3.2, √2 ≈ 1.4 says √2
        if len(exact) > 1:
            return self.read(exact[1] if not exact[0] or is_name(exact[0]) else exact[0])
        pieces = split(text, "∪∩∖")
        sides = split(text, "=<>≤≥≠")
        if len(pieces) > 1 and (len(sides) == 1 or all(re.search("[=<>≤≥≠∈]", piece) for piece in pieces[::2])):
            return self.union(text, pieces)
        if len(sides) > 1:
            return self.relation(text, sides[::2], sides[1::2])
        if "⟦" in text:
            return self.matrix(text)
        if base := _BASE.fullmatch(text.replace(" ", "")):
            return Reading("base", f"{base[1].lstrip('0').upper()}_{base[2]}")
        if time := _TIME.fullmatch(text.replace(" ", "")):
            return self.time(time, text)
        inner = inside(text) or ""
        parts = split(inner, ";" if ";" in inner and "," not in inner else ",")[::2]
        if len(parts) > 1 and text[0] in "([":
            return Reading(text[0] + text[-1], text, tuple(map(self.read, parts)))
        ratio = split(text, ":")[::2]
        if len(ratio) > 2:
            return Reading("ratio", text, tuple(self.read(f"({part})/({ratio[0]})") for part in ratio))
        return Reading("value", text, expression=Expression("/".join(f"({part})" for part in ratio), self.budget))

    def union(self, text: str, pieces: list[str]) -> Reading:
        operands, operators = [self.read(piece) for piece in pieces[::2]], pieces[1::2]
        if any(one.kind == "value" and not one.braces for one in operands[: None if "∪" in operators else 1]):
            if {*operators} == {"∪"}:
                return Reading("∨", text, tuple(operands))  # A ∪ B is not A, B
            raise Unreadable
        parts = sets.combine(operands, operators)
        return Reading("list", text, tuple(parts)) if len(parts) > 1 else parts[0] if parts else self.as_text("∅")

    def time(self, time: re.Match, text: str) -> Reading:
        """A time of day as seconds from midnight or noon, with am or pm as its name; 10:30 may also be a ratio."""
        hour, minute, second = (int(part or 0) for part in time.groups()[:3])
        half = f"{time[4]}m".lower() if time[4] else "pm" if hour >= 12 else "am" if hour == 0 else ""
        ratio = None if time[3] or time[4] or minute < 10 else self.read(text.replace(":", "/"))
        return Reading("time", str((hour % 12 * 60 + minute) * 60 + second), bare=ratio, name=half)

    def matrix(self, text: str) -> Reading:
        if stacked := _STACKED.fullmatch(text):
            return self.stacked(*stacked.groups())
        text = matrices.without_determinants(text)
        if "⟦" not in text:
            return self.one(text)
        grid = matrices.evaluate(split(text, "-+"))
        rows = tuple(Reading("row", "&".join(row), tuple(map(self.read, row))) for row in grid)
        return Reading("matrix", text, rows)

    def stacked(self, kind: str, body: str) -> Reading:
        rows = [row for row in body.split("\\\\") if row.strip()]
        if kind != "cases" or not re.search(r"&|\b(?:if|for|when)\b", body):
            return self.several(",".join(row.replace("&", "").strip(" ,") for row in rows))
        separator = r"[\s,]*(?:&|\b(?:if|for|when)\b)[\s,]*(?:(?:if|for|when)\b)?"
        cells = [re.split(separator, row.replace(" is ", " "), maxsplit=1) for row in rows]
        nodes = tuple(Reading("row", "&".join(row), tuple(self.read(one.strip()) for one in row)) for row in cells)
        return Reading("cases", body, nodes)

    def relation(self, text: str, sides: list[str], signs: list[str]) -> Reading:
        """An equation, or an inequality with its smallest side first and, if it bounds a name, its interval."""
        sides[0] = sides[0] or "\\zeta"  # > 5 is x > 5 and y > 5
        if set(signs) == {"="}:
            return self.equation(text, sides)
        if signs == ["≠"] and is_name(sides[0]):
            node = Reading("≠", text, (self.read(sides[1]),))
            with contextlib.suppress(Unreadable):
                node = self.union(text, ["ℝ", "∖", sides[1]])
            return replace(node, name=sides[0])
        if set(signs) <= {">", "≥", "="}:
            sides, signs = sides[::-1], ["<≤="[">≥=".index(sign)] for sign in signs[::-1]]
        node = Reading("".join(signs), text, tuple(map(self.read, sides)))
        if set(signs) <= {"<", "≤"}:
            if len(sides) == 2 and is_name(sides[0]) != is_name(sides[1]):
                sides, signs = (["-∞", *sides], ["<", *signs]) if is_name(sides[0]) else ([*sides, "∞"], [*signs, "<"])
            if len(sides) == 3 and is_name(sides[1]) and not any(mentions(part, sides[1]) for part in node.parts):
                brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
                node.name, node.bare = sides[1], self.read(f"{brackets[0]}{sides[0]},{sides[2]}{brackets[1]}")
        return node

    def equation(self, text: str, sides: list[str]) -> Reading:
        """x = 5, 5 = x and x = 10/2 = 5 give the name x the bare value 5; m + n = 5, a:b = 5 and a limit that equals 5
        have a bare value and no name; 0.5 = 1/2 is a value; 2x + y = 5 is only itself."""
        parts = tuple(map(self.read, sides))
        names = sides[0][1:-1].split(",") if _NAMES_TUPLE.fullmatch(sides[0]) else []
        if len(sides) == 2 and parts[1].kind == "()" and len(parts[1].parts) == len(names):
            named = [f"{name}={value.text}" for name, value in zip(names, parts[1].parts)]
            return replace(self.group(named), bare=parts[1])
        chained = _NAMES_TUPLE.fullmatch(f"({','.join(sides[:-1])})")  # x = y = 1
        if chained and not is_name(sides[-1]):
            return self.group([f"{name}={sides[-1]}" for name in sides[:-1]])
        node = Reading("=", text, parts)
        if re.fullmatch("[A-Z]{2,}", sides[-1]) and is_name(sides[0]):  # MR = SRMC has no value
            return node
        if len(sides) == 2 and is_name(sides[1]) and is_constant(parts[0]):  # 5 = x
            sides, parts = sides[::-1], parts[::-1]
        node.name = sides[0] if is_name(sides[0]) else ""
        named = list(itertools.takewhile(stands_for, sides[: -1 if is_constant(parts[-1]) else 1]))
        if len(sides) > 2 and not is_constant(parts[0]) and all(map(is_constant, parts[1:])):  # m + 2n = 1 + 4 = 5
            named = sides[:1]
        values = [one for side, one in zip(sides[len(named) :], parts[len(named) :]) if not is_uncomputed(side, one)]
        if values[-1:] == [parts[-1]] and all(same(x, y) for x, y in itertools.pairwise(values)):
            node.bare = None if mentions(parts[-1], sides[0]) else parts[-1]
        return node


def is_system(nodes: list[Reading] | tuple[Reading, ...]) -> bool:
    """Is each an equation or inequality for a name, x = 1 or x > 1, and each for a different one?"""
    names = {node.name for node in nodes if node.kind != "time"}
    return len(names) == len(nodes) > 1 and "" not in names


def mentions(part: Reading, name: str) -> bool:
    """Is the name also in the value, without an index? x = 2x does not give x the value 2x."""
    tokens = part.expression.tokens if part.expression and part.text != name else []
    return any(token == name.strip("\\ ") and after != "_" for token, after in itertools.pairwise(tokens))


def is_constant(part: Reading) -> bool:
    return all(map(is_constant, part.parts)) if part.parts else bool(part.expression and not part.expression.letters)


def is_name(text: str) -> bool:
    return len(text) < 100 and bool(re.fullmatch(NAME, text.strip()))


def stands_for(text: str) -> bool:
    """Is it a left side that a bare answer may leave out: a name, f'(x), or a sum, ratio, union or tuple of names?"""
    pieces = split(text, "-+:/∪∩∖")
    alike = len(set(pieces[1::2])) < 2 or set(pieces[1::2]) == {"+", "-"}
    return alike and all(map(_STANDS_FOR.fullmatch, pieces[::2])) or bool(_WHOLE_SIDE.fullmatch(text))


def is_uncomputed(side: str, part: Reading) -> bool:
    """Is it just a limit, a sum or the like that is not computed here, so that the other side is its value?"""
    alone = len(split(side.lstrip("-"), "-+")) == 1 or re.search(r"\\(?:i+|oi)nt(?![A-Za-z]).*d ?\\?[a-z]+$", side)
    return part.kind == "text" and bool(_COMPUTED.search(side)) and bool(alone)


def inside(text: str) -> str | None:
    """The text without its first and last characters if these are a pair of brackets."""
    depths = list(itertools.accumulate((char in OPEN) - (char in CLOSE) for char in text))
    return text[1:-1] if len(text) > 1 and min(depths[:-1]) > 0 and depths[-1] == 0 else None


def split(text: str, separators: str) -> list[str]:
    """Pieces alternating with the separators between them, which count only outside brackets."""
    pieces, start, depth = [], 0, 0
    for found in re.finditer(f"[{separators}()\\[\\]{{}}⦃⦄⌊⌋⌈⌉⟦⟧]", text):
        depth += (found[0] in OPEN) - (found[0] in CLOSE)
        if depth < 0:
            raise Unreadable
        if depth == 0 and found[0] in separators:
            pieces += [text[start : found.start()], found[0]]
            start = found.end()
    return [*pieces, text[start:]]


def each_sign(text: str) -> Iterator[str]:
    """The answers that ± stands for: two for each sign, but two in all with a ∓, since then all signs change together."""
    pieces = re.split("([±∓])", text) if re.search("[±∓]", re.sub("⦃[^⦃⦄]*⦄", "", text)) else [text]
    if len(pieces) > 9:
        raise Unreadable
    signs = ["+-" if mark == "±" else "-+" for mark in pieces[1::2]]
    for choice in zip(*signs) if "-+" in signs else itertools.product(*signs):
        yield "".join(itertools.chain(*itertools.zip_longest(pieces[::2], choice, fillvalue="")))
