"""Attention over pages, in Triton, in C and in plain PyTorch, against dense attention in float64; prefill in pieces;
copies."""

import pytest
import torch
from conftest import skip_without_gcc
from dense import dense, qkv

from nanoredi.cpu import native
from nanoredi.kernels import paged_attention
from nanoredi.kernels.paged_attention import c_decode, library_for, paged_decode, plain_decode, triton_decode
from nanoredi.sampler.kv_cache import PagedCache

PRECISIONS = [(torch.float32, 2e-5), (torch.bfloat16, 0.02)]


def in_c(q, keys, values, page_table, lengths):
    if library_for(q, keys) is None:
        skip_without_gcc("paged_attention.c")
    return c_decode(q, keys, values, page_table, lengths)


def in_triton(*tensors):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and tensors[0].dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as if they were numbers")
    return triton_decode(*(x.to(device) for x in tensors)).cpu()


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


@pytest.mark.parametrize("attend", [plain_decode, in_c, in_triton])
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("size", [64, 128, 48, 24, 20])
@pytest.mark.parametrize("page_size, heads, kv_heads", [(16, 6, 2), (64, 4, 4), (7, 14, 2), (5, 16, 1)])
def test_one_token_a_row_equals_dense(attend, dtype, tolerance, size, page_size, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(
        paged_attention, "_AT_ONCE", 3 * kv_heads * page_size * size
    )  # pages, and no whole number of times
    lengths, shared = [1, 16, 130, 77, 90], [None, None, None, None, (3, 64 // page_size)]
    rows = rows_of(lengths, kv_heads, size, shared, page_size)
    keys, values, table = pool_of(rows, page_size, shared)
    q = torch.randn(len(rows), heads, size, generator=torch.Generator().manual_seed(1))
    got = attend(*(x.to(dtype) for x in (q, keys, values)), table, torch.tensor(lengths))
    assert got.dtype == dtype
    assert_rows_equal_dense(got, q, rows, tolerance)


@pytest.mark.parametrize("attend", [plain_decode, in_c, in_triton])
def test_where_one_token_takes_nearly_all(attend):
    """Scores of hundreds, the largest of a row on any of its pages."""
    lengths = [40, 33, 50, 34]
    rows = rows_of(lengths, 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = 200 * torch.randn(len(rows), 6, 32, generator=torch.Generator().manual_seed(1))
    got = attend(q, keys, values, table, torch.tensor(lengths))
    assert_rows_equal_dense(got, q, rows, 1e-3)


@pytest.mark.parametrize("attend", [in_c, in_triton])
@pytest.mark.parametrize("length", [1, 40, 900])
def test_a_long_row_is_split_among_programs(attend, length, monkeypatch):
    monkeypatch.setattr(paged_attention, "_WAVES", 40)
    rows = rows_of([length], 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    assert_rows_equal_dense(attend(q, keys, values, table, torch.tensor([length])), q, rows)


def test_without_a_compiler_it_runs_in_pytorch(monkeypatch, capsys):
    rows = rows_of([40, 3], 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    native.compiled.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert library_for(q, keys) is None
    assert "decode.c was not compiled (there is no C compiler, cc); PyTorch does the same" in capsys.readouterr().err
    assert_rows_equal_dense(paged_decode(q, keys, values, table, torch.tensor([40, 3])), q, rows)
    native.compiled.cache_clear()


@pytest.mark.parametrize("words, why", [("echo no -fopenmp >&2; exit 1", "no -fopenmp"), ("exit 0", "library.so")])
def test_a_compiler_that_fails_is_done_without(words, why, tmp_path, monkeypatch, capsys):
    """It says that it failed, or makes no library."""
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{words}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    native.compiled.cache_clear()
    assert native.compiled("decode", SIZE=16, GROUP=1, PAGE=16, IN_BF16=0) is None
    note = capsys.readouterr().err
    assert note.startswith("note: decode.c was not compiled (") and why in note
    native.compiled.cache_clear()


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
            for (row, *_), o in zip(pieces, out.split([end - start for _, start, end in pieces])):
                got[row, layer].append(o)
    last = pages[0][-1]
    cache.copy([last], [11])
    pages[0][-1] = 11
    cache.keys[:, last] = torch.nan  # nobody's any more
    table, lengths = torch.tensor(pages), torch.tensor([9, 9])
    for t in range(9, n):
        attend = cache.decode(table, lengths)
        for layer in range(layers):
            out = attend(layer, *(torch.stack([whole[row][layer][i][t] for row in range(2)]) for i in range(3)))
            for row in range(2):
                got[row, layer].append(out[row : row + 1])
        lengths = lengths + 1
    for (row, layer), parts in got.items():
        torch.testing.assert_close(torch.cat(parts).double(), dense(*whole[row][layer], [n]), atol=1e-5, rtol=0)
