"""Sampling: tokens a second and peak memory, beside transformers' padded `generate`, its continuous batching, and vLLM.

    python bench/sampler.py                              this machine's size: a GPU's or a CPU's
    python bench/sampler.py --prompts 8 --methods nanoredi "transformers generate"     shorter
    python bench/sampler.py --profile                    where the time of one decode step goes

All methods have the same weights, prompts, lengths, temperature 0.6 and top-p 0.95. The weights are random, so every
method is given the length of each sample, and only those tokens count. Each runs in a fresh process, after a short
warm-up. The time is that of one run over all prompts, prefill included; compare times within a table only. Memory is
the peak of the process on a CPU, weights included, and of the tensors on a GPU, where nanoredi's cache, like vLLM's,
takes what is free. On a GPU nanoredi is timed with steps of the full batch size (--batch_invariant) and with steps of
the remaining rows. `generate` pads a batch to its longest sample and takes one batch after another; since batches are
alike, a few prompts are enough to time it (--generate_prompts). The allowance is the time of the matrix products alone,
with the number of rows that decode at each step; on a GPU the floor is the time to read the weights and the cache in
use once a step at the measured bandwidth.
"""

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from allowance import allowance  # noqa: E402
from fresh import figures  # noqa: E402

from nanoredi.config import SamplingConfig  # noqa: E402
from nanoredi.kernels.paged_attention import SPAN  # noqa: E402
from nanoredi.model.config import Qwen2Config  # noqa: E402
from nanoredi.model.qwen2 import Qwen2  # noqa: E402
from nanoredi.sampler.sampler import Sampler  # noqa: E402
from nanoredi.sampler.scheduler import Request, requests_for  # noqa: E402
from nanoredi.trainer.dtype import compute_dtype  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TEMPERATURE, TOP_P = 0.6, 0.95


@dataclass
class Size:
    """A model, and the samples taken from it."""

    name: str
    config: Qwen2Config
    prompts: int
    n: int
    prompt: tuple[int, int]  # the shortest and the longest, in tokens
    completion: tuple[int, int]
    batch_size: int  # of nanoredi
    generate_rows: int  # of a batch of `generate`
    generate_prompts: int  # that `generate` is timed on


SIZE = (
    Size(
        "Qwen2.5-Math-1.5B's shape",
        Qwen2Config(151_936, 1536, 8960, 28, 12, 2, 32_768, 300_000.0, tie_word_embeddings=True),
        prompts=64,
        n=16,
        prompt=(50, 800),
        completion=(20, 8_192),
        batch_size=1_024,
        generate_rows=64,
        generate_prompts=4,
    )
    if ON_GPU
    else Size(
        "135M parameters",
        Qwen2Config(49_152, 576, 1536, 30, 9, 3, 2_048, tie_word_embeddings=True),
        prompts=32,
        n=4,
        prompt=(20, 300),
        completion=(20, 400),
        batch_size=128,
        generate_rows=32,
        generate_prompts=8,
    )
)


def requests_of(size: Size) -> list[Request]:
    """Random prompts of uniform lengths; the completions' lengths are evenly spaced, in random order."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(size.prompt[0], size.prompt[1] + 1, size.prompts)
    prompts = [rng.integers(0, size.config.vocab_size, length).tolist() for length in lengths]
    requests = requests_for(prompts, size.n, seed=0)
    # So the samples of every few prompts have lengths from the whole range.
    ends = np.linspace(*size.completion, len(requests)).round().astype(int)
    for request, end in zip(requests, rng.permutation(ends).tolist()):
        request.max_tokens = end
    return requests


def nanoredi(
    batch_invariant: bool, folder: str, size: Size, dtype: torch.dtype, profiled: bool
) -> tuple[Callable[[], int], Callable]:
    model = Qwen2.from_pretrained(folder, dtype=dtype, device=DEVICE).pack()
    sizes = {"batch_size": size.batch_size, "batch_invariant": batch_invariant}
    settings = SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P, **sizes)
    sampler = Sampler(model, [], settings)

    def warm_up() -> None:
        # Ever fewer rows: a CPU has a kernel for each number of them.
        lengths = [3 + int(2 * math.log2(size.batch_size / (row + 1))) for row in range(size.batch_size)]
        list(sampler.run([Request([1] * 8, max_tokens=n, key=row) for row, n in enumerate(lengths)]))
        if sampler.graphs:
            capture_all(sampler.graphs, size.prompt[1] + size.completion[1])

    def run() -> int:
        sampler.add(requests_of(size))
        ended = []
        for step in range(10**9):
            # All prompts are prefilled, or the batch is full: the step mostly decodes.
            if profiled and step >= 40 and not sampler.scheduler.prefilling:
                with torch.profiler.profile() as profiler:
                    ended += sampler.step()
                order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
                table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
                print(table, file=sys.stderr)
                return sum(len(request.tokens) for request in ended)
            ended += sampler.step()
            if not sampler.num_held:
                return sum(len(request.tokens) for request in ended)

    return run, warm_up


def capture_all(graphs: Any, longest: int) -> None:
    """Capture the graphs of all numbers of rows, and of all lengths up to the longest one, with padding rows alone."""
    sizes = {len(graphs.padded(np.zeros(rows, dtype=np.int64))) for rows in range(1, graphs.batch_size + 1)}
    with torch.inference_mode():
        for rows in sorted(sizes, reverse=True):
            for length in range(1, longest + 1, SPAN):
                graphs(np.full(rows, graphs.batch_size), np.zeros(rows), length)


def generate(folder: str, size: Size, dtype: torch.dtype, profiled: bool) -> tuple[Callable[[], int], Callable]:
    """Batches of prompts, padded on the left, in the given order; a batch runs until its longest sample is done."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(DEVICE).eval()

    class AtLength(StoppingCriteria):
        def __init__(self, ends: torch.Tensor):
            self.ends = ends

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def sample(requests: list[Request]) -> int:
        longest = max(len(request.prompt) for request in requests)
        ids = torch.tensor([[0] * (longest - len(r.prompt)) + r.prompt for r in requests], device=DEVICE)
        mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests], device=DEVICE)
        ends = longest + torch.tensor([request.max_tokens for request in requests], device=DEVICE)
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=int(ends.max()) - longest,
            stopping_criteria=StoppingCriteriaList([AtLength(ends)]),
            eos_token_id=None,
            pad_token_id=0,
        )
        return sum(request.max_tokens for request in requests)

    def run() -> int:
        requests = requests_of(size)[: size.generate_prompts * size.n]
        batches = range(0, len(requests), size.generate_rows)
        return sum(sample(requests[start : start + size.generate_rows]) for start in batches)

    return run, lambda: sample([Request([1] * 8, max_tokens=3)] * 4)


def generate_batch(folder: str, size: Size, dtype: torch.dtype, profiled: bool) -> tuple[Callable[[], int], Callable]:
    """transformers' continuous batching. It has one length for all samples; here it is the mean length."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()

    def sample(prompts: list[list[int]], length: int) -> int:
        settings = GenerationConfig(
            max_new_tokens=length,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            eos_token_id=-1,
            pad_token_id=0,
        )
        done = model.generate_batch(inputs=prompts, generation_config=settings)
        if len(done) < len(prompts):
            raise RuntimeError(f"generate_batch gave {len(done)} of {len(prompts)} samples")
        return sum(len(one.generated_tokens) for one in done.values())

    def run() -> int:
        requests = requests_of(size)[: size.generate_prompts * size.n]
        length = round(sum(request.max_tokens for request in requests) / len(requests))
        return sample([request.prompt for request in requests], length)

    return run, lambda: sample([[1] * 8] * 4, 3)


def vllm(folder: str, size: Size, dtype: torch.dtype, profiled: bool) -> tuple[Callable[[], int], Callable]:
    """vLLM with its defaults. Its memory is what it may take, not what it needs."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # otherwise its memory would be in another process
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype=str(dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        max_model_len=size.prompt[1] + size.completion[1],
        max_num_seqs=size.batch_size,
    )

    def sample(requests: list[Request]) -> int:
        settings = [
            SamplingParams(
                temperature=TEMPERATURE, top_p=TOP_P, max_tokens=r.max_tokens, ignore_eos=True, detokenize=False
            )
            for r in requests
        ]
        done = engine.generate([{"prompt_token_ids": r.prompt} for r in requests], settings, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return lambda: sample(requests_of(size)), lambda: sample([Request([1] * 8, max_tokens=3)] * 4)


METHODS = {
    "nanoredi": partial(nanoredi, True),
    # On a CPU both have steps of the remaining rows.
    **({"nanoredi, not batch_invariant": partial(nanoredi, False)} if ON_GPU else {}),
    "transformers generate": generate,
    "transformers generate_batch": generate_batch,
    "vllm": vllm,
}
TIMED_ON_GENERATE_S = ("transformers generate", "transformers generate_batch")  # prompts; the others on all


def measure(method: str, size: Size, dtype: torch.dtype, folder: str, profiled: bool) -> dict:
    """Measure a method in this process."""
    run, warm_up = METHODS[method](folder, size, dtype, profiled)
    warm_up()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tokens = run()
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens": tokens, "seconds": seconds, "bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, help="number of prompts")
    parser.add_argument("--generate_prompts", type=int, help="number of prompts that transformers is timed on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to time [all]")
    parser.add_argument("--dtypes", nargs="+", help="float32, bfloat16 [the device's best; a CPU also float32]")
    parser.add_argument("--profile", action="store_true", help="print where the time of one of nanoredi's steps goes")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # for the fresh processes
    flags = parser.parse_args()
    SIZE.prompts = flags.prompts or SIZE.prompts
    SIZE.generate_prompts = min(flags.generate_prompts or SIZE.generate_prompts, SIZE.prompts)
    if flags.one:
        method, dtype, folder = flags.one
        print(json.dumps(measure(method, SIZE, getattr(torch, dtype), folder, flags.profile)))
        return

    if not flags.dtypes:
        good = compute_dtype("auto", DEVICE) == torch.bfloat16
        flags.dtypes = ["bfloat16"] if ON_GPU else ["float32", "bfloat16"] if good else ["float32"]
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    requests = requests_of(SIZE)
    tokens = sum(request.max_tokens for request in requests)
    print(f"{device}; torch {torch.__version__}")
    print(f"{SIZE.name}: {SIZE.prompts} prompts x {SIZE.n}, {tokens:,} tokens to sample\n", flush=True)
    words = ["--prompts", str(SIZE.prompts), "--generate_prompts", str(SIZE.generate_prompts)]
    with tempfile.TemporaryDirectory() as folder:
        Qwen2(SIZE.config).init_weights(0).save_pretrained(Path(folder, "model"), getattr(torch, flags.dtypes[0]))
        if flags.profile:
            run_one("nanoredi", flags.dtypes[0], f"{folder}/model", [*words, "--profile"])
            return
        bound = "of the floor" if ON_GPU else "of the products' allowance"
        print(f"| dtype | method | samples | s | tokens/s | {bound} | peak GB |\n" + "| --- " * 7 + "|", flush=True)
        for dtype in flags.dtypes:
            share = allowance(SIZE.config, requests, getattr(torch, dtype)) / tokens
            for method in flags.methods:
                result = run_one(method, dtype, f"{folder}/model", words)
                if result is None:
                    print(f"| {dtype} | {method} | failed, see stderr | | | | |", flush=True)
                    continue
                num = (SIZE.generate_prompts if method in TIMED_ON_GENERATE_S else SIZE.prompts) * SIZE.n
                rate = result["tokens"] / result["seconds"]
                cells = (
                    f"{num} | {result['seconds']:.0f} | {rate:.0f} | {rate * share:.0%} | {result['bytes'] / 1e9:.2f}"
                )
                print(f"| {dtype} | {method} | {cells} |", flush=True)


def run_one(method: str, dtype: str, folder: str, words: list[str]) -> dict | None:
    """Measure a method in a fresh process."""
    words = [*words, "--one", method, dtype, folder]
    return figures(__file__, words, f"{method}, {dtype}", profiled="--profile" in words)


if __name__ == "__main__":
    main()
