"""Exact fractions and complex numbers of 60 digits (mpmath), with the functions that answers contain.

The grader compares values, and a double's 16 digits would call 1.4142135623730951 and the root of 2 equal. A number is
a Fraction for as long as possible. A sum that cancels to rounding noise is set to 0, so that sin(pi) is 0 and
(1 + i)^4 is -4 and real.

Only the functions below may combine a Fraction with an mpmath number: Python's own operators would make floats of both.
"""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import mpmath

CONTEXT = mpmath.MPContext()  # a separate one, so that the process-wide precision does not change
CONTEXT.dps = 60
_REAL, _COMPLEX = CONTEXT.mpf, CONTEXT.mpc
Inexact: TypeAlias = mpmath.mpf | mpmath.mpc
Number: TypeAlias = Fraction | Inexact

_CLOSE = _REAL("1e-40")  # relative tolerance: a few hundred operations on 60 digits leave more than 40
_NOISE = _REAL("1e-50")
_LARGEST_ARGUMENT = 10**12
_LARGEST_BITS = 17_000  # before or after the point, about 10^5000
PI, E, IMAGINARY = +CONTEXT.pi, CONTEXT.exp(1), _COMPLEX(0, 1)
inexact: Callable[[Number | int], Inexact] = CONTEXT.convert


def is_real(x: Number) -> bool:
    return not isinstance(x, _COMPLEX)


def close(x: Number, y: Number) -> bool:
    """Are they equal, exactly if both are exact, otherwise to 40 digits?"""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = inexact(x), inexact(y)
    return x == y or abs(x - y) <= _CLOSE * min(abs(x), abs(y))  # ∞ is close only to itself


def add(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x + y
    x, y = inexact(x), inexact(y)
    return tidy(x + y, max(abs(x), abs(y)))


def multiply(x: Number, y: Number) -> Number:
    return x * y if isinstance(x, Fraction) and isinstance(y, Fraction) else tidy(inexact(x) * inexact(y))


def divide(x: Number, y: Number) -> Number:
    return x / y if isinstance(x, Fraction) and isinstance(y, Fraction) else tidy(inexact(x) / inexact(y))


def power(z: Inexact, w: Inexact) -> Inexact:
    if not z:
        return z if w.real > 0 else z / z  # 0^0 and 0^-1 have no value
    return tidy(_apply("exp", w * log(z)))


def root(z: Inexact, n: int) -> Inexact:
    """The principal root; for a negative number and an odd n the real one."""
    if is_real(z) and (z >= 0 or n % 2):
        size = CONTEXT.root(abs(z), n)
        return size if z >= 0 else -size
    return power(z, inexact(Fraction(1, n)))


def whole_root(x: int, n: int) -> int | None:
    """The nth root of x >= 0 if it is a whole number."""
    whole = math.isqrt(x) if n == 2 else int(CONTEXT.nint(CONTEXT.root(x, n)))
    return whole if whole**n == x else None


def log(z: Inexact) -> Inexact:
    return tidy(CONTEXT.log(z), 1)


def _apply(name: str, z: Inexact) -> Inexact:
    if abs(z) > _LARGEST_ARGUMENT:  # an exponential would be huge, and a sine's angle has no digits left
        raise ArithmeticError("out of bounds")
    return getattr(CONTEXT, name)(z)


sin, cos = (lambda z, name=name: tidy(_apply(name, z), max(1, abs(z))) for name in ("sin", "cos"))
FUNCTIONS: dict[str, Callable[[Inexact], Inexact]] = {"sin": sin, "cos": cos, "ln": log, "log": log}
FUNCTIONS |= {"tan": lambda z: sin(z) / cos(z), "cot": lambda z: cos(z) / sin(z), "exp": lambda z: _apply("exp", z)}
FUNCTIONS |= {"sec": lambda z: 1 / cos(z), "csc": lambda z: 1 / sin(z), "lg": lambda z: log(z) / CONTEXT.log(10)}
FUNCTIONS |= {"arccot": lambda z: PI / 2 - CONTEXT.atan(z), "cis": lambda z: _apply("exp", IMAGINARY * z)}
for _name in "sin cos tan sinh cosh tanh sec csc sech csch coth".split():
    FUNCTIONS |= dict.fromkeys([f"{arc}{_name}" for arc in ("arc", "ar", "a")], getattr(CONTEXT, "a" + _name))
    FUNCTIONS.setdefault(_name, functools.partial(_apply, _name))
for _short, _name in zip("tg ctg arctg arcctg".split(), "tan cot arctan arccot".split()):
    FUNCTIONS[_short] = FUNCTIONS[_name]


def tidy(z: Inexact, size: Inexact | int = 0) -> Inexact:
    """z without parts that are rounding noise relative to a size, its own or a larger one; real if its imaginary part
    is noise. Raises ArithmeticError if it is too large, too small or not a number."""
    re, im = (z, 0) if is_real(z) else (z.real, z.imag)
    noise = _NOISE * max(size, abs(re), abs(im))
    re, im = (0 if abs(part) <= noise else part for part in (re, im))
    if not all(CONTEXT.isfinite(part) and abs(CONTEXT.mag(part)) < _LARGEST_BITS for part in (re, im) if part):
        raise ArithmeticError("out of bounds")
    return _COMPLEX(re, im) if im else inexact(re)
