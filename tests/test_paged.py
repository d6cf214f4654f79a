"""Attention over pages, by kernel and page by page, against dense attention in float64; prefill in pieces; copies."""

import pytest
import torch
from test_attention import dense, qkv

from nanoredi import pagewise
from nanoredi.kernels.decode import paged_decode
from nanoredi.paged import PagedCache
from nanoredi.pagewise import PageWise

PRECISIONS = [(torch.float32, 2e-5), (torch.bfloat16, 0.02)]


def pool_of(rows, page_size, shared=(), spare=3, seed=0):
    """Rows' keys and values (T, K, E) laid out in pages of a pool full of garbage.

    Args:
        shared: for each row the row whose whole pages it uses from its start, and how many; None: none.

    Returns:
        keys, values (P, K, page, E), page_table (B, C), num_shared (B,).
    """
    g = torch.Generator().manual_seed(seed)
    counts = [-(-len(k) // page_size) for k, _ in rows]
    num_low = sum(max(0, len(k) // page_size) for k, _ in rows) + spare
    num_pages = num_low + sum(counts) + spare
    keys, values = torch.randn(2, num_pages, rows[0][0].shape[1], page_size, rows[0][0].shape[2], generator=g) * 50
    low, high = iter(torch.randperm(num_low, generator=g).tolist()), iter(range(num_pages - 1, num_low - 1, -1))
    table = torch.full((len(rows), max(counts) + 1), num_pages - 1)
    num_shared = torch.zeros(len(rows), dtype=torch.int64)
    for b, (k, v) in enumerate(rows):
        other, number_shared = (shared and shared[b]) or (None, 0)
        for number in range(counts[b]):
            if number < number_shared:
                page = int(table[other, number]) if other != b else next(low)
                num_shared[b] = number + 1
            else:
                page = next(high)
            table[b, number] = page
            for pool, x in ((keys, k), (values, v)):
                part = x[number * page_size : (number + 1) * page_size]
                pool[page, :, : len(part)] = part.transpose(0, 1)
    return keys, values, table, num_shared


def rows_of(lengths, kv_heads, size, shared=(), page_size=1):
    rows = [[x.detach() for x in qkv(n, kv_heads, kv_heads, size, seed=b)[1:]] for b, n in enumerate(lengths)]
    for b, share in enumerate(shared):
        if share and share[0] != b:
            for x, other in zip(rows[b], rows[share[0]]):
                x[: share[1] * page_size] = other[: share[1] * page_size]
    return rows


@pytest.mark.parametrize("size", [64, 128, 24])
@pytest.mark.parametrize("page_size, heads, kv_heads", [(16, 6, 2), (64, 4, 4), (7, 12, 2)])
def test_decode_kernel_equals_dense(size, page_size, heads, kv_heads):
    lengths = [1, 16, 130, 77]
    rows = rows_of(lengths, kv_heads, size)
    keys, values, table, _ = pool_of(rows, page_size)
    q = torch.randn(len(rows), heads, size, generator=torch.Generator().manual_seed(1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    got = paged_decode(*(x.to(device) for x in (q, keys, values, table, torch.tensor(lengths))))
    assert_rows_equal_dense(got.cpu(), q, rows)


def assert_rows_equal_dense(got, q, rows, tolerance=2e-5):
    for b, (k, v) in enumerate(rows):
        last = torch.cat((torch.zeros(len(k) - 1, *q.shape[1:]), q[b : b + 1]))
        torch.testing.assert_close(got[b].double(), dense(last, k, v, [len(k)])[-1], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "lengths, shared",
    [
        ([5, 1, 40, 16], ()),
        # Rows 1 to 3 begin as row 0 does, row 5 as row 4 does; row 6 is alone.
        ([40, 33, 50, 34, 20, 17, 3], [(0, 2), (0, 2), (0, 2), (0, 2), (4, 1), (4, 1), None]),
        # One page that all begin with, and one prompt each of two samples: more users than is common.
        ([20 + b for b in range(24)], [(0, 1)] * 24),
        ([50] * 20, [(0, 1) if b % 2 else (b, 3) for b in range(20)]),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_pagewise_equals_dense(lengths, shared, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(pagewise, "_AT_ONCE", 2_000)  # two pages and no whole third one
    page_size, heads, kv_heads, size = 16, 6, 2, 24
    rows = rows_of(lengths, kv_heads, size, shared, page_size)
    keys, values, table, num_shared = pool_of(rows, page_size, shared)
    keys, values = keys.to(dtype), values.to(dtype)
    q = torch.randn(len(rows), heads, size, generator=torch.Generator().manual_seed(1))
    attend = PageWise(table, torch.tensor(lengths), num_shared, keys, heads)
    assert_rows_equal_dense(attend(q.to(dtype), keys, values), q, rows, tolerance)


def test_pagewise_where_one_token_takes_nearly_all():
    """Scores of hundreds, the largest of a row on any of its pages."""
    lengths, shared = [40, 33, 50, 34], [(0, 2), (0, 2), (0, 2), None]
    rows = rows_of(lengths, 2, 24, shared, 16)
    keys, values, table, num_shared = pool_of(rows, 16, shared)
    q = 200 * torch.randn(len(rows), 6, 24, generator=torch.Generator().manual_seed(1))
    got = PageWise(table, torch.tensor(lengths), num_shared, keys, 6)(q, keys, values)
    assert_rows_equal_dense(got, q, rows, 1e-3)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_pagewise_equals_dense_where_rows_between_have_ended(dtype, tolerance):
    rows = rows_of([3, 200, 4, 20], 2, 64)
    keys, values, table, num_shared = pool_of(rows, 16)
    live = torch.tensor([0, 2])
    q = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    attend = PageWise(table[live], torch.tensor([3, 4]), num_shared[live], keys.to(dtype), 6)
    assert isinstance(attend.groups[0].pages, torch.Tensor)  # copied, not gone through
    got = attend(q.to(dtype), keys.to(dtype), values.to(dtype))
    assert got.dtype == dtype
    assert_rows_equal_dense(got, q, [rows[0], rows[2]], tolerance)


@pytest.mark.parametrize("page_size", [4, 16])
def test_prefill_in_pieces_and_decode_equal_one_pass(page_size):
    """Two rows in pieces, the second one's end copied from the first one's, then decoded; as without a cache."""
    layers, kv_heads, size, n = 2, 2, 8, 12
    cache = PagedCache(layers, kv_heads, size, 12, page_size, torch.float32, torch.device("cpu"))
    whole = [[[x.detach() for x in qkv(n, seed=10 * row + layer)] for layer in range(layers)] for row in range(2)]
    pages = [list(range(r * 4, r * 4 + -(-n // page_size))) for r in range(2)]
    got = {(row, layer): [] for row in range(2) for layer in range(layers)}
    for pieces in ([(0, 0, 5)], [(0, 5, 9), (1, 0, 3)], [(1, 3, 9)]):
        attend, positions = cache.prefill([(pages[row], start, end) for row, start, end in pieces])
        assert positions.tolist() == [p for _, start, end in pieces for p in range(start, end)]
        for layer in range(layers):
            parts = [[x[start:end] for x in whole[row][layer]] for row, start, end in pieces]
            out = attend(layer, *(torch.cat(x) for x in zip(*parts)))
            for (row, start, end), o in zip(pieces, out.split([end - start for _, start, end in pieces])):
                got[row, layer].append(o)
    last = pages[0][-1]
    cache.copy([last], [11])
    pages[0][-1] = 11
    cache.keys[:, last] = torch.nan  # nobody's any more
    table, lengths = torch.tensor(pages), torch.tensor([9, 9])
    for t in range(9, n):
        attend = cache.decode(table, lengths, torch.zeros(2, dtype=torch.int64), 6)
        for layer in range(layers):
            out = attend(layer, *(torch.stack([whole[row][layer][i][t] for row in range(2)]) for i in range(3)))
            for row in range(2):
                got[row, layer].append(out[row : row + 1])
        lengths = lengths + 1
    for (row, layer), parts in got.items():
        torch.testing.assert_close(torch.cat(parts).double(), dense(*whole[row][layer], [n]), atol=1e-5, rtol=0)
