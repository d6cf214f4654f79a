"""The symbols of an expression, for the grader: how a text is split into tokens, and which numbers letters stand for.

What the grader cannot compute, such as the derivative x', is a fixed pseudo-random function of its arguments.
"""

import functools
import random
import re
import unicodedata
from fractions import Fraction

from nanoredi.grader.numbers import CONTEXT, FUNCTIONS, Number, inexact

# A point determines which numbers the letters stand for: small, medium (near 1) and large ones, so that every term of
# e^{-30t} + 1 and x^{2023} + x^{1000} + 1 counts at some point. Negative points are used only with absolute values, as
# sqrt(x^2) means x wherever x is a length; at the first point all letters are negative, at the others some. With floor
# and ceil, letters are whole numbers, as they mostly are there; t to z are also fractions.
GENERAL, WHOLE, NEGATIVE = range(3), range(4, 16), range(16, 22)
_SCALES = (9_000, 100_000, 300)

GREEK = {unicodedata.name(c).split()[-1].lower().replace("lamda", "lambda"): c for c in "αβγδεζηθικλμνξρστυφχψω"}
LETTERS = {*GREEK, *map(str.title, GREEK), "hbar", "ell"}
SEVERAL = {"max", "min", "gcd", "lcm"}
_NAMES = sorted({*FUNCTIONS, *SEVERAL, "sqrt", "cbrt", "pi", "mod"} - {"tg"}, key=len, reverse=True)
_NAME = re.compile(rf"(?:{'|'.join(_NAMES)})(?=.?$)|")  # with at most one letter after it
_WORDS = set("if is of to for the not all any are has but".split())  # these are no products of letters
BRACKETS = {"(": ")", "[": "]", "{": "}", "abs": "|", "⌊": "⌋", "⌈": "⌉"}
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?")
_TOKEN = re.compile(NUMBER.pattern + r"|\\?[A-Za-z]+|[^ ]")


class Unreadable(Exception):
    """The text has no form that the grader knows; it is compared as a string."""


def tokens_of(text: str) -> list[str]:
    """Names without their backslash; adjacent letters as a product, unless there are so many that they are a word; the
    bar that opens an absolute value as "abs"; "" at the end."""
    tokens: list[str] = []
    phrase = " " in text or not re.search(r"[0-9\\^]", text)
    bars = [False]  # for the outermost level and each open bracket: is an absolute value open in it?
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token == "|":
            after_value = bool(tokens) and (tokens[-1][-1].isalnum() or tokens[-1] in ")]}|!'⌋⌉π°")
            if not (bars[-1] and after_value):
                token = "abs"
            bars[-1] = token == "abs"
        elif token in BRACKETS:
            bars.append(False)
        elif token in BRACKETS.values():
            bars[-2:] = bars[-2:-1] or [False]
        if token[0] == "\\" and len(token) > 1:
            tokens.append(token[1:])
        elif token.isascii() and token.isalpha() and token != "abs":
            name = _NAME.match(token)[0]
            letters = token[len(name) :]
            if len(letters) > 3 and (len(letters) > 6 or phrase) or token in _WORDS:
                raise Unreadable
            tokens += [*([name] if name else []), *letters]
        else:
            tokens.append(token)
    return [*tokens, ""]


@functools.lru_cache(maxsize=4096)
def letter(name: str, point: int) -> Fraction:
    """The number that a letter stands for at a point."""
    rng = random.Random(f"{name} {point}")
    if point in WHOLE:
        parts = 100 if name[0] in "tuvwxyz" and point % 2 else 1  # these need not be whole
        return Fraction(rng.randrange(2 * parts, 30 * parts), parts)
    if point in GENERAL:
        return Fraction(rng.randrange(1_000, 5_000), _SCALES[point]) + (point == 1)
    negative = point == NEGATIVE[0] or sum(map(ord, name)) >> (point - NEGATIVE[1]) & 1
    return Fraction(rng.randrange(1_000, 5_000), -1_000 if negative else 1_000)


def digits(x: Number) -> str:
    """The same text for numbers that are close."""
    z = inexact(x)
    return CONTEXT.nstr(z.real, 25) + " " + CONTEXT.nstr(z.imag, 25)


def opaque(*names: str) -> Fraction:
    """A fixed pseudo-random function."""
    return Fraction(random.Random(" ".join(names)).randrange(2**40, 2**43), 2**40)
