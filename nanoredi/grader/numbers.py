"""Complex numbers of 60 digits on the standard library's decimal, with the functions that answers contain.

The grader compares values, and a double's 16 digits would call 1.4142135623730951 and the root of 2 equal. Sums that
cancel to rounding are set to 0, so that sin(pi) is 0 and (1 + sqrt 2)(1 - sqrt 2) is -1 and real.
"""

from collections.abc import Callable
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Underflow
from fractions import Fraction

# Decimal's own operators round to the thread's context, of 28 digits: every operation below names this one.
_DIGITS = 60
# The exponent's bound makes e^(e^(10)) an Overflow, an ArithmeticError, at once.
CONTEXT = Context(prec=_DIGITS, Emin=-5_000, Emax=5_000, traps=[DivisionByZero, InvalidOperation, Overflow, Underflow])
CLOSE = Decimal("1e-40")  # relative; what a few hundred operations and sin's reduction leave of 60 digits
_NOISE = Decimal("1e-50")
_TINY = Decimal("1e-65")  # a series ends with a term below
_LARGEST_ANGLE = Decimal(10) ** 12
_ANGLE_NOISE = Decimal("1e-45")  # what 60 digits leave of such an angle
_ZERO, _ONE = Decimal(0), Decimal(1)

_add, _subtract, _multiply, _divide = CONTEXT.add, CONTEXT.subtract, CONTEXT.multiply, CONTEXT.divide


class Precise:
    """A complex number re + im i; a Fraction or an int may stand on the other side of + - * /.

    Raises:
        ArithmeticError: from any operation without a value, or with one out of bounds.
    """

    __slots__ = ("re", "im")

    def __init__(self, re: Decimal, im: Decimal = _ZERO):
        self.re, self.im = re, im

    def __add__(self, other: "Number") -> "Precise":
        other = precise(other)
        return Precise(_sum(self.re, other.re), _sum(self.im, other.im))

    def __neg__(self) -> "Precise":
        return Precise(self.re.copy_negate(), self.im.copy_negate())

    def __sub__(self, other: "Number") -> "Precise":
        return self + -precise(other)

    def __rsub__(self, other: "Number") -> "Precise":
        return precise(other) + -self

    def __mul__(self, other: "Number") -> "Precise":
        other = precise(other)
        if not self.im and not other.im:
            return Precise(_multiply(self.re, other.re))
        return Precise(
            _sum(_multiply(self.re, other.re), _multiply(self.im, other.im).copy_negate()),
            _sum(_multiply(self.re, other.im), _multiply(self.im, other.re)),
        )

    def __truediv__(self, other: "Number") -> "Precise":
        other = precise(other)
        if not other.im:
            return Precise(_divide(self.re, other.re), _divide(self.im, other.re))
        square = _add(_multiply(other.re, other.re), _multiply(other.im, other.im))
        return self * Precise(_divide(other.re, square), _divide(other.im, square).copy_negate())

    def __rtruediv__(self, other: "Number") -> "Precise":
        return precise(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> "Precise":
        if not self.im:
            return Precise(self.re.copy_abs())
        return Precise(CONTEXT.sqrt(_add(_multiply(self.re, self.re), _multiply(self.im, self.im))))


Number = Fraction | Precise


def precise(x: Number | int) -> Precise:
    return x if isinstance(x, Precise) else Precise(_divide(Decimal(x.numerator), Decimal(x.denominator)))


def close(x: Number, y: Number) -> bool:
    """Are they equal: exactly where both are exact, else to CLOSE?"""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = precise(x), precise(y)
    return abs(x - y).re <= _multiply(CLOSE, max(abs(x).re, abs(y).re))


def exp(z: Precise) -> Precise:
    size = CONTEXT.exp(z.re)
    return Precise(size) if not z.im else Precise(size) * _turn(z.im)


def log(z: Precise) -> Precise:
    return Precise(CONTEXT.ln(abs(z).re), _angle(z))


def power(z: Precise, w: Precise) -> Precise:
    if not z.re and not z.im:
        return z if w.re > 0 else z / z  # 0^0 and 0^-1 have no value
    return exp(w * log(z))


def root(z: Precise, n: int) -> Precise:
    """The principal root, and of a negative number the real one where n is odd."""
    if not z.im and (z.re >= 0 or n % 2):
        size = CONTEXT.sqrt(z.re) if n == 2 else _real_root(z.re.copy_abs(), n)
        return Precise(size.copy_sign(z.re))
    return power(z, Precise(_divide(_ONE, Decimal(n))))


def whole_root(x: int, n: int) -> int | None:
    """The nth root of x >= 0 where it is a whole number."""
    size = x ** (1 / n) if x.bit_length() < 40 * n and x.bit_length() < 1_000 else _real_root(Decimal(x), n)
    whole = int(round(size))
    return whole if whole**n == x else None


def sin(z: Precise) -> Precise:
    return (exp(I * z) - exp(-I * z)) / (I + I) if z.im else Precise(_turn(z.re).im)


def cos(z: Precise) -> Precise:
    return (exp(I * z) + exp(-I * z)) / Fraction(2) if z.im else Precise(_turn(z.re).re)


def sinh(z: Precise) -> Precise:
    return (exp(z) - exp(-z)) / Fraction(2)


def cosh(z: Precise) -> Precise:
    return (exp(z) + exp(-z)) / Fraction(2)


def arcsin(z: Precise) -> Precise:
    return -I * log(I * z + root(1 - z * z, 2))


def arctan(z: Precise) -> Precise:
    return Precise(_arctan(z.re)) if not z.im else I / Fraction(2) * (log(1 - I * z) - log(1 + I * z))


FUNCTIONS: dict[str, Callable[[Precise], Precise]] = {
    "sin": sin,
    "cos": cos,
    "tan": lambda z: sin(z) / cos(z),
    "sec": lambda z: 1 / cos(z),
    "csc": lambda z: 1 / sin(z),
    "cot": lambda z: cos(z) / sin(z),
    "cis": lambda z: cos(z) + I * sin(z),
    "arcsin": arcsin,
    "arccos": lambda z: PI / Fraction(2) - arcsin(z),
    "arctan": arctan,
    "asin": arcsin,
    "acos": lambda z: PI / Fraction(2) - arcsin(z),
    "atan": arctan,
    "arccot": lambda z: PI / Fraction(2) - arctan(z),
    "sinh": sinh,
    "cosh": cosh,
    "tanh": lambda z: sinh(z) / cosh(z),
    "exp": exp,
    "ln": log,
    "log": log,
    "lg": lambda z: log(z) / log(Precise(Decimal(10))),
}


def _real_root(x: Decimal, n: int) -> Decimal:
    return CONTEXT.exp(_divide(CONTEXT.ln(x), Decimal(n))) if x else x


def _sum(x: Decimal, y: Decimal) -> Decimal:
    total = _add(x, y)
    return total if total.copy_abs() > _multiply(_NOISE, max(x.copy_abs(), y.copy_abs())) else _ZERO


def _turn(angle: Decimal) -> Precise:
    """cos + i sin of a real angle: reduced to pi/64 or less, Taylor's series, and doubled back six times."""
    if angle.copy_abs() > _LARGEST_ANGLE:
        raise ArithmeticError("no digits are left of so large an angle")
    turns = _divide(angle, _TWO_PI).to_integral_value()
    small = _divide(_subtract(angle, _multiply(turns, _TWO_PI)), Decimal(64))
    minus_square = _multiply(small, small).copy_negate()
    cosine, sine, even, odd, n = _ONE, small, _ONE, small, 1
    while even.copy_abs() > _TINY:
        even = _divide(_multiply(minus_square, even), Decimal(n * (n + 1)))
        odd = _divide(_multiply(minus_square, odd), Decimal((n + 1) * (n + 2)))
        cosine, sine, n = _add(cosine, even), _add(sine, odd), n + 2
    for _ in range(6):
        cosine, sine = (
            _subtract(_multiply(cosine, cosine), _multiply(sine, sine)),
            _multiply(_multiply(2, sine), cosine),
        )
    return Precise(*(x if x.copy_abs() > _ANGLE_NOISE else _ZERO for x in (cosine, sine)))


def _arctan(x: Decimal) -> Decimal:
    """Halved four times by arctan x = 2 arctan(x / (1 + sqrt(1 + x^2))), then Taylor's series."""
    for _ in range(4):
        x = _divide(x, _add(_ONE, CONTEXT.sqrt(_add(_ONE, _multiply(x, x)))))
    minus_square, term, total, n = _multiply(x, x).copy_negate(), x, x, 1
    while term.copy_abs() > _TINY:
        n += 2
        term = _multiply(minus_square, term)
        total = _add(total, _divide(term, Decimal(n)))
    return _multiply(Decimal(16), total)


def _angle(z: Precise) -> Decimal:
    """From the positive real axis, above -pi and up to pi."""
    half_pi = _divide(PI.re, Decimal(2))
    if z.re.copy_abs() < z.im.copy_abs():
        quarter = half_pi.copy_sign(z.im)
        return _subtract(quarter, _arctan(_divide(z.re, z.im)))
    base = _ZERO if z.re >= 0 else PI.re if z.im >= 0 else PI.re.copy_negate()
    return _add(base, _arctan(_divide(z.im, z.re)))


PI = Precise(Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803"))
E = Precise(CONTEXT.exp(_ONE))
I = Precise(_ZERO, _ONE)  # noqa: E741
_TWO_PI = _multiply(Decimal(2), PI.re)
