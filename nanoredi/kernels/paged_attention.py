"""One new token a row attends to the pages of its row: plain PyTorch, and a Triton kernel for a GPU.

The kernel gives a program one row, one key-value head with the G = H/K query heads that share it, and one of the row's
splits. It goes over its tokens with the running softmax of flash attention (arXiv 2205.14135, algorithm 1): of scores
s_t = q.k_t / sqrt(E) it keeps the largest m, the sum l of exp(s_t - m) and the vector a, the sum of exp(s_t - m) v_t.
Splits are put together as

    out = sum_i exp(m_i - M) a_i / sum_i exp(m_i - M) l_i        M = max_i m_i

It reads a page where it lies; plain PyTorch copies each row's pages.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.dispatch import operation, tl, triton

# Tokens that a program holds at once, and programs for every processor, so that short rows do not leave some idle.
_BLOCK, _WAVES = 64, 4


@operation
def paged_decode(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one token a row over the row's pages, with scores and sums in fp32.

    Args:
        q: (B, H, E) fp32 or bf16.
        keys, values: (P, K, page, E), one layer's pool, of q's dtype.
        page_table: (B, C) int64, each row's pages, then anything.
        lengths: (B,) int64, tokens that each row attends to, at least 1.

    Returns:
        (B, H, E).
    """
    outs = []
    for query, pages, length in zip(q.float().unsqueeze(2), page_table, lengths.tolist()):
        pages = pages[: -(-length // keys.shape[2])]
        key, value = (pool[pages].transpose(0, 1).flatten(1, 2)[:, :length].float() for pool in (keys, values))
        outs.append(F.scaled_dot_product_attention(query[None], key[None], value[None], enable_gqa=True))
    return torch.cat(outs).squeeze(2).to(q.dtype)  # of (1, H, 1, E) each


def memory_for(q: Tensor, num_splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the splits' a (B, H, splits, E), m and l (B, H, splits), fp32."""
    shape = *q.shape[:2], num_splits
    outs, tops, sums = (q.new_empty(shape + more, dtype=torch.float32) for more in (q.shape[2:], (), ()))
    return outs, tops, sums


def put_together(outs: Tensor, tops: Tensor, sums: Tensor) -> Tensor:
    """(B, H, E), of all splits."""
    weights = (tops - tops.amax(-1, keepdim=True)).exp_()
    # One after the other, so that empty splits at the end change nothing.
    return (weights[..., None] * outs).sum(2) / (weights * sums).cumsum(2)[..., -1:]


if triton is not None:

    @paged_decode.on("cuda")
    def _launch(q, keys, values, page_table, lengths):
        """It asks the device for nothing, so a graph can hold it."""
        size, group = q.shape[2], q.shape[1] // keys.shape[1]
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        num_splits = max(1, min(64, _WAVES * processors // (len(q) * keys.shape[1])))
        partial = memory_for(q, num_splits)
        tensors = q.contiguous(), keys, values, page_table.contiguous(), lengths, *partial
        _decode_kernel[(len(q), keys.shape[1], num_splits)](
            *tensors,
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
        return put_together(*partial).to(q.dtype)

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
