"""Recipes and flags.

A recipe is a TOML file with a table a dataclass below: [sft], [redi], [evaluate], [toy]. A script has a main table,
whose fields are its flags (`train_redi.py --alpha 0.5`); fields of its other tables are flags with the table's name in
front (`train_redi.py --evaluate.n 4`). Flags win over the recipe, the recipe over the defaults. A recipe that says
`base = "qwen2.5-math-1.5b"` before its tables holds only what differs from that one. What was resolved is written into
the run's folder as config.toml, which is itself a recipe.
"""

import argparse
import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoredi.errors import UserError, nearest
from nanoredi.fields import checked, from_text, kind_of, option, to_toml

RECIPES = Path(__file__).parent / "recipes"


DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class TrainConfig:
    """What both stages share. The defaults are the paper's where it has them (arXiv 2505.24850)."""

    model: str = option("", "Hugging Face folder of the Qwen2 to start from; empty: the toy is made")
    data: str = option("", "JSONL file of the training rows")
    out: str = option("", "the run's folder", free=True)
    epochs: int = option(1, "passes over the data", low=1)
    max_steps: int = option(0, "stop after this many optimiser steps; 0: after the epochs", low=0)
    batch_size: int = option(32, "pairs in an optimiser step, over all ranks", low=1)
    lr: float = option(1e-6, "peak learning rate", low=0)
    warmup: float = option(
        0.1, "share of the steps in which the learning rate rises to its peak; then it falls to 0", low=0, high=1
    )
    weight_decay: float = option(1e-4, "AdamW's decoupled weight decay", low=0)
    clip: float = option(1.0, "largest gradient norm; a longer gradient is scaled down to it", above=0)
    dtype: str = option(
        "auto",
        "compute: float32, bfloat16, or auto (bfloat16 where the device is good at it); masters are float32",
        choices=DTYPES,
    )
    activation_checkpointing: str = option(
        "attention",
        "what a block keeps for backward: attention (its input and attention's result; it makes the rest again), products "
        "(the linear layers' results, too), off (everything); each is faster and takes more memory than the one before",
        choices=("attention", "products", "off"),
        free=True,
    )
    reshard_after_forward: bool = option(
        True,
        "let go of a block's whole weights after its forward and gather them again in backward: less memory, more traffic",
        free=True,
    )
    shard_size: int = option(
        0, "ranks that share one copy of the weights, such as a machine's; 0: all of them", low=0, free=True
    )
    max_tokens_per_micro_batch: int = option(
        40_000, "tokens of one forward pass on one rank; a longer sequence goes alone", low=1, free=True
    )
    save_every: int = option(
        200, "steps between saved models, and between states to go on from; 0: only at the end", low=0, free=True
    )
    log_every: int = option(10, "steps between the lines on the screen", low=1, free=True)
    tensorboard: bool = option(False, "write the figures for TensorBoard, too (the package tensorboard)", free=True)
    max_bad_steps: int = option(
        5, "stop after this many steps in a row whose loss or gradient is not finite; each is skipped", low=1, free=True
    )
    seed: int = option(42, "of the data's order, and of everything the toy makes", low=0)
    rope_theta: float = option(0.0, "rotary base to train with; 0: the checkpoint's", low=0)
    max_position_embeddings: int = option(0, "context to train with; 0: the checkpoint's", low=0)
    cache: str = option("runs/cache", "folder of the tokenised data, keyed by data and tokenizer", free=True)


@dataclass
class SftConfig(TrainConfig):
    """Stage 1: supervised fine-tuning on correct traces."""

    epochs: int = option(5, "passes over the data", low=1)
    batch_size: int = option(128, "sequences in an optimiser step, over all ranks", low=1)
    lr: float = option(5e-5, "peak learning rate", low=0)
    max_tokens: int = option(32_768, "longest conversation; a longer one is cut on the right", low=1)


@dataclass
class RediConfig(TrainConfig):
    """Stage 2: pairs of a correct and an incorrect trace."""

    objective: str = option(
        "redi", "redi, dpo, simpo, or sft: go on with the correct traces alone", choices=("redi", "sft", "dpo", "simpo")
    )
    alpha: float | None = option(None, "weight of the incorrect trace", low=0, of={"redi": 0.8})
    neg_weight_gamma: float | None = option(
        None, "weigh it by exp(this * its mean log-prob a token), too; 0: do not", low=0, of={"redi": 0.0}
    )
    beta: float | None = option(None, "scale of the log-probs' difference", above=0, of={"dpo": 0.001, "simpo": 2.0})
    gamma: float | None = option(None, "margin aimed at", low=0, of={"simpo": 1.0})
    max_prompt_tokens: int = option(800, "longest prompt; of a longer one the last tokens are kept", low=1)
    max_response_tokens: int = option(19_000, "longest response; a longer one is cut on the right", low=1)
    collapse_nats: float = option(
        0.3, "warn of collapse when the chosen log-prob has fallen this far and falls ever faster", above=0, free=True
    )
    on_collapse: str = option("warn", "what then: warn, or stop", choices=("warn", "stop"), free=True)
    watch: str = option("", "JSONL file of pairs kept out of training, for the log-probs in the final table")
    evaluate: bool = option(
        False, "at the end, compare the model of the start and the final one on [evaluate]'s benchmarks"
    )

    def __post_init__(self):
        """Complete the objective's own parameters, and refuse another's."""
        for f in dataclasses.fields(self):
            of, given = f.metadata["of"], getattr(self, f.name) is not None
            if self.objective in of and not given:
                setattr(self, f.name, of[self.objective])
            elif of and self.objective not in of and given:
                raise UserError(
                    f"{f.name} is a parameter of the objective {' and '.join(of)}; the one here is {self.objective}"
                )


@dataclass
class SamplingConfig:
    """How completions are drawn. The defaults are those of the paper's evaluation."""

    n: int = option(16, "samples a prompt", low=1)
    temperature: float = option(0.6, "0: always the likeliest token", low=0)
    top_p: float = option(
        0.95,
        "sample among the fewest likeliest tokens that together have this probability; 1: among all",
        above=0,
        high=1,
    )
    top_k: int = option(0, "sample among the k likeliest tokens; 0: among all", low=0)
    max_tokens: int = option(32_768, "longest completion; the end of the context comes first", low=1)
    seed: int = option(42, "of the samples", low=0)
    batch_size: int = option(64, "rows decoded at once on a rank", low=1, free=True)
    cache_gb: float = option(
        0.0,
        "memory of the key-value cache on a rank, in GB; 0: measured from what the device has free",
        low=0,
        free=True,
    )
    page_size: int = option(32, "tokens of a page of the key-value cache", low=1, free=True)
    dtype: str = option(
        "auto", "compute: float32, bfloat16, or auto (bfloat16 where the device is good at it)", choices=DTYPES
    )


@dataclass
class EvaluateConfig(SamplingConfig):
    """Benchmarks to a table."""

    benchmarks: list[str] = option(
        ["math500", "aime24", "amc23", "minerva", "olympiad_bench"],
        "names, or JSONL files of rows with problem and answer",
    )
    data: str = option("", "folder of the named benchmarks' files")
    limit: int = option(0, "problems a benchmark, from its start; 0: all", low=0)
    think: str = option(
        "forced",
        "forced: the prompt opens <think> for the model, as in the paper; own: the chat template as it is",
        choices=("forced", "own"),
    )


@dataclass
class ToyConfig:
    """The embedded task (toy.py). Sizes and model were found by experiment."""

    sft_rows: int = option(4000, "problems with a correct trace, for stage 1", low=1)
    pairs: int = option(2000, "pairs for stage 2; their correct traces are among stage 1's", low=1)
    watch_pairs: int = option(64, "pairs kept out of stage 2, to watch log-probs on", low=1)
    heldout: int = option(200, "unseen problems to evaluate on", low=1)
    num_layers: int = option(3, "blocks of the model", low=1)
    hidden_size: int = option(96, "the model's width; 4 heads share it, the MLP is 3 times as wide", low=8)


TABLES = {"sft": SftConfig, "redi": RediConfig, "evaluate": EvaluateConfig, "toy": ToyConfig}
Tables = dict[str, dict[str, Any]]  # {table: {field: value}}: what a recipe or the flags say, before the defaults


def read_flags(
    description: str,
    argv: list[str],
    main: str,
    main_type: type,
    others: tuple[str, ...] = (),
    takes_recipe: bool = True,
) -> tuple[str | None, Tables]:
    """Read a script's flags.

    Args:
        description: shown by --help.
        argv: the words after the script's name.
        main: the table whose fields are plain flags; main_type is its dataclass, or a subclass with more flags.
        others: the tables whose fields are flags with the table's name in front.
        takes_recipe: whether there is a flag --recipe.

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
    known, unknown = parser.parse_known_args(argv)
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
    return getattr(known, "recipe", None), given


def read_recipe(recipe: str | Path, is_base: bool = False) -> Tables:
    """Read a recipe, the name of a built-in one or a TOML file, over its base.

    Raises:
        UserError: when it cannot be read, for a table or key that does not exist, for a value that its field cannot
        take, and for a base that has a base.
    """
    path = RECIPES / f"{recipe}.toml" if recipe in _builtin_recipes() else Path(recipe)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the recipe {recipe}: {error.strerror}{nearest(str(recipe), _builtin_recipes())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    path.write_text("\n".join(lines), encoding="utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def _builtin_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))
