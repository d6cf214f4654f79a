"""Union, intersection and difference of sets: exactly for intervals and numbers, otherwise member by member.

The ends of all intervals cut the line into cells: end 0, the gap after it, end 1, the gap after it, ... A set is a
Python set of cells' numbers (an end's is even), and its intervals are the runs of cells in it.
"""

import itertools

from nanoredi.grader.compare import Reading, distinct, same
from nanoredi.grader.numbers import CONTEXT, Inexact, close, inexact, is_real
from nanoredi.grader.symbols import Unreadable

EMPTY = Reading("text", "∅")


def combine(operands: list[Reading], operators: list[str]) -> list[Reading]:
    """The members of A ∪ B ∖ C, from left to right: disjoint intervals and numbers, or any members of finite sets.
    Raises Unreadable if the operands are neither."""
    sets = [_members(one) for one in operands]
    if "∩" in operators and len(set(operators)) > 1:
        raise Unreadable
    places = [_place(end) for members in sets for one in members for end in _ends(one)]
    of_tuples = any(one.braces and len(_ends(part)) == 2 for one, parts in zip(operands, sets) for part in parts)
    if None not in places and not of_tuples:
        return _intervals(sets, operators)
    result = sets[0]
    for sign, other in zip(operators, sets[1:]):
        if sign == "∪":
            result = [*result, *other]
        elif all(one.braces for one in operands):
            result = [one for one in result if any(same(one, twin) for twin in other) == (sign == "∩")]
        else:
            raise Unreadable
    return distinct(result)


def _members(one: Reading) -> list[Reading]:
    one = one.bare or one
    return [] if one.text == EMPTY.text else list(one.parts) if one.kind == "list" else [one]


def _ends(one: Reading) -> tuple[Reading, ...]:
    return one.parts if one.kind in ("()", "(]", "[)", "[]") and len(one.parts) == 2 else (one,)


def _place(end: Reading) -> Inexact | None:
    """Where on the real line an end is; None if that is not known."""
    if end.text in ("∞", "-∞"):
        return CONTEXT.ninf if end.text[0] == "-" else CONTEXT.inf
    value = end.expression.at(0) if end.kind == "value" and not end.expression.letters else None
    return inexact(value) if value is not None and is_real(value) else None


def _intervals(sets: list[list[Reading]], operators: list[str]) -> list[Reading]:
    ends: list[Reading] = []
    cell = {}  # the cell of each end, by the end's id
    for end in sorted((end for members in sets for one in members for end in _ends(one)), key=_place):
        if not ends or not close(_place(end), _place(ends[-1])):
            ends.append(end)
        cell[id(end)] = 2 * len(ends) - 2

    def cells(one: Reading) -> range:
        low, high = cell[id(_ends(one)[0])], cell[id(_ends(one)[-1])]
        return range(low + (one.kind[0] == "("), high + (one.kind[-1] != ")"))

    result, *others = [{c for one in members for c in cells(one)} for members in sets]
    for sign, other in zip(operators, others):
        result = {"∪": result | other, "∩": result & other, "∖": result - other}[sign]
    parts = []
    for _, run in itertools.groupby(enumerate(sorted(result)), key=lambda pair: pair[1] - pair[0]):
        first, *_, last = [cell for _, cell in run] * 2
        low, high = ends[first // 2], ends[(last + 1) // 2]
        kind = "[("[first % 2] + "])"[last % 2]
        interval = Reading(kind, f"{kind[0]}{low.text},{high.text}{kind[1]}", (low, high))
        parts.append(low if low is high else interval)
    return parts
