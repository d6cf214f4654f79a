"""Training's attention on a CPU: matrix products of a block of queries with all keys that it may see.

torch's flash attention multiplies tiles of fp32 with MKL (kernels/products.py says what that costs) and in half precision
makes its products small; here they are large, and scores of one block's size are all that is held. The query heads that
share a key-value head stand below each other, in one product:

    S = Q K^T / sqrt(E)  (b*G, t)      P = softmax(S)      O = P V              b queries, t keys, G = H/K

Backward makes P again and goes the way back (FlashAttention, arXiv 2205.14135, appendix B.2):

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))      dQ = dS K / sqrt(E)      dK = dS^T Q / sqrt(E)

In half precision S is made in fp32, for exp would make much of its rounding. The letters for shapes are model.py's.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nanoredi.kernels.products import product as any_product

_BLOCK = 192  # queries; their scores stay in a CPU's cache

product = partial(any_product, recurs=True)


class BlockwiseAttention(torch.autograd.Function):
    """apply(q (N, H, E), k (N, K, E), v (N, K, E), lengths of the packed sequences) -> (N, H, E), causal."""

    @staticmethod
    def forward(ctx, q, k, v, lengths):
        ctx.save_for_backward(q, k, v)
        ctx.lengths = lengths
        return torch.ops.nanoredi.blockwise_attention(q, k, v, lengths)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for sequences in zip(*(x.split(ctx.lengths) for x in (q, k, v, grad, *grads))):
            _backward(*sequences)
        return *grads, None


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    out = torch.empty_like(q)
    for sequences in zip(*(x.split(lengths) for x in (q, k, v, out))):
        _forward(*sequences)
    return out


# An operation of its own, so that activation checkpointing can keep its result (attention.ATTENTION).
_library = torch.library.Library("nanoredi", "DEF")
_library.define("blockwise_attention(Tensor q, Tensor k, Tensor v, int[] lengths) -> Tensor")
_library.impl("blockwise_attention", _attend, "CPU")


def _forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Of one sequence: out (n, H, E) is written."""
    num_groups, scale = k.shape[1], q.shape[-1] ** -0.5
    rows, keys, values = (_by_group(x, num_groups) for x in (q, k, v))  # (K, n*G, E), (K, n, E)
    outs = torch.empty_like(rows)
    scaled, keys = rows.float() * scale, keys.float()
    for group, block, end, mask in _blocks(q, k):
        weights = _weights(scaled[group, block], keys[group, :end], mask)
        outs[group, block] = product(weights.to(q.dtype), values[group, :end])
    out.copy_(_by_token(outs, out.shape))


def _backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    """Of one sequence: grad_q (n, H, E), grad_k and grad_v (n, K, E) are written."""
    num_groups, scale = k.shape[1], q.shape[-1] ** -0.5
    rows, keys, values, grads = (_by_group(x, num_groups) for x in (q, k, v, grad))
    grad_rows = torch.empty_like(rows)
    # Transposed, because these products are faster that way round.
    grad_keys, grad_values = torch.zeros(2, num_groups, k.shape[2], k.shape[0])  # (K, E, n)
    scaled, exact_keys = rows.float() * scale, keys.float()
    for group, block, end, mask in _blocks(q, k):
        weights = _weights(scaled[group, block], exact_keys[group, :end], mask)
        grad_weights = product(grads[group, block], values[group, :end].T, torch.float32)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32).to(q.dtype)
        grad_rows[group, block] = product(grad_scores, keys[group, :end])
        grad_keys[group, :, :end] += product(rows[group, block].T, grad_scores)
        grad_values[group, :, :end] += product(grads[group, block].T, weights.to(q.dtype))
    grad_q.copy_(_by_token(grad_rows, q.shape)).mul_(scale)
    grad_k.copy_(grad_keys.mul_(scale).permute(2, 0, 1))
    grad_v.copy_(grad_values.permute(2, 0, 1))


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, int, Tensor]]:
    """Of each key-value head the blocks of queries: (the head, the block's rows among n*G, the keys that the block may
    see, and the mask (b, 1, b) of the last of these)."""
    (n, num_heads, _), num_groups = q.shape, k.shape[1]
    grouped = num_heads // num_groups
    mask = torch.full((_BLOCK, _BLOCK), -torch.inf).triu_(1)[:, None]
    for group in range(num_groups):
        for start in range(0, n, _BLOCK):
            end = min(start + _BLOCK, n)
            yield group, slice(start * grouped, end * grouped), end, mask[: end - start, :, : end - start]


def _weights(rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """softmax(rows (b*G, E) @ keys (t, E).T), causal: (b*G, t) fp32."""
    scores = product(rows, keys.T)
    scores.view(len(mask), -1, len(keys))[..., -len(mask) :] += mask
    return torch.softmax(scores, -1, out=scores)


def _by_group(x: Tensor, num_groups: int) -> Tensor:
    """(n, H or K, E) -> (K, n*G or n, E), contiguous."""
    return x.unflatten(1, (num_groups, -1)).transpose(0, 1).contiguous().view(num_groups, -1, x.shape[2])


def _by_token(rows: Tensor, shape: torch.Size) -> Tensor:
    """(K, n*G, E) -> (n, H, E)."""
    return rows.unflatten(1, (shape[0], -1)).transpose(0, 1).reshape(shape)
