"""From logits to tokens: temperature, top-k and top-p, and one uniform number a token.

Exact, in fp32, without sorting the vocabulary on a GPU and without waiting for it (kernels/top_p.py).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.top_p import keep_likeliest

# Elements processed at once: on a CPU few enough to stay in its cache, on a GPU few enough to bound the memory.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 26


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Sample a token from each row, by inverting the kept tokens' cumulative distribution in the vocabulary's order.

    Args:
        logits: (B, V).
        uniforms: (B,) fp64 from [0, 1).
        temperature: 0 takes the likeliest token.
        top_p: keep the fewest likeliest tokens that together have this probability, after top_k. Ties are broken by the
            vocabulary's order.
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
        is_nan = probs[:, 0].isnan()  # if one is, all of the row are
        if 0 < top_k < probs.shape[1]:
            probs = keep_likeliest(probs, top_k, by_mass=False)
        if top_p < 1:
            probs = keep_likeliest(probs, top_p, by_mass=True)
        tokens.append(_draw(probs, u).masked_fill(is_nan, -1))
    return torch.cat(tokens)


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B,) drawn with weights (B, V), which need not add up to 1: in each row the first one at which the
    cumulative sum exceeds uniform * sum. First its block is found, then its index there, so as to add up little."""
    num_tokens = weights.shape[1]
    blocks = weights.unflatten(1, (-1, min(256, num_tokens & -num_tokens)))  # (B, blocks, size)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(1)
    # A uniform is at most 1 - 2^-53, so in fp64, too, its share is less than the whole sum.
    share = uniforms[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, share, right=True).clamp(max=blocks.shape[1] - 1)  # (B, 1); NaN sorts last
    members = blocks[torch.arange(len(blocks), device=block.device), block.squeeze(1)].cumsum(1, dtype=torch.float64)
    # The block is added up in another order here, so the rest of the share might reach the block's whole sum.
    left = (share - F.pad(sums, (1, 0)).gather(1, block)).minimum(members[:, -1:] * (1 - 2**-52))
    return (block * blocks.shape[2] + torch.searchsorted(members, left, right=True)).squeeze(1)


def uniform(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One number from [0, 1) for each key and counter: (B,) int64, (B,) int64 -> (B,) fp64.

    A counter-based generator (the finaliser of SplitMix64, Steele et al. 2014): it has no state, so any order gives the
    same numbers. Sums and products wrap around at 64 bits.
    """
    z = keys.view(np.uint64) + (counters + 1).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> 31)) >> 11) / 2**53
