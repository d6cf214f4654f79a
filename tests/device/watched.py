"""Whole steps of training and sampling on a simulated CUDA device, and what they do to it, as JSON on stdout.

PYTHONPATH=. python tests/device/watched.py
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compiled import compiled
from fake_cuda import Watch, fake, launches, waits
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

torch.cuda.is_available = lambda: True  # Triton is imported where there is a GPU
from nanoredi import objectives  # noqa: E402
from nanoredi.config import RediConfig, SamplingConfig  # noqa: E402
from nanoredi.data.sequences import Sequence  # noqa: E402
from nanoredi.kernels import dispatch  # noqa: E402
from nanoredi.model import hf_folder  # noqa: E402
from nanoredi.model.attention import PackedAttention  # noqa: E402
from nanoredi.model.config import Qwen2Config  # noqa: E402
from nanoredi.model.qwen2 import Block, Qwen2, rotary_angles  # noqa: E402
from nanoredi.sampler.sampler import Sampler  # noqa: E402
from nanoredi.trainer import distributed  # noqa: E402
from nanoredi.trainer import step as trainer_step  # noqa: E402
from nanoredi.trainer.optimizer import AdamW  # noqa: E402

# Qwen2.5-Math-1.5B's sizes but for the number of layers.
SIZES = Qwen2Config(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=2,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
)
KINDS = {"redi": RediConfig(objective="redi"), "dpo": RediConfig(objective="dpo")}
FINAL_LAYERS = 28  # the model's own number
TOKENS = 38_000  # of a micro-batch of one pair of the longest sequences
shard_mesh, gradient_square = distributed.shard_mesh, trainer_step.gradient_square


def pairs(lengths: np.ndarray) -> list[tuple[Sequence, Sequence]]:
    """Traces of these lengths (pairs, 2), their first 200 tokens the prompt."""
    rng = np.random.default_rng(0)

    def trace(side: str, n: int) -> Sequence:
        return Sequence(rng.integers(0, 1000, n).astype(np.int32), np.arange(n) >= 200, side=side)

    return [(trace("chosen", n), trace("rejected", m)) for n, m in lengths.tolist()]


def train(ranks: int, tied: bool, objective: str, shard_size: int = 0, offload: bool = False, layers: int = 2) -> dict:
    """An optimiser step of one of so many ranks, in bf16 with activation checkpointing: two pairs a rank, of lengths
    like the paper's; where there are other layers than two, of its longest."""
    config = replace(KINDS[objective], max_tokens_per_micro_batch=40_000, shard_size=shard_size, offload=offload)
    world = distributed.World(0, ranks, torch.device("cuda:0"))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = shard_mesh(world, shard_size)  # it cannot be made among fake tensors
    distributed.shard_mesh = lambda *_: mesh
    gradients, waited = set(), []

    def seen(model: Qwen2) -> torch.Tensor:
        gradients.update((str(p.grad.device), str(p.grad.dtype)) for p in model.parameters())
        waited.append(len(waits))
        return gradient_square(model)

    trainer_step.gradient_square = seen
    longest = np.full((2 * ranks, 2), TOKENS // 2 + 1)  # the last token goes through nothing
    lengths = longest if layers > 2 else np.random.default_rng(0).integers(3000, 19_000, longest.shape)
    units = objectives.units(config, pairs(lengths))
    with fake:
        with torch.device("cuda"):
            model = Qwen2(replace(SIZES, tie_word_embeddings=tied, num_hidden_layers=layers))
        distributed.shard(model, world, torch.bfloat16, config)
        optimizer = AdamW(model, config.lr, config.weight_decay)
        with Watch() as watch:
            figures, *_ = trainer_step.train_step(model, optimizer, units, config, world)
        state = [*optimizer.parameters, *optimizer.exp_avg, *optimizer.exp_avg_sq, *optimizer.num_steps]
        with Watch() as saving:
            for weight in model.parameters():
                hf_folder._whole(weight)
    dist.destroy_process_group()
    return {
        **watched(watch),
        "result": [str(figures.device), list(figures.shape)],
        "gradients": sorted(gradients),
        "state": sorted({str(distributed.local(x).device) for x in state}),
        "waits before the gradient is read": waited,
        "saving": dict(saving.kernels),
        "peak": watch.peak,
    }


def watched(watch: Watch) -> dict:
    return {"kernels": dict(watch.kernels), "wrong": watch.wrong}


def in_bf16(make: Callable) -> Any:
    """What belongs to a model on the device, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = make()
    torch.set_default_dtype(torch.float32)
    return made


def block(kept: str) -> dict:
    """A block's forward and backward: its kernels, and the bytes a token that those between products and attention move."""
    watch = Watch()
    with fake:
        one = in_bf16(lambda: Block(SIZES, 0))
        one.activation_checkpointing = kept
        x = in_bf16(lambda: torch.empty(TOKENS, SIZES.hidden_size)).requires_grad_()
        positions = torch.zeros(TOKENS, dtype=torch.int64, device="cuda")
        rope = rotary_angles(positions, SIZES, torch.bfloat16)
        attend = PackedAttention(torch.zeros(3, dtype=torch.int32, device="cuda"), TOKENS // 2)
        with watch:
            stream, added = one(x, None, rope, attend)
            out = stream if added is None else stream + added
            torch.autograd.grad(out, (x, *one.parameters()), torch.empty_like(out))
    others = [name for name in watch.kernels if not re.search("mm|attn", name)]
    moved = sum(watch.bytes[name] for name in others) / TOKENS
    return {**watched(watch), "kB a token": round(moved / 1e3)}


def sampler(layers: int, **settings: float) -> Sampler:
    model = in_bf16(lambda: Qwen2(replace(SIZES, num_hidden_layers=layers)))
    return Sampler(model.pack(), [1], SamplingConfig(cache_gb=4.0, **settings))


def decode(layers: int, longest: int = 5000, **settings: float) -> dict:
    """A decode step, as its CUDA graph captures it, if the longest row has so many tokens."""
    with fake:
        sampling = sampler(layers, **settings)
        given = torch.full((2, sampling.batch_size), sampling.batch_size, device="cuda")
        with torch.inference_mode(), Watch() as watch:
            columns = sampling.graphs.columns(longest)
            tokens = sampling._advance(given[0], given[1].view(torch.float64), columns)
    return {**watched(watch), "result": [str(tokens.device), list(tokens.shape)]}


def whole_decode() -> dict:
    """The kernels of the whole model's decode step, computed from those of two and of three layers."""
    two, three = (sum(decode(layers)["kernels"].values()) for layers in (2, 3))
    return {"kernels": two + (FINAL_LAYERS - 2) * (three - two)}


def prefill() -> dict:
    """The first chunk of one prompt, the last of another, and padding."""
    chunks = [(list(range(1)), 0, 150), (list(range(1, 9)), 1024, 1724)]
    with fake:
        sampling = sampler(2)
        ids = torch.zeros(1024, dtype=torch.int64, device="cuda")
        with torch.inference_mode(), Watch() as watch:
            attend, positions = sampling.cache.prefill(chunks, 174)
            hidden = sampling.model.hidden_states(ids, positions, attend)
    return {**watched(watch), "result": [str(hidden.device), list(hidden.shape)]}


def of_one() -> list:
    """The launches of a step and of a decode step where numbers are 1 that Triton then takes for constants: one token of
    one sequence, one key-value head, one row, one page."""
    config = replace(SIZES, vocab_size=41, hidden_size=48, intermediate_size=96, max_position_embeddings=256)
    config = replace(config, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    first = len(launches)
    with fake:
        model = in_bf16(lambda: Qwen2(config))
        row, cu_seqlens = (
            torch.zeros(n, dtype=dtype, device="cuda") for n, dtype in ((1, torch.int64), (2, torch.int32))
        )
        for loss in (
            lambda: model.loss(row, row, cu_seqlens, row, row.float(), row, 1)[0],
            lambda: model.logprobs(row, row, row.float(), row, row, cu_seqlens, 1).sum(),
        ):
            loss().backward()
        with torch.inference_mode():
            sampling = Sampler(model.pack(), [1], SamplingConfig(cache_gb=0.001, batch_size=1, top_p=0.9, top_k=5))
            sampling._advance(row, row.double(), 1)
    return launches[first:]


def mistakes() -> dict:
    """What a step must not do, and one thing that it may: "wrong" lists those that the watch or the device notices."""
    there, here, late = (lambda: torch.ones(3, device="cuda")), (lambda: torch.ones(3)), {"non_blocking": True}
    tries: dict[str, Callable] = {
        "a number from the device": lambda: there().sum().item(),
        "a size that the device knows": lambda: there()[there() > 0],
        "a tensor from the device": lambda: there().to("cpu"),
        "a copy from memory that is not pinned": lambda: there().copy_(here(), **late),
        "a copy that is waited for": lambda: here().pin_memory().to("cuda"),
        "a CPU tensor beside a CUDA one": lambda: there() + torch.ones(()),
        "synchronize": torch.cuda.synchronize,
        "an upload": lambda: here().pin_memory().to("cuda", **late),
    }
    wrong = []
    for name, action in tries.items():
        watch = Watch()
        try:
            with fake, watch:
                action()
        except (DataDependentOutputException, DynamicOutputShapeException):
            watch.wrong.append(name)
        if watch.wrong:
            wrong.append(name)
    return {"kernels": {}, "wrong": wrong}


CASES: dict[str, Callable[[], dict]] = {
    "8 ranks, REDI, tied": lambda: train(8, True, "redi"),
    "8 ranks, DPO, untied": lambda: train(8, False, "dpo"),
    "1 rank, REDI, tied": lambda: train(1, True, "redi"),
    "2 groups of 4 ranks, REDI, tied": lambda: train(8, True, "redi", 4),
    "1 rank, offloaded, four layers": lambda: train(1, True, "redi", offload=True, layers=4),
    "8 ranks, offloaded": lambda: train(8, True, "redi", offload=True),
    "decode": lambda: decode(2),
    "decode, top-k": lambda: decode(2, top_k=20),
    "decode, short rows": lambda: decode(2, longest=1000),
    "decode, all layers": whole_decode,
    "prefill": prefill,
    "block, off": lambda: block("off"),
    "block, attention": lambda: block("attention"),
    "block, products": lambda: block("products"),
    "mistakes": mistakes,
}


def real(make: Callable) -> Callable:
    """What belongs to the host has contents."""

    def made(*args: Any) -> Any:
        with _disable_current_modes():
            return make(*args)

    return made


trainer_step.pack = real(trainer_step.pack)
import_package = dispatch._import_package
# The CPU's package looks into its tensors.
dispatch._import_package = lambda device_type: None if device_type == "cpu" else import_package(device_type)
F.scaled_dot_product_attention = lambda q, *_, **__: q.clone()  # which kernel it is the device's libraries decide
if __name__ == "__main__":
    found = {name: case() for name, case in CASES.items()}
    made = compiled(launches)
    json.dump({"steps": found, "compiled": made, "of one": compiled(of_one(), (90,))}, sys.stdout)
