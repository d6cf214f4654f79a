"""The value of a mathematical expression at a sample point, for the grader.

A value is exact (a Fraction) until a root, pi or a function makes it a complex float. Letters stand for fixed
pseudo-random numbers, so that an expression with letters has a value too. Every size, depth and exponent is bounded,
and nothing is
executed: the parser below is all there is. What it reads is the grader's plain string, not LaTeX as it comes.
"""

import cmath
import math
import random
import re
from collections.abc import Callable
from fractions import Fraction

MAX_DEPTH = 20  # brackets, or powers and functions without brackets, inside each other
MAX_EXPONENT = 2_000
MAX_BITS = 10_000  # of an exact value; keeps every product and gcd under a millisecond

Number = Fraction | float | complex


class Unreadable(Exception):
    """The text is nothing that we know: compare it as a string."""


def value_at(text: str, point: int) -> Number:
    """The value of an expression where its letters stand for the numbers of sample point 0 or 1.

    Raises:
        Unreadable, ArithmeticError, ValueError: when it has none, or none within the bounds.
    """
    return _Evaluator(text, point).value()


FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x),
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "exp": cmath.exp,
    "ln": cmath.log,
    "log": cmath.log,
}
LETTERS = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell".split()
)
BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|"}
CONSTANTS = {"pi": math.pi, "π": math.pi, "e": math.e, "i": 1j}
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?")
TOKEN = re.compile(NUMBER.pattern + r"|\\?[A-Za-z]+|[^ ]")


def tokens_of(text: str) -> list[str]:
    """Names without their backslash; letters side by side are a product, unless so many that they are a word. "" ends
    the list."""
    tokens = []
    for found in TOKEN.finditer(text):
        token = found[0]
        if not (token.isascii() and token.isalpha()) or token in FUNCTIONS or token in ("sqrt", "pi"):
            tokens.append(token[1:] if len(token) > 1 and token[0] == "\\" else token)
        elif len(token) > 3:
            raise Unreadable
        else:
            tokens += token
    return [*tokens, ""]


class _Evaluator:
    """expression = term (+|- term)...; term = factor ([*|/] factor)...; factor = atom [!] [^ exponent]

    Implicit products bind like written ones, from left to right: 1/2x is (1/2)x.
    """

    def __init__(self, text: str, point: int):
        self.tokens, self.point, self.position, self.depth = tokens_of(text), point, 0, 0

    def value(self) -> Number:
        result = self.expression()
        if self.peek():
            raise Unreadable
        return result

    def peek(self) -> str:
        return self.tokens[self.position]

    def next(self) -> str:
        token = self.peek()
        self.position += token != ""  # the end stays where it is
        return token

    def accept(self, token: str) -> bool:
        return self.peek() == token and bool(self.next())

    def nested(self, rule: Callable[[], Number]) -> Number:
        """Every recursion goes through here."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        result = rule()
        self.depth -= 1
        return result

    def expression(self) -> Number:
        result = self.sign() * self.term()
        while self.peek() in ("+", "-"):
            result = bounded(result + self.sign() * self.term())
        return result

    def sign(self) -> int:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.next() == "-" else 1
        return sign

    def term(self) -> Number:
        result = self.factor()
        while True:
            if self.accept("*"):
                result = bounded(result * (self.sign() * self.factor()))
            elif self.accept("/"):
                result = bounded(result / (self.sign() * self.factor()))
            elif self.at_factor():
                result = bounded(result * self.factor())
            else:
                return result

    def at_factor(self) -> bool:
        """Does an implicit product go on here? A number goes on only after a bracket: (n-2)2^n, but not 3 4."""
        token = self.peek()
        return (
            token.isalpha()
            or token in ("(", "[", "{")
            or (token[:1].isdigit() and self.tokens[self.position - 1] == ")")
        )

    def factor(self) -> Number:
        result = self.atom()
        while self.accept("!"):
            result = Fraction(math.factorial(small(result)))
        return power(result, self.exponent()) if self.accept("^") else result

    def exponent(self) -> Number:
        """Of 2^10 the whole 10, as everyone means it, though LaTeX would raise only the 1."""
        return self.sign() * self.nested(self.factor)

    def atom(self) -> Number:
        token = self.next()
        number = NUMBER.fullmatch(token)
        if number:
            return Fraction(number[1]) * power(Fraction(10), Fraction(number[2] or 0))
        if token in BRACKETS:
            result = self.nested(self.expression)
            if self.next() != BRACKETS[token]:
                raise Unreadable
            return abs(result) if token == "|" else result
        if token == "frac":
            return bounded(self.nested(self.atom) / self.nested(self.atom))
        if token == "binom":
            return Fraction(math.comb(small(self.nested(self.atom)), small(self.nested(self.atom))))
        if token == "sqrt":
            index = small(self.nested(self.atom)) if self.peek() == "[" else 2
            return root(self.nested(self.atom), index)
        return self.function(token) if token in FUNCTIONS else self.symbol(token)

    def function(self, name: str) -> Number:
        base = self.nested(self.atom) if self.accept("_") else None
        exponent = self.exponent() if self.accept("^") else Fraction(1)
        argument = complex(self.nested(self.atom if self.peek() in ("(", "{") else self.product))
        if exponent == -1 and "arc" + name in FUNCTIONS:
            return FUNCTIONS["arc" + name](argument)
        result = FUNCTIONS[name](argument)
        return power(result / cmath.log(base) if base else result, exponent)

    def product(self) -> Number:
        """What a function without brackets takes: factors side by side, up to an operator or another function."""
        result = self.factor()
        while self.at_factor() and self.peek() not in FUNCTIONS:
            result = bounded(result * self.factor())
        return result

    def symbol(self, name: str) -> Number:
        if not (name.isalpha() and len(name) == 1 or name in LETTERS or name in CONSTANTS):
            raise Unreadable
        if self.accept("_"):  # clean has put every subscript in braces
            while self.peek() and name[-1] != "}":
                name += self.next()
        if name in CONSTANTS:
            return complex(CONSTANTS[name])
        argument = self.tokens[self.position : self.position + 3]
        if (
            argument[0] == "(" and argument[-1] == ")" and NUMBER.fullmatch(argument[1])
        ):  # I(0) is a value of I, no product
            name += "".join(argument)
            self.position += 3
        scale = (9_000, 1_000)[self.point]  # once small and once large, so that no term of e^{-30t} + 1 drowns at both
        return Fraction(random.Random(f"{name} {self.point}").randrange(1_000, 5_000), scale)


def bits_of(x: Number) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length()) if isinstance(x, Fraction) else 0


def bounded(x: Number) -> Number:
    if bits_of(x) > MAX_BITS or not (isinstance(x, Fraction) or cmath.isfinite(x)):
        raise Unreadable
    return x


def small(x: Number) -> int:
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= 500:
        raise Unreadable
    return int(x)


def power(base: Number, exponent: Number) -> Number:
    n = exponent.numerator if isinstance(exponent, Fraction) and exponent.denominator <= 100 else None
    if n is not None and abs(n) <= MAX_EXPONENT and bits_of(base) * abs(n) <= MAX_BITS:
        result = root(base, exponent.denominator) ** n
    else:
        result = complex(base) ** complex(exponent)
    if result == 0 and base != 0:  # too small for a float, but not nothing
        raise Unreadable
    return bounded(result)


def root(x: Number, n: int) -> Number:
    """The real root where there is one, exact where it is rational."""
    if n == 1:
        return x
    if n % 2 and x.imag == 0 and x.real < 0:
        return -root(-x, n)
    if isinstance(x, Fraction) and x >= 0:
        guess = Fraction(round(x.numerator ** (1 / n)), round(x.denominator ** (1 / n)))
        if guess**n == x:
            return guess
    return (complex(x.real, 0) if x.imag == 0 else x) ** (
        1 / n
    )  # without the sign of a zero, which would choose the branch
