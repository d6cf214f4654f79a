"""Stage 2: Reinforcement Distillation from pairs of a correct and an incorrect trace.

    python train_redi.py                                  the whole method on the embedded toy, stage 1 included
    torchrun --standalone --nproc_per_node=8 train_redi.py --recipe qwen2.5-math-1.5b \\
        --model runs/sft/final --data pairs.jsonl --out runs/redi
    torchrun ... train_redi.py --recipe qwen2.5-math-1.5b-dpo ...        its rivals: --objective dpo, simpo, sft

Rows of the data are {"prompt", "chosen", "rejected"}, each a text or a list of messages.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoredi import toy
from nanoredi.common.errors import UserError, run_script
from nanoredi.common.flags import read_flags, read_recipe, resolve
from nanoredi.common.runs import open_run
from nanoredi.config import EvaluateConfig, RediConfig, SftConfig, ToyConfig
from nanoredi.data import benchmarks
from nanoredi.evaluation.evaluate import evaluate
from nanoredi.evaluation.samples import Samples
from nanoredi.report.tables import read_results, table
from nanoredi.trainer.distributed import World, world
from nanoredi.trainer.loop import train


def main(argv: list[str]) -> None:
    recipe, flags = read_flags(__doc__, argv, "redi", RediConfig, others=("evaluate", "sft", "toy"))
    own_model = flags.get("redi", {}).get("model")
    # The toy's rates would ruin a real model: without a recipe a model of one's own gets the paper's.
    tables = read_recipe(recipe or "toy") if recipe or not own_model else {}
    config, evaluation, stage_1, toy_config = (
        resolve(kind, name, tables, flags)
        for name, kind in (("redi", RediConfig), ("evaluate", EvaluateConfig), ("sft", SftConfig), ("toy", ToyConfig))
    )
    if not config.model and config.data:
        raise UserError("--data needs a model to train on it: give --model DIR, the one of stage 1")

    out = Path(config.out)
    configs: dict[str, Any] = {"redi": config, "evaluate": evaluation}
    is_toy = not config.model
    if is_toy:
        folder = out / "data"
        stage_1 = replace(
            stage_1, model=str(folder / "model"), data=str(folder / "sft.jsonl"), out=str(out / "sft"), seed=config.seed
        )
        config = replace(
            config,
            model=str(out / "sft" / "final"),
            data=str(folder / "pairs.jsonl"),
            watch=str(folder / "watch.jsonl"),
        )
        evaluation = replace(evaluation, benchmarks=[str(folder / "toy.jsonl")])
        configs = {"redi": config, "evaluate": evaluation, "sft": stage_1, "toy": toy_config}

    elif config.evaluate:
        _benchmarks(evaluation)  # for what is wrong with them, before hours of training

    with world() as ranks:
        if ranks.first(lambda: open_run(config.out, configs)):
            ranks.say(f"{out} holds this run, finished")
        else:
            if is_toy:
                ranks.say(f"no --model: the toy is made in {folder}, and stage 1 trained on it first")
                ranks.first(lambda: toy.make(folder, toy_config, config.seed))
                if not ranks.first(lambda: open_run(stage_1.out, {"sft": stage_1, "evaluate": evaluation})):
                    train(stage_1, ranks)
            train(config, ranks)
        if config.evaluate:
            show_results(config, evaluation, ranks)


def show_results(config: RediConfig, evaluation: EvaluateConfig, ranks: World) -> None:
    """Evaluate the start's model and the final one, unless that is done; write results.json and print its table."""
    out = Path(config.out)
    if not ranks.first(lambda: (out / "results.json").exists()):
        tests = _benchmarks(evaluation)
        final = "SFT continued" if config.objective == "sft" else config.objective.upper()
        models = {"SFT": Path(config.model), final: out / "final"}
        ranks.first(lambda: Samples(out).claim(models, tests, evaluation))
        rows = []
        for name, folder in models.items():
            rows += evaluate(name, folder, tests, evaluation, out, ranks, pairs=config)
        if ranks.rank == 0:
            (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    ranks.say("\n" + ranks.first(lambda: table(read_results(out))))


def _benchmarks(evaluation: EvaluateConfig) -> list[benchmarks.Benchmark]:
    return [benchmarks.load(name, evaluation.data, evaluation.limit) for name in evaluation.benchmarks]


if __name__ == "__main__":
    run_script(main)
