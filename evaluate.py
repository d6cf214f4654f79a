"""Benchmarks to a table.

    python evaluate.py                                    the newest model under runs/, on its own benchmarks
    torchrun --standalone --nproc_per_node=8 evaluate.py --model runs/sft/final runs/redi/final --data benchmarks/
    python evaluate.py --model DIR --benchmarks math500 my_problems.jsonl --data benchmarks/ --n 4 --limit 100

Every sample goes to samples.jsonl in the out folder, the table's rows to results.json.
Where a flag is not given, the model's run or the recipe decides ([evaluate]), then the default, which is the paper's.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from nanoredi import benchmarks
from nanoredi.config import EvaluateConfig, RediConfig, option, read_flags, read_recipe, resolve
from nanoredi.distributed import world
from nanoredi.errors import UserError, run_script
from nanoredi.evaluation import evaluate
from nanoredi.report import table
from nanoredi.runs import newest_model, recipe_of


@dataclass
class EvaluateFlags(EvaluateConfig):
    """evaluate.py's own flags."""

    model: list[str] = option([], "Hugging Face folders; none: the newest model under runs/")
    out: str = option("", "folder for samples.jsonl and results.json; empty: a new one under runs/evaluate/")


def main(argv: list[str]) -> None:
    recipe, flags = read_flags(__doc__, argv, "evaluate", EvaluateFlags)
    folders = flags.get("evaluate", {}).get("model") or [newest_model()]
    tables = read_recipe(recipe) if recipe else recipe_of(folders[0])
    config = resolve(EvaluateFlags, "evaluate", tables, flags)
    tests = [benchmarks.load(name, config.data, config.limit) for name in config.benchmarks]
    pairs = resolve(RediConfig, "redi", tables)

    with world() as ranks:
        out = Path(ranks.first(lambda: _new_folder(config.out)))
        rows = []
        for folder in folders:
            rows += evaluate(folder, folder, tests, config, out, ranks, pairs=pairs)
        if ranks.rank == 0:
            (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
        ranks.say(f"{table(rows)}\n\nwritten to {out}")


def _new_folder(out: str) -> str:
    """A new folder for the results: the one that was asked for, or one named by the time."""
    path = Path(out or f"runs/evaluate/{time.strftime('%Y-%m-%d-%H%M%S')}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not empty: give another --out")
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


if __name__ == "__main__":
    run_script(main)
