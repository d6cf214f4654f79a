"""Rows laid out in a pool of pages, for paged attention, and the result it must give."""

import torch
from dense import dense, qkv


def pool_of(rows, page_size, shared=(), spare=3, seed=0):
    """Rows' keys and values (T, K, E) laid out in pages of a pool full of garbage.

    Args:
        shared: for each row the row whose whole pages it uses from its start, and how many; None: none.

    Returns:
        keys, values (P, K, page, E), page_table (B, C).
    """
    g = torch.Generator().manual_seed(seed)
    counts = [-(-len(k) // page_size) for k, _ in rows]
    num_pages = sum(counts) + spare
    keys, values = torch.randn(2, num_pages, rows[0][0].shape[1], page_size, rows[0][0].shape[2], generator=g) * 50
    free = iter(torch.randperm(num_pages, generator=g).tolist())
    table = torch.full((len(rows), max(counts) + 1), num_pages - 1)
    for b, (k, v) in enumerate(rows):
        other, number_shared = (shared and shared[b]) or (b, 0)
        for number in range(counts[b]):
            page = int(table[other, number]) if other != b and number < number_shared else next(free)
            table[b, number] = page
            for pool, x in ((keys, k), (values, v)):
                part = x[number * page_size : (number + 1) * page_size]
                pool[page, :, : len(part)] = part.transpose(0, 1)
    return keys, values, table


def rows_of(lengths, kv_heads, size, shared=(), page_size=1):
    rows = [[x.detach() for x in qkv(n, kv_heads, kv_heads, size, seed=b)[1:]] for b, n in enumerate(lengths)]
    for b, share in enumerate(shared):
        if share and share[0] != b:
            for x, other in zip(rows[b], rows[share[0]]):
                x[: share[1] * page_size] = other[: share[1] * page_size]
    return rows


def assert_rows_equal_dense(got, q, rows, tolerance=2e-5):
    for b, (k, v) in enumerate(rows):
        last = torch.cat((torch.zeros(len(k) - 1, *q.shape[1:]), q[b : b + 1]))
        torch.testing.assert_close(got[b].double(), dense(last, k, v, [len(k)])[-1], atol=tolerance, rtol=0)
