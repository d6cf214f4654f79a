"""Decode attention: a row's newest token attends to the row's pages, in C (decode.c), without a compiler in PyTorch.

C works like the Triton kernel (kernels/paged_attention.py), a span at a time. PyTorch has to copy pages, so it takes a
few at a time, as a batch of matrix products with the queries of their rows.
"""

import math

import torch
from torch import Tensor

from nanoredi.cpu.native import call, library
from nanoredi.kernels.paged_attention import memory_for, paged_decode

# Elements that PyTorch copies at a time: they stay in the cache.
_AT_ONCE = 1 << 20
# Tokens of a span. Independent of the batch, so that a row's sums are too; rounded to whole pages.
_SPAN = 2048


@paged_decode.on("cpu")
def _(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    group, page_size = q.shape[1] // keys.shape[1], keys.shape[2]
    c = library("decode", q.dtype, q.shape[2], GROUP=group, PAGE=page_size)
    if c is None:
        return by_pages(q, keys, values, page_table, lengths)
    # keys and values are contiguous, and so are the rows of page_table.
    span_pages = max(1, _SPAN // page_size)
    num_spans = -(-int(lengths.max()) // (span_pages * page_size))
    partial = memory_for(q, num_spans)
    tensors = q.float().contiguous(), keys, values, page_table, lengths.contiguous(), *partial
    sizes = page_table.stride(0), len(q), keys.shape[1], num_spans, span_pages
    call(c, "decode", "ttttttttiiiiif", *tensors, *sizes, q.shape[2] ** -0.5)
    return _combine(*partial).to(q.dtype)


def _combine(outs: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
    """Combine the spans: (B, H, E)."""
    weights = (maxima - maxima.amax(-1, keepdim=True)).exp_()
    # cumsum adds in order, so that empty spans at the end change nothing.
    return (weights[..., None] * outs).sum(2) / (weights * sums).cumsum(2)[..., -1:]


def by_pages(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """The same in PyTorch; X is the number of all rows' pages, in the order of the rows."""
    (num_rows, _, size), (_, num_kv_heads, page_size, _) = q.shape, keys.shape
    num_pages = -(-lengths // page_size)  # (B,)
    row = torch.arange(num_rows, device=q.device).repeat_interleave(num_pages)  # (X,)
    starts = num_pages.cumsum(0) - num_pages  # (B,) of the rows among the X
    number = torch.arange(len(row), device=q.device) - starts[row]  # (X,) of a page among its row's
    unused = torch.arange(page_size, device=q.device) >= (lengths[row] - number * page_size)[:, None]  # (X, page)
    at_once = max(1, _AT_ONCE // keys[0].numel())
    parts = list(zip(row.split(at_once), page_table[row, number].split(at_once)))
    # Buffers are reused: getting new memory from the system would take as long as the products.
    copied = keys.new_empty(at_once, *keys.shape[1:])
    wide = copied if keys.dtype == torch.float32 else copied.float()

    def fp32(pool: Tensor, pages: Tensor) -> Tensor:
        """The contents (X', K, page, E) of pages (X',)."""
        some = torch.index_select(pool, 0, pages, out=copied[: len(pages)])
        return some if wide is copied else wide[: len(pages)].copy_(some)

    # exp2 of scores / log 2: torch's exp takes 4 times as long, and 20 times where its result underflows.
    queries = q.float().view(num_rows, num_kv_heads, -1, size) * (size**-0.5 / math.log(2))  # (B, K, G, E)
    scores, outs = (queries.new_empty(len(row), *queries.shape[1:3], last) for last in (page_size, size))
    for (rows, pages), part in zip(parts, scores.split(at_once)):
        torch.matmul(queries[rows], fp32(keys, pages).mT, out=part)
    scores.masked_fill_(unused[:, None, None], -torch.inf)
    maxima = torch.segment_reduce(scores.amax(-1), "max", lengths=num_pages)  # (B, K, G)
    weights = scores.sub_(maxima[row][..., None]).exp2_()
    for (_, pages), part, weight in zip(parts, outs.split(at_once), weights.split(at_once)):
        torch.matmul(weight, fp32(values, pages), out=part)
    sums = torch.segment_reduce(weights.sum(-1), "sum", lengths=num_pages)
    return (torch.segment_reduce(outs, "sum", lengths=num_pages) / sums[..., None]).view(q.shape).to(q.dtype)
