"""Attention over the paged key-value cache: new keys and values are written to the pages of their rows, and queries
attend to them, in plain PyTorch and on a GPU in Triton.

A decode step has one query a row. The row's tokens are cut into spans of a fixed length, and a program takes a span of
a row, for one key-value head with the G = H/K query heads that share it. It goes over the tokens with the online
softmax of flash attention (arXiv 2205.14135, algorithm 1): of scores s_t = q.k_t / sqrt(E) it keeps the maximum m, the
sum l of exp(s_t - m) and the vector a, the sum of exp(s_t - m) v_t. A second kernel combines the row's spans i,

    M = max(m, m_i)     l <- exp(m - M) l + exp(m_i - M) l_i     a <- exp(m - M) a + exp(m_i - M) a_i     m <- M

and returns a / l. So the order in which a row's numbers are added up depends on the row alone: the result is the same,
bit for bit, whatever other rows are in the batch and however long they are. The kernels read a page in place; plain
PyTorch copies each row's pages.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.dispatch import operation, tl, triton
from nanoredi.kernels.layers import rotate

# Tokens that a program loads at once, and those of a span. Shorter spans would leave more to combine; with longer ones
# a few long rows would leave most multiprocessors idle.
_BLOCK, SPAN = 64, 1024


@operation
def write(
    q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, indices: Tensor
) -> Tensor:
    """Write new keys and values into a layer's pool, rotated.

    Args:
        q, k, v: (N, H, E), and (N, K, E) twice.
        rope: cos and sin to rotate q and k by (layers.rotate); None: they are rotated already.
        keys, values: (P, K, page, E), of the dtype of k and v.
        indices: (N*K,) int64, where each token's heads go in a pool viewed as (P * K * page, E).

    Returns:
        The rotated queries (N, H, E).
    """
    if rope:
        q, k = rotate(q, *rope), rotate(k, *rope)
    keys.view(-1, k.shape[2]).index_copy_(0, indices, k.flatten(0, 1))
    values.view(-1, v.shape[2]).index_copy_(0, indices, v.flatten(0, 1))
    return q


@operation
def paged_decode(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one query a row over the row's pages, with scores and sums in fp32.

    Args:
        q: (B, H, E) fp32 or bf16.
        keys, values: (P, K, page, E), one layer's pool, of q's dtype.
        page_table: (B, C) int64, each row's pages, then anything.
        lengths: (B,) int64, tokens of each row, at least 1.

    Returns:
        (B, H, E).
    """
    outs = []
    for query, pages, length in zip(q.float().unsqueeze(2), page_table, lengths.tolist()):
        pages = pages[: -(-length // keys.shape[2])]
        key, value = (pool[pages].transpose(0, 1).flatten(1, 2)[:, :length].float() for pool in (keys, values))
        outs.append(F.scaled_dot_product_attention(query[None], key[None], value[None], enable_gqa=True))
    return torch.cat(outs).squeeze(2).to(q.dtype)  # of (1, H, 1, E) each


def memory_for(q: Tensor, num_spans: int) -> tuple[Tensor, ...]:
    """Memory for the spans' a (B, H, spans, E), m and l (B, H, spans), fp32."""
    shape = *q.shape[:2], num_spans
    return tuple(q.new_empty(shape + more, dtype=torch.float32) for more in (q.shape[2:], (), ()))


if triton is not None:

    @write.on("cuda")
    def _launch_write(q, k, v, rope, keys, values, indices):
        """The tokens may be strided, as they are where one product has computed q, k and v."""
        if not rope:
            return NotImplemented
        (num_tokens, num_heads, size), num_kv_heads = q.shape, k.shape[1]
        out = q.new_empty(q.shape)
        sizes = q.stride(0), k.stride(0), v.stride(0), num_heads, num_kv_heads, size // 2
        programs = num_tokens, num_heads + 2 * num_kv_heads
        _write_kernel[programs](q, k, v, *rope, out, keys, values, indices, *sizes, num_warps=1)
        return out

    @triton.jit
    def _write_kernel(
        q, k, v, cos, sin, out, keys, values, indices, q_stride, k_stride, v_stride, H, K, HALF: tl.constexpr
    ):
        """A program copies one head of a token; the query's heads come first, then the key's, then the value's."""
        n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        size = 2 * HALF
        if head < H:
            source = q + n * q_stride + head * size
            target = out + (n * H + head) * size
        elif head < H + K:
            head -= H
            source = k + n * k_stride + head * size
            target = keys + tl.load(indices + n * K + head) * size
        else:
            head -= H + K
            source = v + n * v_stride + head * size
            target = values + tl.load(indices + n * K + head) * size
        i = tl.arange(0, triton.next_power_of_2(HALF))
        a, b = tl.load(source + i, mask=i < HALF), tl.load(source + HALF + i, mask=i < HALF)
        if tl.program_id(1) < H + K:
            c = tl.load(cos + n * size + i, mask=i < HALF).to(tl.float32)
            s = tl.load(sin + n * size + HALF + i, mask=i < HALF).to(tl.float32)
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a = (wide_a * c - wide_b * s).to(a.dtype)
            b = (wide_b * c + wide_a * s).to(b.dtype)
        tl.store(target + i, a, mask=i < HALF)
        tl.store(target + HALF + i, b, mask=i < HALF)

    @paged_decode.on("cuda")
    def _launch(q, keys, values, page_table, lengths):
        """This never waits for the device, so a CUDA graph can capture it."""
        (num_rows, num_heads, size), (_, num_kv_heads, page_size, _) = q.shape, keys.shape
        group, num_columns = num_heads // num_kv_heads, page_table.shape[1]
        num_spans = triton.cdiv(num_columns * page_size, SPAN)
        out = q.new_empty(q.shape)
        partial = memory_for(q, num_spans) if num_spans > 1 else (out, out, out)
        tensors = q.contiguous(), keys, values, page_table.contiguous(), lengths, *partial
        sizes = {"SIZE": size, "SPAN": SPAN}
        constants = {"GROUP": group, "PAGE": page_size, "BLOCK": _BLOCK, "ALONE": num_spans == 1, **sizes}
        _decode_kernel[(num_rows, num_kv_heads, num_spans)](*tensors, size**-0.5, num_columns, **constants, num_warps=4)
        if num_spans > 1:
            _combine_kernel[(num_rows, num_heads)](out, lengths, *partial, num_spans, num_warps=1, **sizes)
        return out

    @triton.jit
    def _decode_kernel(
        q,
        keys,
        values,
        page_table,
        lengths,
        outs,
        maxima,
        sums,
        scale,
        num_columns,
        GROUP: tl.constexpr,
        PAGE: tl.constexpr,
        BLOCK: tl.constexpr,
        ALONE: tl.constexpr,
        SIZE: tl.constexpr,
        SPAN: tl.constexpr,
    ):
        b, k, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        num_kv_heads, num_spans = tl.num_programs(1), tl.num_programs(2)
        length = tl.load(lengths + b).to(tl.int32)
        start, end = span * SPAN, tl.minimum((span + 1) * SPAN, length)
        if start >= end:
            return

        # tl.dot takes no block smaller than 16.
        GROUP_BLOCK: tl.constexpr = triton.next_power_of_2(GROUP) if GROUP > 16 else 16
        SIZE_BLOCK: tl.constexpr = triton.next_power_of_2(SIZE) if SIZE > 16 else 16
        g, e = tl.arange(0, GROUP_BLOCK), tl.arange(0, SIZE_BLOCK)
        head = b * num_kv_heads * GROUP + k * GROUP + g  # index into (B * H)
        is_head = (g[:, None] < GROUP) & (e[None, :] < SIZE)
        queries = tl.load(q + head[:, None] * SIZE + e[None, :], mask=is_head, other=0.0)
        m = tl.full((GROUP_BLOCK,), -1.0e30, tl.float32)
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
            new_m = tl.maximum(m, tl.max(scores, 1))
            weights = tl.exp(scores - new_m[:, None])
            shrink = tl.exp(m - new_m)
            value = tl.load(values + at, mask=there, other=0.0)
            total = total * shrink + tl.sum(weights, 1)
            out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            m = new_m
        index = head * num_spans + span
        if ALONE:
            out = out / total[:, None]
        else:
            tl.store(maxima + index, m, mask=g < GROUP)
            tl.store(sums + index, total, mask=g < GROUP)
        tl.store(outs + index[:, None] * SIZE + e[None, :], out, mask=is_head)

    @triton.jit
    def _combine_kernel(combined, lengths, outs, maxima, sums, num_spans, SIZE: tl.constexpr, SPAN: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        head = b * tl.num_programs(1) + tl.program_id(1)
        BLOCK: tl.constexpr = triton.next_power_of_2(SIZE)
        e = tl.arange(0, BLOCK)
        m, total = tl.full((), -1.0e30, tl.float32), tl.full((), 0.0, tl.float32)
        out = tl.zeros((BLOCK,), tl.float32)
        for span in range(tl.cdiv(tl.load(lengths + b).to(tl.int32), SPAN)):
            index = head * num_spans + span
            m_i = tl.load(maxima + index)
            new_m = tl.maximum(m, m_i)
            shrink, grow = tl.exp(m - new_m), tl.exp(m_i - new_m)
            total = total * shrink + tl.load(sums + index) * grow
            out = out * shrink + tl.load(outs + index * SIZE + e, mask=e < SIZE, other=0.0) * grow
            m = new_m
        tl.store(combined + head * SIZE + e, out / total, mask=e < SIZE)
