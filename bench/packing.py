"""How a step's pairs are divided among GPUs: the cost of padding, and how even the ranks' work is.

    python bench/packing.py

Lengths are drawn like the paper's pairs: log-normal, with medians of 120 tokens for prompts, 4,500 for correct
responses and 7,000 for incorrect ones, cut at 800 and 19,000. Costs are floating-point operations of Qwen2.5-Math-1.5B,
attention included. No model is run: it is arithmetic, the same on every machine.

    padding     FLOPs that a step computes, divided by those that its tokens need
    imbalance   the most expensive rank, divided by the mean of the ranks: all wait for it at the end of a step
    in step     the same if the ranks wait for each other after every micro-batch, as under FSDP
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoredi.data.batch import divide  # noqa: E402
from nanoredi.model.config import Qwen2Config  # noqa: E402

CONFIG = Qwen2Config(151_936, 1536, 8960, 28, 12, 2, 32_768, 300_000.0, tie_word_embeddings=True)
PAIRS, MAX_TOKENS, STEPS = 32, 40_000, 100

Sequence = tuple[int, int]  # tokens, and how many of them are learned
Divided = list[list[list[Sequence]]]  # [rank][micro-batch] -> sequences, each with its padding


def draw_step(rng: np.random.Generator) -> list[Sequence]:
    """The sequences of a step: chosen and rejected of pair 0, then of pair 1, ..."""

    def some(middle: float, spread: float, least: int, most: int) -> np.ndarray:
        return np.exp(rng.normal(np.log(middle), spread, PAIRS)).clip(least, most).astype(int)

    prompt, chosen, rejected = some(120, 0.6, 30, 800), some(4_500, 0.65, 500, 19_000), some(7_000, 0.7, 500, 19_000)
    return [(int(p + n), int(n)) for p, *pair in zip(prompt, chosen, rejected) for n in pair]


def cost(batch: list[Sequence]) -> float:
    return sum(CONFIG.flops(n, learned) for n, learned in batch)


def packed(sequences: list[Sequence], ranks: int) -> Divided:
    divided = divide([n for n, _ in sequences], [cost([s]) for s in sequences], ranks, MAX_TOKENS)
    return [[[sequences[i] for i in indices] for indices in rank] for rank in divided]


def one_pair_at_a_time(sequences: list[Sequence], ranks: int) -> Divided:
    """The original's way: each pair right-padded to its longer trace, round-robin; with logits for every token."""
    pairs = [[(max(a[0], b[0]),) * 2] * 2 for a, b in zip(sequences[::2], sequences[1::2])]
    return [pairs[rank::ranks] for rank in range(ranks)]


def sorted_batches(sequences: list[Sequence], ranks: int) -> Divided:
    """Sorted by length, cut into padded batches within the budget, round-robin."""
    batches: list[list[Sequence]] = []
    for n, _ in sorted(sequences, reverse=True):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0][0] > MAX_TOKENS:
            batches.append([])
        longest = batches[-1][0][0] if batches[-1] else n
        batches[-1].append((longest, longest))
    return [batches[rank::ranks] for rank in range(ranks)]


def figures(way: Callable[[list[Sequence], int], Divided], ranks: int) -> list[float]:
    """Means over the steps: padding, imbalance (and its maximum), imbalance in step, micro-batches."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(STEPS):
        sequences = draw_step(rng)
        costs = [[cost(batch) for batch in rank] for rank in way(sequences, ranks)]
        most = max(map(len, costs))
        in_step = sum(max(rank[i] if i < len(rank) else 0.0 for rank in costs) for i in range(most))
        totals = np.array([sum(rank) for rank in costs])
        rows.append((totals.sum() / cost(sequences), totals.max() / totals.mean(), in_step / totals.mean(), most))
    means = np.mean(rows, axis=0)
    return [means[0], means[1], max(row[1] for row in rows), means[2], means[3]]


def main() -> None:
    print("| GPUs | way | padding | imbalance | worst of 100 | in step | micro-batches a GPU |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for ranks in (1, 2, 4, 8, 16):
        for way in (packed, one_pair_at_a_time, sorted_batches):
            padding, imbalance, worst, in_step, number = figures(way, ranks)
            name = "nanoredi" if way is packed else way.__name__.replace("_", " ")
            print(
                f"| {ranks} | {name} | {padding:.2f} | {imbalance:.3f} | {worst:.3f} | {in_step:.3f} | {number:.1f} |"
            )


if __name__ == "__main__":
    main()
