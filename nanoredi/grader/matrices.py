"""Sums and products of matrices, and determinants, as texts: a cell of A B becomes the text (a)*(b)+(c)*(d), which is
read like any other value."""

import itertools
import re

from nanoredi.grader.symbols import Unreadable

MAX_CELL = 1_000  # characters
_GRID = r"⟦(?:[pbB]?matrix|smallmatrix|array)¦([^⟦⟧]*)⟧"
_DETERMINANT = re.compile(rf"⟦vmatrix¦([^⟦⟧]*)⟧|(?:\\det ?\(?|\|){_GRID}[)|]?")

Grid = list[list[str]]


def rows_of(body: str) -> Grid:
    return [[cell.strip() for cell in row.split("&")] for row in body.split("\\\\") if row.strip()]


def without_determinants(text: str) -> str:
    """The text with each determinant expanded to a sum."""
    return _DETERMINANT.sub(lambda found: f"({_determinant(rows_of(found[1] or found[2] or ''))})", text)


def _determinant(grid: Grid) -> str:
    if not grid or len(grid) > 4 or any(len(row) != len(grid) for row in grid):
        raise Unreadable
    terms = []
    for columns in itertools.permutations(range(len(grid))):
        inversions = sum(a > b for a, b in itertools.combinations(columns, 2))
        terms.append("+-"[inversions % 2] + "*".join(f"({row[i]})" for row, i in zip(grid, columns)))
    return "".join(terms)


def evaluate(pieces: list[str]) -> Grid:
    """The sum of terms, given alternating with the signs between them. Raises Unreadable if the sizes do not fit or a
    term is neither a number nor a matrix."""
    total: Grid = []
    for sign, term in zip(["+", *pieces[1::2]], pieces[::2]):
        grid = _product(f"-1*{term}" if sign == "-" else term)
        if total and [*map(len, total)] != [*map(len, grid)]:
            raise Unreadable
        total = [[f"({a})+({b})" for a, b in zip(x, y)] for x, y in zip(total, grid)] if total else grid
    return total


def _product(term: str) -> Grid:
    term = re.sub(rf"[(\[](?={_GRID}[)\]])|(?<=⟧)[)\]]", "", term)
    pieces = re.split(_GRID + r"(?:\^\{?([2-9T])\}?)?", term)  # scalar, grid, exponent, scalar, ...
    result: Grid = []
    for body, exponent in zip(pieces[1::3], pieces[2::3]):
        right = rows_of(body)
        if len({*map(len, right)}) != 1:
            raise Unreadable
        right = [list(column) for column in zip(*right)] if exponent == "T" else right
        for _ in range(1 if exponent in (None, "T") else int(exponent)):
            result = _times(result, right) if result else right
    for scalar in filter(None, (text.strip("* ") for text in pieces[::3])):
        if not result or scalar[0] in "^_'!/":
            raise Unreadable
        result = [[f"({scalar})*({cell})" for cell in row] for row in result]
    return result


def _times(left: Grid, right: Grid) -> Grid:
    if any(len(row) != len(right) for row in left):
        raise Unreadable
    cells = [["+".join(f"({a})*({b})" for a, b in zip(row, column)) for column in zip(*right)] for row in left]
    if max(len(cell) for row in cells for cell in row) > MAX_CELL:
        raise Unreadable
    return cells
