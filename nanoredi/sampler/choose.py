"""From logits to tokens: temperature, top-k and top-p, and one uniform number for each row and position.

Exact, in fp32, without a sort of the vocabulary and without waiting for the device (kernels/top_p.py).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.top_p import keep_likeliest

# Elements that are worked on at once: on a CPU few enough to stay in its cache, on a GPU to bound the memory.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 26


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Draw a token from each row, by inverting the kept tokens' cumulative distribution in the vocabulary's order.

    Args:
        logits: (B, V).
        uniforms: (B,) fp64 from [0, 1), one a row.
        temperature: 0 takes the likeliest token.
        top_p: keep the fewest likeliest tokens that together have this probability, after top_k. Of equally likely
            ones the first in the vocabulary are kept.
        top_k: keep the k likeliest tokens; 0 keeps all.

    Returns:
        (B,) int64; -1 where a row's logits are no distribution: one is NaN or inf, or all are -inf.
    """
    if temperature == 0:
        largest = logits.max(-1)
        return largest.indices.masked_fill(~largest.values.isfinite(), -1)
    rows = max(1, (_GPU_ELEMENTS if logits.is_cuda else _CPU_ELEMENTS) // logits.shape[1])
    tokens = []
    for z, u in zip(logits.split(rows), uniforms.split(rows)):
        probs = (z.float() / temperature).softmax(-1)
        lost = probs[:, 0].isnan()  # then all of the row are
        tokens.append(_draw(_kept(probs, top_p, top_k), u).masked_fill(lost, -1))
    return torch.cat(tokens)


def _kept(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """The probabilities (B, V), those of the tokens that top-k and top-p drop set to 0."""
    if 0 < top_k < probs.shape[1]:
        probs = keep_likeliest(probs, top_k, by_mass=False)
    if top_p < 1:
        probs = keep_likeliest(probs, top_p, by_mass=True)
    return probs


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """A token (B,) by each row's weights (B, V), which need not add up to 1: the first up to which they add up to more
    than the uniform's share of all. Its block is found first, then its place there, so that few sums are made."""
    num_tokens = weights.shape[1]
    blocks = weights.unflatten(1, (-1, min(256, num_tokens & -num_tokens)))  # (B, blocks, size)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(1)
    # A uniform is at most 1 - 2^-53, so its share is less than the sum of all in fp64, too.
    share = uniforms[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, share, right=True).clamp(max=blocks.shape[1] - 1)  # (B, 1); NaN is beyond all
    members = blocks[torch.arange(len(blocks), device=block.device), block.squeeze(1)].cumsum(1, dtype=torch.float64)
    # The block was added up in another order: what is left of the share might be as much as all of it.
    left = (share - F.pad(sums, (1, 0)).gather(1, block)).minimum(members[:, -1:] * (1 - 2**-52))
    return (block * blocks.shape[2] + torch.searchsorted(members, left, right=True)).squeeze(1)


def uniform(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One number from [0, 1) for each key and counter: (B,) int64, (B,) int64 -> (B,) fp64.

    A counter-based generator (the finaliser of SplitMix64, Steele et al. 2014): no state, so any order gives the same
    numbers. Sums and products are those of 64-bit words.
    """
    z = keys.view(np.uint64) + (counters + 1).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> 31)) >> 11) / 2**53
