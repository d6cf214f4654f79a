"""Whole optimiser steps of REDI (forward, backward, AdamW): tokens a second and peak memory, beside the usual ways.

    python bench/train_step.py                                this machine's sizes: a GPU's or a CPU's
    python bench/train_step.py --pairs 1 --steps 1            shorter, for a dry run
    python bench/train_step.py --profile                      where nanoredi's time goes

The original's way is a transformers model with activation checkpointing, one right-padded pair at a time, with full
logits and their log-softmax. TRL's way is its DPOTrainer with its defaults, which include a reference model, if it is
installed. nanoredi is measured with the default of --activation_checkpointing, and with more kept for backward (on a
GPU in micro-batches of half the tokens). All have the same weights and pairs. Padding is not counted as tokens. Every
method runs in a fresh process. A time is the median of several steps; compare times within a table only. On a CPU
memory is the peak of the process, weights included; on a GPU that of the tensors. In bf16 each has its defaults:
nanoredi fp32 master weights, the original's way bf16 weights and AdamW states, TRL fp32 weights under autocast.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fresh import figures  # noqa: E402

from nanoredi import objectives  # noqa: E402
from nanoredi.config import RediConfig  # noqa: E402
from nanoredi.data.sequences import SIDES, Sequence  # noqa: E402
from nanoredi.model.config import Qwen2Config  # noqa: E402
from nanoredi.model.qwen2 import Qwen2  # noqa: E402
from nanoredi.trainer.distributed import shard, world  # noqa: E402
from nanoredi.trainer.dtype import compute_dtype, matrix_rate  # noqa: E402
from nanoredi.trainer.optimizer import AdamW  # noqa: E402
from nanoredi.trainer.step import train_step  # noqa: E402

ON_GPU = torch.cuda.is_available()


@dataclass
class Size:
    """A model, and the pairs of a step."""

    config: Qwen2Config
    pairs: int
    prompt: tuple[int, int]  # the shortest and the longest, in tokens
    response: tuple[int, int]
    max_tokens_per_micro_batch: int


QWEN_1_5B = Qwen2Config(151_936, 1536, 8960, 28, 12, 2, 32_768, 300_000.0, tie_word_embeddings=True)
SIZES = (
    {
        "Qwen2.5-Math-1.5B's shape, pairs of mixed lengths": Size(
            QWEN_1_5B,
            pairs=8,
            prompt=(50, 800),
            response=(1_000, 19_000),
            max_tokens_per_micro_batch=40_000,
        ),
        "the same, pairs of 2 x 19,000 tokens": Size(
            QWEN_1_5B,
            pairs=2,
            prompt=(800, 800),
            response=(19_000, 19_000),
            max_tokens_per_micro_batch=40_000,
        ),
    }
    if ON_GPU
    else {
        "135M parameters, pairs of 2 x 500 to 1,500 tokens": Size(
            Qwen2Config(49_152, 576, 1536, 30, 9, 3, 2_048, tie_word_embeddings=True),
            pairs=2,
            prompt=(50, 150),
            response=(450, 1_350),
            max_tokens_per_micro_batch=1_536,
        )
    }
)
ALPHA, LR = 0.8, 1e-6


@dataclass
class Pair:
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def draw_pairs(size: Size) -> list[Pair]:
    """Random tokens; the lengths are log-uniform between the size's bounds."""
    rng = np.random.default_rng(0)

    def some(bounds: tuple[int, int]) -> np.ndarray:
        n = round(np.exp(rng.uniform(*np.log(bounds))))
        return rng.integers(0, size.config.vocab_size, n, dtype=np.int32)

    return [Pair(some(size.prompt), some(size.response), some(size.response)) for _ in range(size.pairs)]


Seconds = list[float]


def timed(step: Callable[[], object], num_steps: int, profiled: bool = False) -> Seconds:
    """Seconds of each step, after one to warm up."""

    def whole() -> float:
        start = time.perf_counter()
        step()
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    whole()
    if profiled:
        with torch.profiler.profile() as profile:
            whole()
        order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60), file=sys.stderr)
    return [whole() for _ in range(num_steps)]


def nanoredi(kept: str, folder: str, size: Size, dtype: torch.dtype, num_steps: int, profiled: bool) -> Seconds:
    # The products of a pair do not fit on a GPU: there a micro-batch is one sequence.
    tokens = size.max_tokens_per_micro_batch // (2 if ON_GPU and kept == "products" else 1)
    config = RediConfig(lr=LR, alpha=ALPHA, activation_checkpointing=kept, max_tokens_per_micro_batch=tokens)
    pairs = draw_pairs(size)
    rows = [tuple(_sequence(p.prompt, getattr(p, side), side) for side in SIDES) for p in pairs]
    units = objectives.units(config, rows)
    with world() as ranks:
        model = Qwen2.from_pretrained(folder)
        shard(model, ranks, dtype, config)
        optimizer = AdamW(model, LR, config.weight_decay)
        return timed(lambda: train_step(model, optimizer, units, config, ranks), num_steps, profiled)


def _sequence(prompt: np.ndarray, trace: np.ndarray, side: str) -> Sequence:
    return Sequence(np.concatenate((prompt, trace)), np.arange(len(prompt) + len(trace)) >= len(prompt), side)


def original(folder: str, size: Size, dtype: torch.dtype, num_steps: int, profiled: bool) -> Seconds:
    from transformers import AutoModelForCausalLM

    device = "cuda" if ON_GPU else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4, fused=True)
    pairs = draw_pairs(size)

    def step() -> None:
        for pair in pairs:
            rows = [np.concatenate((pair.prompt, completion)) for completion in (pair.chosen, pair.rejected)]
            longest = max(map(len, rows))
            ids = torch.tensor(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]), device=device).long()
            lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
            place = torch.arange(longest, device=device)
            logits = model(input_ids=ids, attention_mask=(place < lengths).long(), use_cache=False).logits
            logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            learned = (place[1:] >= len(pair.prompt)) & (place[1:] < lengths)
            chosen, rejected = ((logps * learned).sum(1) / learned.sum(1)).unbind()
            ((-chosen + ALPHA * rejected) / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, num_steps, profiled)


def trl(folder: str, size: Size, dtype: torch.dtype, num_steps: int, profiled: bool) -> Seconds:
    """DPOTrainer takes text, so token 7 is written " t7", in a vocabulary of such words."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    vocabulary = {f"t{i}": i for i in range(size.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t1")

    def text(tokens: np.ndarray) -> str:
        return "".join(f" t{token}" for token in tokens)

    rows = [
        {"prompt": text(p.prompt), "chosen": text(p.chosen), "rejected": text(p.rejected)} for p in draw_pairs(size)
    ]
    seconds: Seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if ON_GPU:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as out:
        settings = DPOConfig(
            output_dir=out,
            max_steps=1 + num_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=size.pairs,
            learning_rate=LR,
            max_length=size.config.max_position_embeddings,
            bf16=dtype == torch.bfloat16,
            use_cpu=not ON_GPU,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        data = Dataset.from_list(rows)
        DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()
    return seconds[1:]


METHODS = {
    "nanoredi": partial(nanoredi, "attention"),
    "nanoredi, products kept": partial(nanoredi, "products"),
    **({} if ON_GPU else {"nanoredi, all kept": partial(nanoredi, "off")}),
    "the original's way": original,
    "TRL's DPOTrainer": trl,
}


def measure(method: str, size: Size, dtype: torch.dtype, folder: str, num_steps: int, profiled: bool) -> dict:
    """Measure a method in this process."""
    seconds = METHODS[method](folder, size, dtype, num_steps, profiled)
    if ON_GPU:
        return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated()}
    return {"seconds": seconds, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def flops(size: Size) -> float:
    """FLOPs of a step's forward and backward, without recomputation."""
    return sum(
        size.config.flops(len(p.prompt) + len(completion) - 1, len(completion))
        for p in draw_pairs(size)
        for completion in (p.chosen, p.rejected)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, help="pairs a step")
    parser.add_argument("--steps", type=int, default=5 if ON_GPU else 2, help="timed steps in each process")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes for each method [2]")
    parser.add_argument("--dtypes", nargs="+", help="float32, bfloat16 [the device's best; a CPU also float32]")
    parser.add_argument("--profile", action="store_true", help="print where nanoredi's time goes, once")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # for the fresh processes
    flags = parser.parse_args()
    if flags.pairs:
        for size in SIZES.values():
            size.pairs = flags.pairs
    if flags.one:
        method, name, dtype, folder = flags.one
        result = measure(method, SIZES[name], getattr(torch, dtype), folder, flags.steps, flags.profile)
        print(json.dumps(result))
        return

    # Only now, because a measured process must not create a tensor before it has joined its process group.
    if not flags.dtypes:
        good = compute_dtype("auto", torch.device("cuda" if ON_GPU else "cpu")) == torch.bfloat16
        flags.dtypes = ["bfloat16"] if ON_GPU else ["float32", "bfloat16"] if good else ["float32"]
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; torch {torch.__version__}")
    for name, size in SIZES.items():
        tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in draw_pairs(size))
        print(f"\n{name}: {size.pairs} pairs, {tokens:,} tokens a step\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            dtype = torch.bfloat16 if ON_GPU else torch.float32
            Qwen2(size.config).init_weights(0).save_pretrained(Path(folder, "model"), dtype)
            common = ["--pairs", str(size.pairs), "--steps", str(flags.steps)]
            if flags.profile:
                run_one("nanoredi", name, str(dtype).removeprefix("torch."), f"{folder}/model", [*common, "--profile"])
                continue
            print(
                "| dtype | method | s a step | tokens/s | of the product rate | peak GB |\n" + "| --- " * 6 + "|",
                flush=True,
            )
            for dtype in flags.dtypes:
                rate = matrix_rate(getattr(torch, dtype), torch.device("cuda" if ON_GPU else "cpu"))
                torch.cuda.empty_cache()  # so that the measured processes can use the memory
                results: dict[str, list] = {method: [] for method in METHODS}
                for _ in range(flags.rounds):
                    for method, collected in results.items():
                        collected.append(run_one(method, name, dtype, f"{folder}/model", common))
                        print(f"{dtype}, {method}: {collected[-1]}", file=sys.stderr)
                for method, collected in results.items():
                    good = [r for r in collected if r]
                    if not good:
                        print(f"| {dtype} | {method} | failed, see stderr | | | |", flush=True)
                        continue
                    seconds = statistics.median(s for r in good for s in r["seconds"])
                    peak = statistics.median(r["bytes"] for r in good) / 1e9
                    share = flops(size) / seconds / rate
                    row = f"{seconds:.3g} | {tokens / seconds:,.0f} | {share:.0%} | {peak:.2f}"
                    print(f"| {dtype} | {method} | {row} |", flush=True)


def run_one(method: str, name: str, dtype: str, folder: str, words: list[str]) -> dict | None:
    """Measure a method in a fresh process."""
    words = [*words, "--one", method, name, dtype, folder]
    return figures(__file__, words, f"{method}, {dtype}", profiled="--profile" in words)


if __name__ == "__main__":
    main()
