"""Stage 2: Reinforcement Distillation from pairs of a correct and an incorrect trace.

    python train_redi.py                                  the whole method on the embedded toy, stage 1 included
    torchrun --standalone --nproc_per_node=8 train_redi.py --recipe qwen2.5-math-1.5b \\
        --model runs/sft/final --data pairs.jsonl --out runs/redi
    torchrun ... train_redi.py --recipe qwen2.5-math-1.5b-dpo ...        its rivals: --objective dpo, simpo, sft

Rows of the data are {"prompt", "chosen", "rejected"}, each a text or a list of messages.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoredi import toy
from nanoredi.common.errors import UserError, run_script
from nanoredi.common.files import write_json
from nanoredi.common.flags import read_flags, resolve
from nanoredi.common.runs import dtype_of_run, open_run
from nanoredi.config import EvaluateConfig, RediConfig, SftConfig, ToyConfig
from nanoredi.data import benchmarks
from nanoredi.evaluation.evaluate import evaluate
from nanoredi.evaluation.samples import Samples
from nanoredi.report.tables import read_results, table
from nanoredi.trainer.distributed import World, settled_dtype, world
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
    if not ranks.first(lambda: _has_results(out)):
        tests = _benchmarks(evaluation)
        final = "SFT continued" if config.objective == "sft" else config.objective.upper()
        models = {"SFT": Path(config.model), final: out / "final"}
        evaluation.dtype = ranks.first(lambda: Samples(out).claim(models, tests, evaluation))
        rows = []
        for name, folder in models.items():
            rows += evaluate(name, folder, tests, evaluation, out, ranks, pairs=config)
        ranks.first(lambda: write_json(out / "results.json", rows))
    ranks.say("\n" + ranks.first(lambda: table(read_results(out))))


def _has_results(out: Path) -> bool:
    try:
        return bool(read_results(out))
    except UserError:  # there are none, or what a full disk left of them
        return False


def _benchmarks(evaluation: EvaluateConfig) -> list[benchmarks.Benchmark]:
    return benchmarks.load_all(evaluation.benchmarks, evaluation.data, evaluation.limit, evaluation.template)


if __name__ == "__main__":
    run_script(main)
