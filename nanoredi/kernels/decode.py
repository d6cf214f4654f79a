"""One new token a row attends to its row's pages, on a GPU: a Triton kernel that splits long rows among programs.

A program takes one row, one key-value head with the G = H/K query heads that share it, and one of the row's splits.
It goes over its tokens with the running softmax of flash attention (arXiv 2205.14135, algorithm 1): of scores s_t =
q.k_t / sqrt(E) it keeps the largest m, the sum l of exp(s_t - m) and the vector a, the sum of exp(s_t - m) v_t.
Splits are put together as

    out = sum_i exp(m_i - M) a_i / sum_i exp(m_i - M) l_i        M = max_i m_i

The plain PyTorch that it must equal is pagewise.py's.
"""

import torch
from torch import Tensor

from nanoredi.kernels.backend import tl, triton

# Tokens that a program holds at once, and programs for every multiprocessor, so that short rows do not leave some idle.
_BLOCK, _WAVES = 64, 4


def paged_decode(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one token a row over the row's pages. It asks the device for nothing, so a graph can hold it.

    Args:
        q: (B, H, E).
        keys, values: (P, K, page, E), one layer's pool.
        page_table: (B, C) int64, each row's pages, then anything.
        lengths: (B,) int64, tokens that each row attends to, at least 1.

    Returns:
        (B, H, E).
    """
    (num_rows, num_heads, size), (_, num_kv_heads, page_size, _) = q.shape, keys.shape
    programs = _WAVES * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    num_splits = max(1, min(64, programs // (num_rows * num_kv_heads)))
    group = num_heads // num_kv_heads
    outs = q.new_empty(num_rows, num_heads, num_splits, size, dtype=torch.float32)
    tops, sums = q.new_empty(2, num_rows, num_heads, num_splits, dtype=torch.float32)
    _decode_kernel[(num_rows, num_kv_heads, num_splits)](
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
        PAGE=page_size,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),  # the least that a matrix unit takes
        SIZE_BLOCK=max(16, triton.next_power_of_2(size)),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    weights = (tops - tops.amax(-1, keepdim=True)).exp_()  # (B, H, splits)
    out = (weights[..., None] * outs).sum(2) / (weights * sums).sum(2, keepdim=True)
    return out.to(q.dtype)


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
