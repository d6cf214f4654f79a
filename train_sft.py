"""Stage 1: supervised fine-tuning on correct traces.

    python train_sft.py                                     # the embedded toy
    torchrun --standalone --nproc_per_node=8 train_sft.py \\
        --recipe qwen2.5-math-1.5b --model DIR --data sft.jsonl --out runs/sft

Rows of the data are {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, or have one
of the other layouts in docs/data.md.
"""

from dataclasses import replace
from pathlib import Path

from nanoredi import toy
from nanoredi.common.errors import run_script
from nanoredi.common.flags import read_flags, resolve
from nanoredi.common.runs import dtype_of_run, open_run
from nanoredi.config import EvaluateConfig, SftConfig, ToyConfig
from nanoredi.trainer.distributed import world
from nanoredi.trainer.dtype import settled_dtype
from nanoredi.trainer.loop import train


def main(argv: list[str]) -> None:
    recipe, flags = read_flags(__doc__, argv, "sft", SftConfig, others=("evaluate", "toy"))
    tables = toy.tables_for(recipe, flags, "sft")
    config = resolve(SftConfig, "sft", tables, flags)
    config.dtype = settled_dtype(config.dtype, dtype_of_run(config.out, "sft"))
    evaluation = resolve(EvaluateConfig, "evaluate", tables, flags)
    toy_config = resolve(ToyConfig, "toy", tables, flags)
    folder, is_toy = Path(config.out) / "data", not config.model
    if is_toy:
        config, evaluation = toy.with_files(folder, replace(config, model=str(folder / "model")), evaluation)
    configs = {"sft": config, "evaluate": evaluation, **({"toy": toy_config} if is_toy else {})}

    with world(config.timeout_minutes) as ranks:
        if ranks.first(lambda: open_run(config.out, configs)):
            return ranks.say(f"{config.out} holds this run, which is finished")
        if is_toy:
            ranks.first(lambda: toy.make(folder, toy_config, config.seed))
        train(config, ranks)


if __name__ == "__main__":
    run_script(main)
