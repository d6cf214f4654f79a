"""The value of a mathematical expression at fixed points, for the grader.

A value is exact (a Fraction) until a root, pi or a function makes it a complex number of 60 digits (numbers.py).
Letters stand for fixed pseudo-random numbers, so that an expression with letters has a value too, and two expressions
are equal when they agree at every point (symbols.py, compare.py).

Nothing is executed: the parser below is all there is. Depth, sizes and the work on one answer are bounded. It reads
the grader's plain string (latex.py), not raw LaTeX.
"""

import contextlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import TypeGuard

from nanoredi.grader import numbers
from nanoredi.grader.numbers import CONTEXT, FUNCTIONS, Number, add, divide, inexact, multiply
from nanoredi.grader.symbols import BRACKETS, LETTERS, NUMBER, SEVERAL, Unreadable, digits, letter, opaque, tokens_of

MAX_LENGTH = 1_000  # characters; a longer answer is compared as a string
MAX_DEPTH = 20  # nested brackets, or nested powers and functions without brackets
MAX_BITS = 10_000  # in the numerator or denominator of an exact value
MAX_FACTORIAL = 500
MAX_WORK = 10_000  # on one answer, in units of about a microsecond
_ROOT_WORK, _FUNCTION_WORK = 50, 200

NO_VALUE = (Unreadable, ArithmeticError, ValueError)  # raised by Expression


class Budget:
    """The work that one answer may cost, whatever it consists of."""

    left = MAX_WORK

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise Unreadable


class Expression:
    """A text that has a value, at each point another one if it contains `letters`. Raises one of NO_VALUE if it has
    none, or none within the bounds."""

    def __init__(self, text: str, budget: Budget):
        self.tokens, self.budget = tokens_of(text), budget
        evaluator = _Evaluator(self.tokens, 0, budget)
        self._values: dict[int, Number | None] = {0: evaluator.value}
        self.letters = evaluator.letters

    def at(self, point: int) -> Number | None:
        """The value at a point; None if it has none."""
        point = point if self.letters else 0
        if point not in self._values:
            self._values[point] = None  # tried once, since it takes time even if the budget is spent
            with contextlib.suppress(*NO_VALUE):
                self._values[point] = _Evaluator(self.tokens, point, self.budget).value
        return self._values[point]


_CONSTANTS = {"pi": numbers.PI, "π": numbers.PI, "e": numbers.E, "i": numbers.IMAGINARY}
_OPERATORS = {"over", "choose", "mod"}  # between two whole expressions


class _Evaluator:
    """expression = term (+|- term)...; term = factor ([*|/] factor)...; factor = atom [! °] [^ exponent]

    Implicit products bind like written ones, from left to right: 1/2x is (1/2)x.
    """

    def __init__(self, tokens: list[str], point: int, budget: Budget):
        self.tokens, self.point, self.budget = tokens, point, budget
        self.position = self.depth = 0
        self.angles = 0  # how many functions we are inside; only there does ° convert to radians
        self.letters = False
        self.bound: dict[str, Number] = {}  # the current values of letters that sums run over
        self.value = self.expression()
        if self.peek():
            raise Unreadable

    def peek(self) -> str:
        return self.tokens[self.position]

    def next(self) -> str:
        token = self.peek()
        self.position += token != ""  # the end stays where it is
        return token

    def accept(self, token: str) -> bool:
        return self.peek() == token and bool(self.next())

    def expect(self, *tokens: str) -> None:
        if not all(map(self.accept, tokens)):
            raise Unreadable

    def nested(self, rule: Callable[[], Number]) -> Number:
        """Every recursion goes through here."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        result = rule()
        self.depth -= 1
        return result

    def bounded(self, x: Number) -> Number:
        """x, once it is paid for; the cost of an exact product or sum grows with the square of its size."""
        bits = _bits_of(x)
        self.budget.spend(5 + (bits // 100) ** 2 // 30 if isinstance(x, Fraction) else 15)
        if bits > MAX_BITS:
            raise Unreadable
        return x

    def expression(self) -> Number:
        result = self.sign() * self.term()
        while self.peek() in ("+", "-"):
            result = self.sum(result, self.sign() * self.term())
        if self.peek() not in _OPERATORS:
            return result
        operation = {"over": divide, "choose": self.binomial, "mod": self.residue}[self.next()]
        return self.bounded(operation(result, self.nested(self.expression)))

    def sum(self, x: Number, y: Number) -> Number:
        total = self.bounded(add(x, y))
        if not self.letters and (x and numbers.close(total, y) or y and numbers.close(total, x)):
            raise Unreadable  # in e^100 + 1 the 1 is lost to rounding, and the sum would equal e^100
        return total

    def sign(self) -> int:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.next() == "-" else 1
        return sign

    def term(self, operators: tuple[str, ...] = ("*", "/")) -> Number:
        """Factors side by side or with operators between them; an argument without brackets has no operators or functions."""
        result = self.factor()
        while (token := self.peek()) in operators or self.at_factor() and (operators or not self.at_function()):
            self.position += token in operators
            factor = self.sign() * self.factor()
            result = self.bounded((divide if token == "/" else multiply)(result, factor))
        return result

    def at_factor(self) -> bool:
        """Does an implicit product continue here? A number continues one only after a bracket or a !, (n-2)2^n, or as
        the base of a power after a letter, n 2^n; 3 4 is no product."""
        token, before = self.peek(), self.tokens[self.position - 1]
        if token[:1].isdigit():
            return before in ")]}!" or before.isalpha() and self.tokens[self.position + 1] == "^"
        return token in BRACKETS or token.isalpha() and token not in _OPERATORS

    def at_function(self) -> bool:
        """Does a function come next, or brackets with one? cos x (1 + sin x) is a product."""
        start, closing = self.position, BRACKETS.get(self.peek())
        end = self.tokens.index(closing, start) if closing else start
        return not FUNCTIONS.keys().isdisjoint(self.tokens[start : end + 1])

    def factor(self) -> Number:
        result = self.atom()
        while self.accept("!"):
            result = self.factorial(result, step=2 if self.accept("!") else 1)
        if self.accept("^"):
            result = self.power(result, self.exponent())
        if self.accept("°") and self.angles:  # elsewhere it is a unit
            result = multiply(result, numbers.PI / 180)
        return result

    def exponent(self) -> Number:
        """In 2^10 it is 10, as everyone means it, though LaTeX would raise only the 1."""
        return self.sign() * self.nested(self.factor)

    def atom(self) -> Number:
        token = self.next()
        if number := NUMBER.fullmatch(token):
            return multiply(Fraction(number[1]), self.power(Fraction(10), Fraction(number[2] or 0)))
        if token in BRACKETS:
            result = self.nested(self.expression)
            self.expect(BRACKETS[token])
            return abs(result) if token == "abs" else _floor(token, result) if token in "⌊⌈" else result
        if token in ("frac", "binom"):
            operation = divide if token == "frac" else self.binomial
            return self.bounded(operation(self.nested(self.atom), self.nested(self.atom)))
        if token in ("sqrt", "cbrt"):
            index = self.nested(self.atom) if self.peek() == "[" else Fraction(2 if token == "sqrt" else 3)
            return self.power(self.nested(self.atom), 1 / index)
        if token in ("bar", "hat", "tilde"):  # over a letter
            return opaque(token, digits(self.nested(self.atom)))
        if token in SEVERAL:
            return self.several(token)
        if token in ("sum", "prod"):
            return self.repeated(add if token == "sum" else multiply)
        return self.function(token) if token in FUNCTIONS else self.symbol(token)

    def arguments(self) -> list[Number]:
        """The values in brackets, separated by commas."""
        closing = {"(": ")", "[": "]", "⦃": "⦄"}.get(self.next(), "")
        values = [self.nested(self.expression)]
        while self.accept(","):
            values.append(self.nested(self.expression))
        self.expect(closing)
        return values

    def several(self, name: str) -> Number:
        """max(a, b) and the like; with letters, only that the arguments' order does not matter is known."""
        letters, self.letters = self.letters, False
        values = self.arguments()
        variable, self.letters = self.letters, self.letters or letters
        if not variable and name in ("max", "min") and all(map(numbers.is_real, values)):
            return (max if name == "max" else min)(values, key=inexact)
        if not variable and all(isinstance(value, Fraction) for value in values):
            scale = math.lcm(*(value.denominator for value in values))
            whole = (math.gcd if name == "gcd" else math.lcm)(*(int(value * scale) for value in values))
            return self.bounded(Fraction(whole, scale))
        return opaque(name, *sorted(map(digits, values)))

    def repeated(self, operation: Callable[[Number, Number], Number]) -> Number:
        """The sum or product of a term from k = a to b, two whole numbers."""
        self.expect("_", "{")
        letter = self.next()
        self.expect("=")
        first = self.nested(self.expression)
        self.expect("}", "^")
        last, start, outer = self.exponent(), self.position, self.bound
        if not (_is_whole(first) and _is_whole(last)) or first > last or self.letters or not letter.isalpha():
            raise Unreadable
        result = Fraction(0 if operation is add else 1)
        for k in range(int(first), int(last) + 1):
            self.position, self.bound = start, {**outer, letter: Fraction(k)}
            result = self.bounded(operation(result, self.sign() * self.nested(self.term)))
        self.bound = outer
        return result

    def residue(self, x: Number, modulus: Number) -> Number:
        """17 mod 5; where there is nothing to compute, as in 2 mod 5, it is a class of numbers and no value."""
        known = isinstance(x, Fraction) and isinstance(modulus, Fraction) and not self.letters
        if not known or 0 <= x < modulus or modulus <= 0:
            raise Unreadable
        return x % modulus

    def function(self, name: str) -> Number:
        base = inexact(self.nested(self.atom)) if self.accept("_") else None
        exponent = self.exponent() if self.accept("^") else Fraction(1)
        self.angles += 1
        argument = inexact(self.nested(self.atom if self.peek() in ("(", "{") else lambda: self.term(())))
        self.angles -= 1
        self.budget.spend(_FUNCTION_WORK)
        if exponent == -1 and "arc" + name in FUNCTIONS:
            return numbers.tidy(FUNCTIONS["arc" + name](argument))
        result = numbers.tidy(FUNCTIONS[name](argument))
        return self.power(divide(result, numbers.log(base)) if base else result, exponent)

    def symbol(self, name: str) -> Number:
        if name in self.bound:
            return self.bound[name]
        if not (name.isalpha() and len(name) == 1 or name in LETTERS or name in _CONSTANTS):
            raise Unreadable
        if self.accept("_"):  # latex.py has put every subscript in braces
            index = self.tokens[self.position : self.tokens.index("}", self.position) + 1]
            self.position += len(index)
            name += "_" + "".join(str(self.bound.get(token, token)) for token in index)
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        while self.accept("'"):
            name += "'"
        self.letters = True
        if name[0] in "fgh" and self.tokens[self.position : self.position + 6] == [*"^{-1}("]:
            name += "^{-1}"
            self.position += 5
        before, argument, after = (*self.tokens[self.position : self.position + 3], "", "")[:3]
        always = name[0] == "f" or "^" in name or name + before == "E["
        if before in ("(", "[") and (always or after in (")", "]") and argument[-1].isalnum()):
            return opaque(name, str(self.point), *map(digits, self.arguments()))  # f(2x), I(0): no product
        return letter(name, self.point)

    def power(self, base: Number, exponent: Number) -> Number:
        if isinstance(exponent, Fraction) and exponent.denominator <= 100:
            base, exponent = self.root(base, exponent.denominator), Fraction(exponent.numerator)
            if isinstance(base, Fraction) and max(1, _bits_of(base)) * abs(exponent) <= MAX_BITS:
                return self.bounded(base ** int(exponent))
            if _is_whole(base):  # a rounded value would equal its neighbours
                return opaque("^", str(base), str(exponent))
        self.budget.spend(_FUNCTION_WORK)
        return numbers.power(inexact(base), inexact(exponent))

    def root(self, x: Number, n: int) -> Number:
        """The real root if there is one, exact if it is rational."""
        if n == 1:
            return x
        self.budget.spend(_ROOT_WORK if n == 2 else _FUNCTION_WORK)
        if isinstance(x, Fraction) and x >= 0:
            parts = [numbers.whole_root(part, n) for part in (x.numerator, x.denominator)]
            if None not in parts:
                return Fraction(*parts)
        return numbers.root(inexact(x), n)

    def factorial(self, x: Number, step: int = 1) -> Number:
        """x! or, with steps of 2, x!!."""
        if _is_whole(x) and 0 <= x <= MAX_FACTORIAL:
            return self.bounded(Fraction(math.prod(range(int(x), 0, -step))))
        self.budget.spend(_FUNCTION_WORK)
        known = step == 1 and abs(inexact(x)) <= MAX_FACTORIAL
        return numbers.tidy(CONTEXT.factorial(inexact(x))) if known else opaque("!" * step, digits(x))

    def binomial(self, n: Number, k: Number) -> Number:
        if _is_whole(n) and _is_whole(k) and min(k, n - k) * _bits_of(n) <= MAX_BITS:
            return self.bounded(Fraction(math.comb(int(n), int(k))))
        return self.bounded(divide(self.factorial(n), multiply(self.factorial(k), self.factorial(add(n, -k)))))


def _is_whole(x: Number) -> TypeGuard[Fraction]:
    return isinstance(x, Fraction) and x.denominator == 1


def _bits_of(x: Number) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length()) if isinstance(x, Fraction) else 0


def _floor(bracket: str, x: Number) -> Fraction:
    if not numbers.is_real(x):  # e.g. sqrt(n - 9) at a small n; the other points decide
        return opaque(bracket, digits(x))
    if not isinstance(x, Fraction):
        nearest = Fraction(int(CONTEXT.nint(x)))
        x = nearest if numbers.close(x, nearest) else Fraction(int(CONTEXT.floor(x))) + Fraction(1, 2)
    return Fraction(math.floor(x) if bracket == "⌊" else math.ceil(x))
