"""Evaluate models, or the completions of another engine, on benchmarks.

    python evaluate.py           # the newest run's model on its benchmarks
    torchrun --standalone --nproc_per_node=8 evaluate.py \\
        --model runs/sft/final runs/redi/final --data benchmarks
    python evaluate.py --model DIR --benchmarks math500 my_problems.jsonl \\
        --data benchmarks --n 4 --limit 100
    python evaluate.py --model runs/redi --along   # which checkpoint is best?
    python evaluate.py --completions vllm.jsonl --benchmarks math500 \\
        --data benchmarks

Every sample is written to samples.jsonl in the out folder as soon as it is finished; the same command with the same
--out makes only those that are missing. The table goes to results.json, results.txt and results.md. Two models are
compared problem by problem (differences.json). --completions grades what another engine wrote (docs/layouts.md). A flag
that is not given is taken from the recipe or the model's run ([evaluate]), else from the defaults, which are the paper's.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoredi.common.disk import lock, remove_leftovers, writing_together
from nanoredi.common.errors import UserError, run_script
from nanoredi.common.files import read_rows
from nanoredi.common.flags import option, read_flags, read_recipe, resolve
from nanoredi.common.runs import check_model, models_along, newest_model, recipe_of
from nanoredi.config import EvaluateConfig, RediConfig
from nanoredi.data import benchmarks
from nanoredi.evaluation.completions import grade_file
from nanoredi.evaluation.evaluate import evaluate_all
from nanoredi.evaluation.scores import Row, compare, mark_best, step_of, summarise, unended
from nanoredi.report.tables import write
from nanoredi.trainer.distributed import world


@dataclass
class EvaluateFlags(EvaluateConfig):
    """evaluate.py's own flags."""

    model: list[str] = option([], "Hugging Face folders; none: the newest model under runs/")
    along: bool = option(False, "--model is a run's folder: evaluate its initial model, every step-* and final")
    completions: list[str] = option([], "files that another engine wrote, graded instead of evaluating a model")
    paper: bool = option(False, "add the rows of the paper's tables 1 to 4")
    wide: bool = option(False, "show all columns of the table, however wide; results.md has them in any case")
    out: str = option(
        "", "folder for samples and results; empty: a new one under runs/evaluate/, or with --along the run's"
    )


def main(argv: list[str]) -> None:
    recipe, flags = read_flags(__doc__, argv, "evaluate", EvaluateFlags)
    given = flags.get("evaluate", {})
    if given.get("completions"):
        idle = [
            name
            for name in given
            if name not in ("completions", "benchmarks", "data", "limit", "think", "paper", "wide", "out")
        ]
        if idle:
            raise UserError(f"--{idle[0]} has no effect on --completions: give one or the other")
        if "data" in given and "benchmarks" not in given:  # then the gold answers are those in the file
            raise UserError("--data has no effect without --benchmarks: name those that the completions answer")
        config = resolve(EvaluateFlags, "evaluate", read_recipe(recipe) if recipe else {}, flags)
        _grade(config, named="benchmarks" in given)
        return
    run = _run(given) if given.get("along") else None
    if run:
        models: Mapping[str, str | Path] = models_along(run)
    else:
        models = {folder: folder for folder in map(check_model, given.get("model") or [newest_model()])}
    tables = read_recipe(recipe) if recipe else recipe_of(run / "final" if run else next(iter(models)))
    config = resolve(EvaluateFlags, "evaluate", tables, flags)
    tests = benchmarks.load_all(config.benchmarks, config.data, config.limit, config.template)
    pairs = resolve(RediConfig, "redi", tables)

    with world(config.timeout_minutes) as ranks:
        in_run = run and Path(config.out or run).resolve() == run.resolve()
        out = run if in_run else Path(ranks.first(lambda: _folder(config.out)))
        notes = [
            *_frames(config),
            f"samples go to {out}; after an interruption the same command with --out {out} resumes",
        ]
        if run and step_of(next(iter(models))):
            notes.append(f"the model that {run} started from does not exist any more, and is left out")
        rows = evaluate_all(models, tests, config, out, ranks, pairs, adds=run is not None, notes="\n".join(notes))
        ranks.say(ranks.first(lambda: _write(out, rows, config)) + f"\n\nwritten to {out}")


def _run(given: dict[str, Any]) -> Path:
    """The folder of the run that --along evaluates."""
    if len(given.get("model", [])) > 1:
        raise UserError("--along takes one run: give its folder to --model")
    return Path(given["model"][0]) if given.get("model") else Path(newest_model()).parent


def _frames(config: EvaluateFlags) -> list[str]:
    """A note on problems that are asked without the paper's frame."""
    paths = [name for name in config.benchmarks if name not in benchmarks.NAMED]
    text = f"{', '.join(paths)}: asked as they are; --template paper asks them in the paper's words"
    return [text] if paths and not config.template else []


def _grade(config: EvaluateFlags, named: bool) -> None:
    """Grade completions; without named benchmarks, by the gold answers in the files themselves."""
    tests = benchmarks.load_all(config.benchmarks, config.data) if named else []
    rows: list[Row] = []
    samples: list[Row] = []
    for file, name in zip(config.completions, benchmarks.unique_names([Path(f).resolve() for f in config.completions])):
        for graded in grade_file(file, name, tests, thinking=config.think == "forced", limit=config.limit):
            n = 1 + max(s["sample"] for s in graded)
            rows.append({"model": graded[0]["model"], "benchmark": graded[0]["benchmark"], **summarise(graded, n)})
            samples += graded
    out = Path(_folder(config.out, goes_on=False))
    with writing_together(out) as beside:
        # Foreign text may contain half a surrogate pair, which UTF-8 cannot encode.
        with open(beside / "samples.jsonl", "w", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
        text = _write(beside, rows, config)
    print(f"{text}\n\nwritten to {out}")


def _write(out: Path, rows: list[Row], config: EvaluateFlags) -> str:
    """Write the results. Returns the table with notes on it."""
    rows, best = mark_best(rows) if config.along else (rows, "")
    models = list(dict.fromkeys(row["model"] for row in rows))

    def samples():
        return (row for _, row in read_rows(str(out / "samples.jsonl")))

    compared = compare(samples(), *models) if len(models) == 2 and not best else []
    parts = [write(out, rows, compared, config.paper, config.wide), *([best] if best else [])]
    if config.think == "forced":
        parts += unended(samples(), "--think own")
    return "\n\n".join(parts)


def _folder(out: str, goes_on: bool = True) -> str:
    """The folder for the results: --out, which may hold an evaluation to resume, or else a new and locked one, by
    default named by the time."""
    path = Path(out or f"runs/evaluate/{time.strftime('%Y-%m-%d-%H%M%S')}")
    if goes_on and out and (path / "evaluation.json").exists():
        return out
    try:
        remove_leftovers(path)  # also what a killed job had begun to move to here
        if path.exists() and (
            not path.is_dir() or any(p.name[0] != "." and p.suffix != ".writing" for p in path.iterdir())
        ):
            raise UserError(f"{path} is not empty: give another --out")
        lock(path)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; give another --out") from None
    return str(path)


if __name__ == "__main__":
    run_script(main)
