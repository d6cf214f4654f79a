"""A model on benchmarks: sample, grade, and sum up in rows of the table."""

import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanoredi import objectives
from nanoredi.batch import WeightedSequence, divide, pack
from nanoredi.benchmarks import Benchmark
from nanoredi.checkpoint import stop_ids
from nanoredi.config import EvaluateConfig, RediConfig
from nanoredi.data import TokenData, load_pairs
from nanoredi.distributed import World, compute_dtype
from nanoredi.errors import UserError
from nanoredi.model import Qwen2
from nanoredi.sampler import Sampler, requests_for
from nanoredi.scores import Row, graded, summarise
from nanoredi.tokenizer import Tokenizer, user_message
from nanoredi.trainer import mean_logps


def evaluate(
    name: str,
    folder: str | Path,
    benchmarks: Iterable[Benchmark],
    config: EvaluateConfig,
    out: Path,
    world: World,
    pairs: RediConfig | None = None,
) -> list[Row]:
    """Evaluate the model of a folder; the ranks share the problems.

    Args:
        name: the model's, in the table.
        folder: Hugging Face folder.
        benchmarks: what to evaluate on.
        config: how to sample.
        out: every sample is appended to samples.jsonl in this folder.
        world: the ranks.
        pairs: with a `watch` file, whose mean log-probs a token then stand in the rows too.

    Returns:
        A row a benchmark (summarise has its keys), the same on every rank.
    """
    tokenizer = Tokenizer(folder)
    dtype = world.first(lambda: compute_dtype(config.dtype, world.device))  # measured, so one rank decides
    model = Qwen2.from_pretrained(folder, dtype=dtype, device=world.device)
    logps = {}
    if pairs is not None and pairs.watch:
        load = partial(
            load_pairs, pairs.watch, tokenizer, pairs.max_prompt_tokens, pairs.max_response_tokens, pairs.cache
        )
        world.first(lambda: load().notes)  # fills the cache
        logps = dict(zip(("chosen_logp", "rejected_logp"), score(model, load(), pairs.max_tokens_per_micro_batch)))
    rows = []
    for benchmark in benchmarks:
        samples = _sample(name, model, tokenizer, benchmark, config, out / "samples.jsonl", world)
        rows.append({"model": name, "benchmark": benchmark.name, **summarise(samples, config.n), **logps})
    return rows


@torch.no_grad()
def score(model: Qwen2, data: TokenData, max_tokens: int) -> tuple[float, float]:
    """Mean log-prob a token of the chosen and of the rejected traces of pairs."""
    lengths = [data.num_learned(i) for i in range(len(data))]
    chosen, rejected = objectives.redi(lengths[::2], lengths[1::2], alpha=1.0)
    weights = [w for pair in zip(chosen, rejected) for w in pair]
    device = model.lm_head_weight.device
    total = torch.zeros(2, device=device)
    sizes = [len(data.sequence(i)[0]) for i in range(len(data))]
    for indices in divide(sizes, sizes, 1, max_tokens)[0]:
        sequences = [WeightedSequence(*data.sequence(i), weights[i], f"sequence {i + 1}") for i in indices]
        batch = pack(sequences, model.config.vocab_size).to(device)
        _, logps = model.loss(*batch)
        total += mean_logps(logps, batch.weights)
    return total[0].item(), total[1].item()


def _sample(
    name: str,
    model: Qwen2,
    tokenizer: Tokenizer,
    benchmark: Benchmark,
    config: EvaluateConfig,
    path: Path,
    world: World,
) -> list[Row]:
    """Sample and grade a benchmark; all ranks' samples, in order."""
    texts = [tokenizer.prompt(user_message(q), think=config.think == "forced") for q in benchmark.questions]
    prompts = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    context = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= context:
            raise UserError(
                f"{benchmark.name}: problem {number} has {len(prompt):,} tokens with its template and fills the "
                f"context of {context:,}"
            )
    requests = requests_for(prompts, config.n, config.seed)
    # Every rank takes each size-th problem, with all of its samples.
    mine = {id(r): i // config.n for i, r in enumerate(requests) if i // config.n % world.size == world.rank}
    samples = []
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(
        total=len(mine),
        desc=f"{name} on {benchmark.name}",
        unit=" samples",
        file=sys.stderr,
        disable=world.rank > 0,
        leave=False,
    )
    with open(path, "a", encoding="utf-8") as file, progress:
        for request in Sampler(model, stop_ids(tokenizer), config).run(r for r in requests if id(r) in mine):
            problem = mine[id(request)]
            # Where the prompt opens <think>, that belongs to the response all the same.
            opened = "<think>\n" if texts[problem].rstrip().endswith("<think>") else ""
            response = opened + tokenizer.decode(request.tokens)
            row = graded(name, benchmark, problem, request.sample, response, len(request.tokens), request.finish_reason)
            samples.append(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.update()
    gathered: list[list[Row]] = [[] for _ in range(world.size)]
    dist.all_gather_object(gathered, [{k: v for k, v in row.items() if k != "response"} for row in samples])
    return sorted((row for rows in gathered for row in rows), key=lambda row: (row["problem"], row["sample"]))
