"""Writes the gradients of one optimiser step of REDI and of DPO, summed over the ranks that torchrun gives it.

torchrun --nproc_per_node 2 tests/rank_gradients.py DATA OUT SHARD_SIZE
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from kept import KeepingAdamW
from safetensors.torch import save_file

from nanoredi import objectives
from nanoredi.config import RediConfig
from nanoredi.data.sequences import load_pairs
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.distributed import shard, world
from nanoredi.trainer.reference import reference_logps
from nanoredi.trainer.step import train_step

data_folder, out = map(Path, sys.argv[1:3])
shard_size = int(sys.argv[3])
config = RediConfig(
    model=str(data_folder / "model"), data=str(data_folder / "pairs.jsonl"), clip=1e9, cache=str(out / "cache")
)
with world() as ranks:
    tokenizer = Tokenizer(config.model)
    ranks.first(lambda: load_pairs(config.data, tokenizer, 800, 19_000, config.cache).notes)
    data = load_pairs(config.data, tokenizer, 800, 19_000, config.cache)
    dpo = replace(config, objective="dpo", alpha=None, chosen_weight=None, neg_weight_gamma=None, beta=0.5)
    for name, objective, rows in (
        ("many", config, np.arange(16)),
        ("one", config, np.arange(1)),
        ("many-dpo", dpo, np.arange(16)),
        ("one-dpo", dpo, np.arange(1)),
    ):
        # A single rank recomputes nothing.
        kept = "off" if ranks.size == 1 else "attention" if objective is dpo else "products"
        step = replace(objective, max_tokens_per_micro_batch=300, shard_size=shard_size, activation_checkpointing=kept)
        model = shard(Qwen2.from_pretrained(config.model), ranks, torch.float32, step)
        if objective is dpo:
            reference, _ = reference_logps(dpo, model, data, torch.float32, ranks)
            data.reference = reference + np.arange(len(reference) * 2, dtype=np.float32).reshape(-1, 2)[::-1] % 7
        optimizer = KeepingAdamW(model)
        train_step(model, optimizer, objectives.units(step, [data.row(i) for i in rows]), step, ranks)
        if ranks.rank == 0:
            save_file(optimizer.grads, out / f"{name}.safetensors")
