"""Options: fields of dataclasses, read from flags and recipes.

A recipe is a TOML file with one table for each dataclass of config.py: [sft], [redi], [evaluate], [toy]. The fields of
a script's main table are its flags (`train_redi.py --alpha 0.5`); fields of its other tables are flags with the table's
name in front (`train_redi.py --evaluate.n 4`). Flags override the recipe, the recipe overrides the defaults. A recipe
with `base = "qwen2.5-math-1.5b"` before its tables holds only the differences from that recipe. The resolved options
are written into the run's folder as config.toml, which is itself a recipe.
"""

import argparse
import dataclasses
import json
import math
import operator
import os
import re
import shutil
import sys
import textwrap
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from nanoredi.common.errors import UserError, nearest
from nanoredi.common.files import KINDS, read_text, write_text

RECIPES = Path(__file__).parent.parent / "recipes"
ARMS = RECIPES / "arms" / "qwen2.5-math-1.5b.toml"  # recipes that differ from this one in stage 2, one per line
TABLES: dict[str, type] = {}  # {table of a recipe: its dataclass}; config.py fills it
Tables = dict[str, dict[str, Any]]  # {table: {field: value}}: what a recipe or the flags set, without the defaults


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
    """A dataclass field with its help and the values it may take. free: it changes how the work is done, but not the
    result, so a run may be resumed with another value. of: {objective: default}, if only these have the parameter."""
    metadata = dict(help=help, low=low, above=above, high=high, choices=choices, free=free, of=of or {})
    made = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**made, metadata=metadata)


def kind_of(f: dataclasses.Field) -> type:
    """A field's plain type: `list` for any list, float for `float | None`."""
    origin = get_origin(f.type) or f.type
    return get_args(f.type)[0] if origin is UnionType else origin


def from_text(kind: type, text: str | list[str]) -> Any:
    """A flag's text as the value that a recipe would hold; the text itself if it is not of that kind."""
    if kind is bool:
        return _BOOL.get(text, text)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def checked(where: str, f: dataclasses.Field, value: Any) -> Any:
    """The value, if its field allows it, with a path's ~ expanded; otherwise a UserError says what the field takes."""
    kind, m, shown = kind_of(f), f.metadata, repr(value)[:80]
    if kind is float and type(value) is int and abs(value) < _LARGEST[float]:
        value = float(value)
    if m["choices"] and value not in m["choices"]:
        raise UserError(f"{where} takes {' or '.join(m['choices'])}, not {shown}{nearest(str(value), m['choices'])}")
    texts = value if kind is list and type(value) is list else [value] if kind is str else []
    wrong_items = any(type(text) is not str or "\0" in text for text in texts)
    if type(value) is not kind or wrong_items or value == [] or kind is float and not math.isfinite(value):
        raise UserError(f"{where} takes {_KINDS[kind]}, not {shown}")
    for words, bound, holds in (
        ("at least", m["low"], operator.ge),
        ("above", m["above"], operator.gt),
        ("at most", _LARGEST.get(kind) if m["high"] is None else m["high"], operator.le),
    ):
        if bound is not None and not holds(value, bound):
            raise UserError(f"{where} is {shown}; it must be {words} {bound}")
    if texts and f.name not in _PROSE:  # no shell has replaced the ~ of --out=~/run, nor that of a recipe
        texts = [os.path.expanduser(text) for text in texts]
        places = [os.path.realpath(text) for text in texts]
        if twice := [text for text, place in zip(texts, places) if places.count(place) > 1]:
            raise UserError(f"{where} names {twice[0]} twice")
        value = texts if kind is list else texts[0]
    return value


_PROSE = {"prompt", "stop", "system", "template"}  # text for the model; all other text may be a path
_BOOL = {"true": True, "false": False}
_LARGEST = {int: 2**31 - 1, float: 1e12}  # unless the field has a bound
_KINDS = {**KINDS, list: "a list of one or more texts"}


def read_flags(
    description: str, argv: list[str], main: str, main_type: type, others: tuple[str, ...] = (), positional: str = ""
) -> tuple[str | None, Tables]:
    """Read a script's flags.

    Args:
        description: shown by --help, with its paragraphs wrapped to the terminal.
        argv: the words after the script's name.
        main: the table whose fields are plain flags; if recipes have this table, there is also a flag --recipe.
        main_type: its dataclass, or a subclass with more flags.
        others: the tables whose fields are flags with the table's name in front.
        positional: the field that takes words without a flag, if any: one word, or several for a list.

    Returns:
        The name of the recipe, if one was given, and {table: {field: value}} of the flags that were given.

    Raises:
        UserError: for a flag that does not exist, and for a value that its field does not allow.
    """
    parser = _Parser(description, positional)
    if main in TABLES:
        names, arms = ", ".join(_builtin_recipes()).replace(f" {ARMS.stem}-", " -").split(", -", 1)
        parser.add_argument("--recipe", metavar="R", help=f"a TOML file, {names}, or {ARMS.stem} and one of -{arms}")
    flags = {f"--{f.name}": (main, f) for f in dataclasses.fields(main_type)}
    flags |= {f"--{table}.{f.name}": (table, f) for table in others for f in dataclasses.fields(TABLES[table])}
    for flag, (_, f) in flags.items():
        parser.add_argument(flag, dest=flag, default=argparse.SUPPRESS, **_for_argparse(f))
    end = argv.index("--") if "--" in argv else len(argv)
    argv, rest = argv[:end], argv[end + 1 :]  # what follows -- is no flag, nor an item of a list
    if positional:  # the word after a switch such as --paper is positional, unless it is true or false
        switches = {flag for flag, (_, f) in flags.items() if kind_of(f) is bool}
        pairs = zip(argv, [*argv[1:], ""])
        argv = [f"{word}=true" if word in switches and after not in _BOOL else word for word, after in pairs]
    known, words = parser.parse_known_args(argv)
    values = vars(known)
    if unknown := next((word.split("=")[0] for word in words if re.match(r"--|-[a-z]\w*$", word)), None):
        raise UserError(f"there is no flag {unknown}{nearest(unknown, [*flags, '--recipe'])}")
    words += rest
    if words and positional and f"--{positional}" not in values:
        is_list = kind_of(flags[f"--{positional}"][1]) is list
        values[f"--{positional}"], words = (words, []) if is_list else (words[0], words[1:])
    if words:
        raise UserError(f"{words[0]!r} follows no flag; --help lists the flags")

    recipe = values.pop("recipe", None)
    given: Tables = {}
    for flag, text in [("--recipe", recipe), *values.items()]:
        if "" in (text if isinstance(text, list) else [text]):  # a shell variable that was never set, for example
            raise UserError(f"{flag} is empty: give it a value, or leave it out")
        if flag in flags:
            table, f = flags[flag]
            given.setdefault(table, {})[f.name] = checked(flag, f, from_text(kind_of(f), text))
    return recipe, given


def _for_argparse(f: dataclasses.Field) -> dict[str, Any]:
    """argparse's arguments for a field: how many words it takes, and its help with the default in brackets."""
    kind, m = kind_of(f), f.metadata
    lists = {"nargs": "+", "action": "extend"}  # --model A --model B is --model A B
    words: dict[str, Any] = {bool: {"nargs": "?", "const": "true"}, list: lists}.get(kind, {})
    default = " ".join(f.default_factory()) if kind is list else str(f.default)
    if m["of"]:
        default = ", ".join(f"{value:g} for {objective}" for objective, value in m["of"].items())
    words["metavar"] = "|".join(m["choices"]) or ("true|false" if kind is bool else f.name.upper())
    return {**words, "help": (m["help"] + f" [{default}]" * bool(default)).replace("%", "%%")}


def read_recipe(recipe: str | Path, is_base: bool = False) -> Tables:
    """Read a recipe and its base, by the name of a built-in recipe or the path of a TOML file.

    Raises:
        UserError: when it cannot be read, for a table or key that does not exist, for a value that its field does not
            allow, and for a base that has a base itself.
    """
    path, builtin = Path(os.path.expanduser(recipe)), _builtin_recipes()
    if str(recipe) not in builtin and not path.exists():
        raise UserError(f"there is no recipe {recipe}{nearest(str(recipe), builtin)}")
    try:
        tables = builtin[str(recipe)] if str(recipe) in builtin else tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    base = tables.pop("base", None)
    if base is not None and (is_base or not isinstance(base, str)):
        raise UserError(f"{path}: base is {base!r}; it must be the name or file of a recipe that has no base itself")
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            known = ", ".join(f"[{name}]" for name in TABLES)
            raise UserError(f"{path}: there is no table [{table}]{nearest(table, TABLES)}; a recipe has {known}")
        fields = {f.name: f for f in dataclasses.fields(TABLES[table])}
        for key in values:
            if key not in fields:
                raise UserError(f"{path}: [{table}] has no key {key!r}{nearest(key, fields)}")
            values[key] = checked(f"{path}: {table}.{key}", fields[key], values[key])
    if base is None:
        return tables
    lower = read_recipe(base if base in builtin else path.parent / os.path.expanduser(base), is_base=True)
    return {t: _over(lower.get(t, {}), tables.get(t, {}), TABLES[t]) for t in {**lower, **tables}}


def resolve(kind: type, table: str, *layers: Tables) -> Any:
    """A table's dataclass with its defaults overridden by the layers, later ones over earlier ones."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = _over(values, layer.get(table, {}), kind)
    return kind(**values)


def _over(lower: dict[str, Any], upper: dict[str, Any], kind: type) -> dict[str, Any]:
    """A table's values overridden by others. With another objective, the parameters of the former one are dropped."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if "objective" in upper and upper["objective"] != lower.get("objective", fields["objective"].default):
        lower = {key: value for key, value in lower.items() if not fields[key].metadata["of"]}
    return {**lower, **upper}


def write_recipe(path: Path, configs: dict[str, Any]) -> None:
    """Write {table: dataclass} as a recipe that read_recipe reads back."""
    lines = []
    for table, config in configs.items():
        values = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
        fields = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        lines += [f"[{table}]", *fields, ""]
    # These values are the same in TOML as in JSON, except for one control character.
    write_text(path, "\n".join(lines).replace("\x7f", "\\u007f"))


class _Parser(argparse.ArgumentParser):
    def __init__(self, description: str, positional: str):
        """The description's paragraphs are wrapped to the terminal, but for its examples, which are indented."""
        width = max(40, shutil.get_terminal_size().columns - 2)
        parts = [part if part.startswith("  ") else textwrap.fill(part, width) for part in description.split("\n\n")]
        module = sys.modules["__main__"].__spec__  # where it was started with python -m
        program = f"python -m {module.name.removesuffix('.__main__')}" if module else "%(prog)s"
        usage = f"{program} [FLAGS] [{positional.upper()}]".removesuffix(" []")
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=usage, description="\n\n".join(parts), allow_abbrev=False, formatter_class=kind)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # by itself it mistakes -1e-6 for a flag

    def error(self, message: str):
        raise UserError(message)


def _builtin_recipes() -> dict[str, dict[str, Any]]:
    """{name: content of the recipe's file}; each arm counts as a file with base, stage 1 and its own stage 2."""
    tables = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.toml"))}
    arms = tomllib.loads(ARMS.read_text(encoding="utf-8"))
    named = {f"{ARMS.stem}-{arm}": {**arms, "base": ARMS.stem, "redi": redi} for arm, redi in arms["redi"].items()}
    return tables | named
