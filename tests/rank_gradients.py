"""Writes the gradients of one optimiser step, summed over the ranks that torchrun gives it.

torchrun --nproc_per_node 2 tests/rank_gradients.py DATA OUT SHARD_SIZE
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from nanoredi.config import RediConfig
from nanoredi.data import load_pairs
from nanoredi.distributed import shard, world
from nanoredi.model import Qwen2
from nanoredi.tokenizer import Tokenizer
from nanoredi.trainer import train_step, weighted_sequences

data_folder, out = map(Path, sys.argv[1:3])
shard_size = int(sys.argv[3])
config = RediConfig(
    model=str(data_folder / "model"), data=str(data_folder / "pairs.jsonl"), clip=1e9, cache=str(out / "cache")
)
with world() as ranks:
    tokenizer = Tokenizer(config.model)
    ranks.first(lambda: load_pairs(config.data, tokenizer, 800, 19_000, config.cache).notes)
    data = load_pairs(config.data, tokenizer, 800, 19_000, config.cache)
    for name, rows, max_tokens in (("many", np.arange(16), 300), ("one", np.arange(1), 300)):
        model = shard(Qwen2.from_pretrained(config.model), ranks, torch.float32, shard_size=shard_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        grads = {}

        def keep(*_):
            for name, p in model.named_parameters():  # noqa: B023
                grads[name] = p.grad.full_tensor() if ranks.size > 1 else p.grad.clone()  # noqa: B023

        optimizer.register_step_pre_hook(keep)
        step = replace(config, max_tokens_per_micro_batch=max_tokens, shard_size=shard_size)
        train_step(model, optimizer, weighted_sequences(config, data, rows), step, ranks)
        if ranks.rank == 0:
            save_file(grads, out / f"{name}.safetensors")
