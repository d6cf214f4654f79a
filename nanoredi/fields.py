"""A field of the configs: its comment, the values it may take, and these as a flag's text and in TOML."""

import dataclasses
import math
import operator
from types import UnionType
from typing import Any, get_args, get_origin

from nanoredi.errors import UserError, nearest


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    free: bool = False,
    of: dict[str, float] | None = None,
) -> Any:
    """A field with its one comment, which is also the flag's help, and with the values it may take. A free one says how
    the work is done and not what comes out: a run may go on with another. One that is a parameter of some objectives
    has in `of` what each takes where it is not given."""
    metadata = {
        "help": help,
        "low": low,
        "above": above,
        "high": high,
        "choices": choices,
        "free": free,
        "of": of or {},
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def kind_of(f: dataclasses.Field) -> type:
    """A field's plain type: of a list `list`, of `float | None` float."""
    origin = get_origin(f.type) or f.type
    return get_args(f.type)[0] if origin is UnionType else origin


def from_text(kind: type, text: str | list[str]) -> Any:
    """A flag's text as the value that a recipe would hold; left as it is where it is none."""
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text) if kind in (int, float) else text
    except (KeyError, ValueError):
        return text


def checked(where: str, f: dataclasses.Field, value: Any) -> Any:
    """The value, if its field can take it; else a UserError that says what it takes."""
    kind = kind_of(f)
    if kind is float and type(value) is int:
        value = float(value)
    m = f.metadata
    if m["choices"] and value not in m["choices"]:
        raise UserError(f"{where} takes {' or '.join(m['choices'])}, not {value!r}{nearest(str(value), m['choices'])}")
    wrong_items = type(value) is kind is list and not all(isinstance(v, str) for v in value)
    if type(value) is not kind or wrong_items or kind is float and not math.isfinite(value):
        raise UserError(f"{where} takes {_KINDS[kind]}, not {value!r}")
    for words, bound, holds in (
        ("at least", m["low"], operator.ge),
        ("above", m["above"], operator.gt),
        ("at most", m["high"], operator.le),
    ):
        if bound is not None and not holds(value, bound):
            raise UserError(f"{where} is {value!r}; it must be {words} {bound}")
    return value


def to_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, str):
        return (
            '"'
            + "".join(
                f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else "\\" + c if c in '"\\' else c for c in value
            )
            + '"'
        )
    return repr(value)


_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list of strings"}
