"""One new token a row attends to the pages of its row: a Triton kernel for a GPU, C for a CPU, and plain PyTorch.

The kernels give a program one row, one key-value head with the G = H/K query heads that share it, and one of the row's
splits. It goes over its tokens with the running softmax of flash attention (arXiv 2205.14135, algorithm 1): of scores
s_t = q.k_t / sqrt(E) it keeps the largest m, the sum l of exp(s_t - m) and the vector a, the sum of exp(s_t - m) v_t.
Splits are put together as

    out = sum_i exp(m_i - M) a_i / sum_i exp(m_i - M) l_i        M = max_i m_i

A page is read where it lies. Plain PyTorch must copy it, so it takes few pages at a time, each with its row's queries as
a member of a batch of matrix products; it is what runs on a CPU without a C compiler, and what the kernels must equal.
"""

import ctypes
import math

import torch
from torch import Tensor

from nanoredi.cpu.native import call, compiled
from nanoredi.kernels.dispatch import runs_triton, tl, triton

# Tokens that a program holds at once, and programs for every processor, so that short rows do not leave some idle.
_BLOCK, _WAVES = 64, 4
# Keys' elements that plain PyTorch copies at once, and that stay in a CPU's cache.
_AT_ONCE = 1 << 20


def paged_decode(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one token a row over the row's pages.

    Args:
        q: (B, H, E) fp32 or bf16.
        keys, values: (P, K, page, E), one layer's pool, of q's dtype.
        page_table: (B, C) int64, each row's pages, then anything.
        lengths: (B,) int64, tokens that each row attends to, at least 1.

    Returns:
        (B, H, E).
    """
    way = triton_decode if runs_triton(keys) else c_decode if library_for(q, keys) else plain_decode
    return way(q, keys, values, page_table, lengths)


def plain_decode(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """paged_decode in plain PyTorch, scores and sums in fp32. X counts the pages of all rows, one row after the other."""
    (num_rows, _, size), (_, num_kv_heads, page_size, _) = q.shape, keys.shape
    num_pages = -(-lengths // page_size)  # (B,)
    row = torch.arange(num_rows, device=q.device).repeat_interleave(num_pages)  # (X,)
    starts = num_pages.cumsum(0) - num_pages  # (B,) of the rows among the X
    number = torch.arange(len(row), device=q.device) - starts[row]  # (X,) of a page among its row's
    unused = torch.arange(page_size, device=q.device) >= (lengths[row] - number * page_size)[:, None]  # (X, page)
    at_once = max(1, _AT_ONCE // keys[0].numel())
    parts = list(zip(row.split(at_once), page_table[row, number].split(at_once)))
    # Memory that is used again: new memory must be provided by the system first, which takes as long as the products.
    copied = keys.new_empty(at_once, *keys.shape[1:])
    wide = copied if keys.dtype == torch.float32 else copied.float()

    def fp32(pool: Tensor, pages: Tensor) -> Tensor:
        """Pages (X',) of the pool: (X', K, page, E)."""
        some = torch.index_select(pool, 0, pages, out=copied[: len(pages)])
        return some if wide is copied else wide[: len(pages)].copy_(some)

    # exp2 of scores / log 2: torch's exp takes four times as long, and where it gives next to nothing twenty times.
    queries = q.float().view(num_rows, num_kv_heads, -1, size) * (size**-0.5 / math.log(2))  # (B, K, G, E)
    scores, outs = (queries.new_empty(len(row), *queries.shape[1:3], last) for last in (page_size, size))
    for (rows, pages), part in zip(parts, scores.split(at_once)):
        torch.matmul(queries[rows], fp32(keys, pages).mT, out=part)
    scores.masked_fill_(unused[:, None, None], -torch.inf)
    tops = torch.segment_reduce(scores.amax(-1), "max", lengths=num_pages)  # (B, K, G)
    weights = scores.sub_(tops[row][..., None]).exp2_()
    for (_, pages), part, weight in zip(parts, outs.split(at_once), weights.split(at_once)):
        torch.matmul(weight, fp32(values, pages), out=part)
    sums = torch.segment_reduce(weights.sum(-1), "sum", lengths=num_pages)
    return (torch.segment_reduce(outs, "sum", lengths=num_pages) / sums[..., None]).view(q.shape).to(q.dtype)


def library_for(q: Tensor, keys: Tensor) -> ctypes.CDLL | None:
    """decode.c, compiled for such queries and keys, where that can be done."""
    size, group = q.shape[2], q.shape[1] // keys.shape[1]
    if not q.is_cpu or size % 4 or q.dtype not in (torch.float32, torch.bfloat16):
        return None
    return compiled("decode", SIZE=size, GROUP=group, PAGE=keys.shape[2], IN_BF16=int(q.dtype == torch.bfloat16))


def c_decode(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """paged_decode in C. keys and values are contiguous, and so are the rows of page_table."""
    num_splits, outs, tops, sums = _splits(q, keys, torch.get_num_threads())
    queries, lengths = q.float().contiguous(), lengths.contiguous()
    tensors = queries, keys, values, page_table, lengths, outs, tops, sums
    sizes = page_table.stride(0), len(q), keys.shape[1], num_splits
    call(library_for(q, keys), "decode", "ttttttttiiiif", *tensors, *sizes, q.shape[2] ** -0.5)
    return _together(outs, tops, sums).to(q.dtype)


def triton_decode(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """paged_decode in Triton. It asks the device for nothing, so a graph can hold it."""
    size, group = q.shape[2], q.shape[1] // keys.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    num_splits, outs, tops, sums = _splits(q, keys, processors)
    _decode_kernel[(len(q), keys.shape[1], num_splits)](
        q.contiguous(),
        keys,
        values,
        page_table.contiguous(),
        lengths,
        outs,
        tops,
        sums,
        size**-0.5,
        page_table.shape[1],
        num_splits,
        GROUP=group,
        SIZE=size,
        PAGE=keys.shape[2],
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),  # the least that a matrix unit takes
        SIZE_BLOCK=max(16, triton.next_power_of_2(size)),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return _together(outs, tops, sums).to(q.dtype)


def _splits(q: Tensor, keys: Tensor, processors: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """How many splits a row has, and memory for their a (B, H, splits, E), m and l (B, H, splits), fp32."""
    num_splits = max(1, min(64, _WAVES * processors // (len(q) * keys.shape[1])))
    shape = *q.shape[:2], num_splits
    return num_splits, *(q.new_empty(shape + more, dtype=torch.float32) for more in (q.shape[2:], (), ()))


def _together(outs: Tensor, tops: Tensor, sums: Tensor) -> Tensor:
    """(B, H, E), of all splits."""
    weights = (tops - tops.amax(-1, keepdim=True)).exp_()
    return (weights[..., None] * outs).sum(2) / (weights * sums).sum(2, keepdim=True)


if triton is not None:

    @triton.jit
    def _decode_kernel(
        q,
        keys,
        values,
        page_table,
        lengths,
        outs,
        tops,
        sums,
        scale,
        num_columns,
        num_splits,
        GROUP: tl.constexpr,
        SIZE: tl.constexpr,
        PAGE: tl.constexpr,
        GROUP_BLOCK: tl.constexpr,
        SIZE_BLOCK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b, k, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        num_kv_heads = tl.num_programs(1)
        length = tl.load(lengths + b).to(tl.int32)
        span = tl.cdiv(tl.cdiv(length, num_splits), BLOCK) * BLOCK
        start, end = split * span, tl.minimum((split + 1) * span, length)

        g, e = tl.arange(0, GROUP_BLOCK), tl.arange(0, SIZE_BLOCK)
        head = b * num_kv_heads * GROUP + k * GROUP + g  # of all rows' heads
        queries = tl.load(
            q + head[:, None] * SIZE + e[None, :], mask=(g[:, None] < GROUP) & (e[None, :] < SIZE), other=0.0
        )
        # -1e30, not -inf: a split without tokens must not make exp(-inf - -inf).
        top = tl.full((GROUP_BLOCK,), -1.0e30, tl.float32)
        total = tl.zeros((GROUP_BLOCK,), tl.float32)
        out = tl.zeros((GROUP_BLOCK, SIZE_BLOCK), tl.float32)
        for t0 in range(start, end, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            page = tl.load(page_table + b * num_columns + t // PAGE, mask=t < end, other=0).to(tl.int64)
            at = ((page * num_kv_heads + k) * PAGE + t % PAGE)[:, None] * SIZE + e[None, :]
            there = (t[:, None] < end) & (e[None, :] < SIZE)
            key = tl.load(keys + at, mask=there, other=0.0)
            scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(t[None, :] < end, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            value = tl.load(values + at, mask=there, other=0.0)
            total = total * shrink + tl.sum(weights, 1)
            out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            top = new_top
        place = head * num_splits + split
        tl.store(tops + place, top, mask=g < GROUP)
        tl.store(sums + place, total, mask=g < GROUP)
        tl.store(outs + place[:, None] * SIZE + e[None, :], out, mask=(g[:, None] < GROUP) & (e[None, :] < SIZE))
