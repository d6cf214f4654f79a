"""Options: fields of dataclasses, read from flags and recipes.

A recipe is a TOML file with a table a dataclass of config.py: [sft], [redi], [evaluate], [toy]. A script has a main table,
whose fields are its flags (`train_redi.py --alpha 0.5`); fields of its other tables are flags with the table's name in
front (`train_redi.py --evaluate.n 4`). Flags win over the recipe, the recipe over the defaults. A recipe that says
`base = "qwen2.5-math-1.5b"` before its tables holds only what differs from that one. What was resolved is written into
the run's folder as config.toml, which is itself a recipe.
"""

import argparse
import dataclasses
import math
import operator
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from nanoredi.common.errors import UserError, nearest
from nanoredi.common.files import read_text, write_text

RECIPES = Path(__file__).parent.parent / "recipes"
ARMS = RECIPES / "arms" / "qwen2.5-math-1.5b.toml"  # recipes that differ from this one in stage 2, a line each
TABLES: dict[str, type] = {}  # a recipe's tables and their dataclasses
Tables = dict[str, dict[str, Any]]  # {table: {field: value}}: what a recipe or the flags say, before the defaults


def table(name: str) -> Callable[[type], type]:
    """Make a dataclass one of a recipe's tables."""

    def register(kind: type) -> type:
        TABLES[name] = kind
        return kind

    return register


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
    kind, m, shown = kind_of(f), f.metadata, repr(value)[:80]
    if kind is float and type(value) is int and abs(value) < _LARGEST[float]:
        value = float(value)
    if m["choices"] and value not in m["choices"]:
        raise UserError(f"{where} takes {' or '.join(m['choices'])}, not {shown}{nearest(str(value), m['choices'])}")
    texts = value if kind is list and type(value) is list else [value] if kind is str else []
    wrong_items = any(type(text) is not str or "\0" in text for text in texts)
    if type(value) is not kind or wrong_items or kind is float and not math.isfinite(value):
        raise UserError(f"{where} takes {_KINDS[kind]}, not {shown}")
    for words, bound, holds in (
        ("at least", m["low"], operator.ge),
        ("above", m["above"], operator.gt),
        ("at most", _LARGEST.get(kind) if m["high"] is None else m["high"], operator.le),
    ):
        if bound is not None and not holds(value, bound):
            raise UserError(f"{where} is {shown}; it must be {words} {bound}")
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


_LARGEST = {int: 2**31 - 1, float: 1e12}  # where a field says nothing else
_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list of strings"}


def read_flags(
    description: str,
    argv: list[str],
    main: str,
    main_type: type,
    others: tuple[str, ...] = (),
    takes_recipe: bool = True,
    positional: str = "",
) -> tuple[str | None, Tables]:
    """Read a script's flags.

    Args:
        description: shown by --help.
        argv: the words after the script's name.
        main: the table whose fields are plain flags; main_type is its dataclass, or a subclass with more flags.
        others: the tables whose fields are flags with the table's name in front.
        takes_recipe: whether there is a flag --recipe.
        positional: the field that one word without a flag is for, if any.

    Returns:
        The recipe that was named, if any, and {table: {field: value}} of what was given.

    Raises:
        UserError: for a flag that does not exist, and for a value that its field cannot take.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = {}
    if takes_recipe:
        parser.add_argument("--recipe", metavar="R", help=f"a TOML file, or one of {', '.join(_builtin_recipes())}")
    for table, kind in {main: main_type, **{t: TABLES[t] for t in others}}.items():
        for f in dataclasses.fields(kind):
            flag = f"--{f.name}" if table == main else f"--{table}.{f.name}"
            flags[flag] = table, f
            is_list = kind_of(f) is list
            default = f.default_factory() if is_list else f.default
            if f.metadata["of"]:
                default = ", ".join(f"{value:g} for {objective}" for objective, value in f.metadata["of"].items())
            alone = {"nargs": "?", "const": "true"} if f.type is bool else {}  # --paper says --paper true
            parser.add_argument(
                flag,
                dest=flag,
                **({"nargs": "+"} if is_list else alone),
                metavar=f.name.upper(),
                default=argparse.SUPPRESS,
                help=f"{f.metadata['help']} [{default}]".replace("%", "%%"),
            )
    # argparse takes -1e-6 for a flag, but never a word with a space in it.
    argv = [f" {word}" if re.fullmatch(r"-[\d.]+e[-+]?\d+", word, re.IGNORECASE) else word for word in argv]
    known, unknown = parser.parse_known_args(argv)
    if positional and len(unknown) == 1 and not unknown[0].startswith("--") and f"--{positional}" not in known:
        setattr(known, f"--{positional}", unknown.pop())
    for word in unknown:
        name = word.split("=")[0]
        if name.startswith("--"):
            raise UserError(f"there is no flag {name}{nearest(name, [*flags, '--recipe'])}")
        raise UserError(f"{word!r} follows no flag; --help lists the flags")

    given: Tables = {}
    for flag, text in vars(known).items():
        if flag != "recipe":
            table, f = flags[flag]
            given.setdefault(table, {})[f.name] = checked(flag, f, from_text(kind_of(f), text))
        if "" in (
            text if isinstance(text, list) else [text]
        ):  # a shell's variable that was never set must not mean the default
            raise UserError(f"{'--' * (flag == 'recipe')}{flag} is empty: give it a value, or leave it out")
    return getattr(known, "recipe", None), given


def read_recipe(recipe: str | Path, is_base: bool = False) -> Tables:
    """Read a recipe, the name of a built-in one or a TOML file, over its base.

    Raises:
        UserError: when it cannot be read, for a table or key that does not exist, for a value that its field cannot
        take, and for a base that has a base.
    """
    path = RECIPES / f"{recipe}.toml" if recipe in _builtin_recipes() else Path(recipe)
    arm = _arms().get(str(recipe))
    if arm is None and not path.exists():
        raise UserError(f"there is no recipe {recipe}{nearest(str(recipe), _builtin_recipes())}")
    try:
        tables = arm or tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    base = tables.pop("base", None)
    if base is not None and (is_base or not isinstance(base, str)):
        raise UserError(f"{path}: base is {base!r}; it must be a recipe's name or file, and that one without a base")
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            tables_there_are = ", ".join(f"[{t}]" for t in TABLES)
            raise UserError(
                f"{path}: there is no table [{table}]{nearest(table, TABLES)}; a recipe has {tables_there_are}"
            )
        fields = {f.name: f for f in dataclasses.fields(TABLES[table])}
        for key in values:
            if key not in fields:
                raise UserError(f"{path}: [{table}] has no key {key!r}{nearest(key, fields)}")
            values[key] = checked(f"{path}: {table}.{key}", fields[key], values[key])
    if base is None:
        return tables
    lower = read_recipe(base if base in _builtin_recipes() else path.parent / base, is_base=True)
    return {t: _over(lower.get(t, {}), tables.get(t, {}), TABLES[t]) for t in {**lower, **tables}}


def resolve(kind: type, table: str, *layers: Tables) -> Any:
    """A table's dataclass: its defaults under the layers, the last on top."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = _over(values, layer.get(table, {}), kind)
    return kind(**values)


def _over(lower: dict[str, Any], upper: dict[str, Any], kind: type) -> dict[str, Any]:
    """A table's values with others on top. Parameters of one objective say nothing of another's."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if "objective" in upper and upper["objective"] != lower.get("objective", fields["objective"].default):
        lower = {key: value for key, value in lower.items() if not fields[key].metadata["of"]}
    return {**lower, **upper}


def write_recipe(path: Path, configs: dict[str, Any]) -> None:
    """Write {table: dataclass} as a recipe that read_recipe reads back."""
    lines = []
    for table, config in configs.items():
        values = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
        lines += [f"[{table}]", *(f"{key} = {to_toml(value)}" for key, value in values.items()), ""]
    write_text(path, "\n".join(lines))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def _arms() -> dict[str, Any]:
    """{name: what its recipe would hold}"""
    arms = tomllib.loads(ARMS.read_text(encoding="utf-8"))
    return {f"{ARMS.stem}-{arm}": {**arms, "base": ARMS.stem, "redi": redi} for arm, redi in arms["redi"].items()}


def _builtin_recipes() -> list[str]:
    return sorted([path.stem for path in RECIPES.glob("*.toml")] + [*_arms()])
