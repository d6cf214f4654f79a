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

from nanoredi.kernels import products

_BLOCK = 192  # queries; their scores stay in a CPU's cache

# A model's sizes come again and again.
product, put_product = (partial(f, recurs=True) for f in (products.product, products.put_product))


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
    blocks = _blocks(q, k, [rows.float() * scale, outs], [keys.float(), values])
    for mask, (queries, outs_here), (keys, values) in blocks:
        put_product(outs_here, _weights(queries, keys, mask).to(q.dtype), values)
    out.copy_(_by_token(outs, out.shape))


def _backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    """Of one sequence: grad_q (n, H, E), grad_k and grad_v (n, K, E) are written."""
    num_groups, scale = k.shape[1], q.shape[-1] ** -0.5
    rows, keys, values, grads = (_by_group(x, num_groups) for x in (q, k, v, grad))
    grad_rows = torch.empty_like(rows)
    # fp32, for blocks add to them; and as (K, E, n), for these products are faster that way round.
    grad_keys, grad_values = torch.zeros(2, *keys.mT.shape).mT
    of_queries = [rows.float() * scale, rows, grads, grad_rows]
    of_keys = [keys.float(), keys, values, grad_keys, grad_values]
    for mask, (scaled, rows, grads, grad_rows_here), (exact, keys, values, *sums) in _blocks(q, k, of_queries, of_keys):
        weights = _weights(scaled, exact, mask).to(q.dtype)
        grad_weights = product(grads, values.T)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, q.dtype)
        put_product(grad_rows_here, grad_scores, keys)
        sums[0].T.add_(product(rows.T, grad_scores))
        sums[1].T.add_(product(grads.T, weights))
    grad_q.copy_(_by_token(grad_rows, q.shape)).mul_(scale)
    grad_k.copy_(grad_keys.mul_(scale).transpose(0, 1))
    grad_v.copy_(grad_values.transpose(0, 1))


def _blocks(
    q: Tensor, k: Tensor, of_queries: list[Tensor], of_keys: list[Tensor]
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], list[Tensor]]]:
    """For each key-value head and block of queries the mask (b, 1, b) of the block's own tokens; of the tensors
    (K, n*G, E) that block's rows (b*G, E); and of the (K, n, E) those that the block may see (t, E)."""
    (n, num_heads, _), num_groups = q.shape, k.shape[1]
    grouped = num_heads // num_groups
    mask = torch.full((_BLOCK, _BLOCK), -torch.inf).triu_(1)[:, None]
    for group in range(num_groups):
        keys = [x[group] for x in of_keys]
        parts = zip(*(x[group].split(_BLOCK * grouped) for x in of_queries))
        for start, part in zip(range(0, n, _BLOCK), parts):
            end = min(start + _BLOCK, n)
            yield mask[: end - start, :, : end - start], part, [x[:end] for x in keys]


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
