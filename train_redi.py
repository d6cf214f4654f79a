"""Stage 2: Reinforcement Distillation from pairs of a correct and an incorrect trace.

    python train_redi.py               # both stages on the embedded toy
    torchrun --standalone --nproc_per_node=8 train_redi.py \\
        --recipe qwen2.5-math-1.5b \\
        --model runs/sft/final --data pairs.jsonl --out runs/redi
    python train_redi.py --objective dpo ...       # a rival: sft, dpo, simpo

Rows of the data are {"prompt", "chosen", "rejected"}, each a text or a list of messages; docs/data.md has more layouts.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoredi import toy
from nanoredi.common.errors import UserError, run_script
from nanoredi.common.files import read_rows
from nanoredi.common.flags import read_flags, resolve
from nanoredi.common.runs import dtype_of_run, final_name, open_run
from nanoredi.config import EvaluateConfig, RediConfig, SftConfig, ToyConfig
from nanoredi.data import benchmarks
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.evaluation.evaluate import evaluate_all
from nanoredi.evaluation.samples import kept_results
from nanoredi.evaluation.scores import unended
from nanoredi.report.tables import details, show
from nanoredi.trainer.distributed import World, world
from nanoredi.trainer.dtype import settled_dtype
from nanoredi.trainer.loop import train


def main(argv: list[str]) -> None:
    recipe, flags = read_flags(__doc__, argv, "redi", RediConfig, others=("evaluate", "sft", "toy"))
    tables = toy.tables_for(recipe, flags, "redi")
    config, evaluation, stage_1, toy_config = (
        resolve(kind, name, tables, flags)
        for name, kind in (("redi", RediConfig), ("evaluate", EvaluateConfig), ("sft", SftConfig), ("toy", ToyConfig))
    )
    for stage, name in ((config, "redi"), (stage_1, "sft")):
        stage.dtype = settled_dtype(stage.dtype, dtype_of_run(config.out, name))
    out = Path(config.out)
    folder, is_toy = out / "data", not config.model
    configs: dict[str, Any] = {"redi": config, "evaluate": evaluation}
    if is_toy:
        stage_1 = replace(stage_1, model=str(folder / "model"), out=str(out / "sft"), seed=config.seed)
        stage_1, _ = toy.with_files(folder, stage_1, evaluation)
        config, evaluation = toy.with_files(folder, replace(config, model=str(out / "sft" / "final")), evaluation)
        configs = {"redi": config, "evaluate": evaluation, "sft": stage_1, "toy": toy_config}
    elif config.evaluate:
        _benchmarks(evaluation)  # so that errors in them are found before hours of training
        Tokenizer(config.model).prompt(benchmarks.frame("1", evaluation.template, evaluation.system))
    if config.watch_every and not config.watch:
        raise UserError("--watch_every needs the pairs to watch: give --watch FILE")

    with world(config.timeout_minutes) as ranks:
        if ranks.first(lambda: open_run(config.out, configs)):
            ranks.say(f"{out} holds this run, which is finished")
        else:
            if is_toy:
                ranks.say(f"no --model: makes the toy in {folder}, and trains stage 1 on it first")
                ranks.first(lambda: toy.make(folder, toy_config, config.seed))
                if not ranks.first(lambda: open_run(stage_1.out, {"sft": stage_1, "evaluate": evaluation})):
                    train(stage_1, ranks)
            train(config, ranks)
        if config.evaluate:
            show_results(config, evaluation, ranks)


def show_results(config: RediConfig, evaluation: EvaluateConfig, ranks: World) -> None:
    """Evaluate the initial model and the final one, unless results.json has them already, and print the table."""
    out = Path(config.out)
    models = {"SFT": Path(config.model), final_name(config.objective): out / "final"}
    rows = ranks.first(lambda: kept_results(out))
    if models.keys() - {row["model"] for row in rows}:
        rows = evaluate_all(models, _benchmarks(evaluation), evaluation, out, ranks, pairs=config, adds=True)
    ranks.say("\n" + show([details(rows)]))
    if evaluation.think == "forced" and (samples := out / "samples.jsonl").exists():
        flag = "--think own to evaluate.py, or --evaluate.think own to a new run"
        ranks.say(ranks.first(lambda: "\n".join(unended((row for _, row in read_rows(str(samples))), flag))))


def _benchmarks(evaluation: EvaluateConfig) -> list[benchmarks.Benchmark]:
    return benchmarks.load_all(evaluation.benchmarks, evaluation.data, evaluation.limit, evaluation.template)


if __name__ == "__main__":
    run_script(main)
