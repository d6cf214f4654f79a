"""Paged attention without a compiler, in PyTorch arranged for a CPU's cache; in C it is tested in test_kv_cache.py."""

import pytest
import torch
from conftest import skip_without_gcc
from pool import assert_rows_equal_dense, pool_of, rows_of

from nanoredi.cpu import decode, native
from nanoredi.kernels.paged_attention import paged_decode


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("page_size, heads, kv_heads, size", [(16, 6, 2, 64), (7, 14, 2, 20), (5, 16, 1, 48)])
def test_paged_equals_dense(dtype, tolerance, page_size, heads, kv_heads, size, monkeypatch):
    # Pages that are gathered at a time; the lengths are no multiples of them.
    monkeypatch.setattr(decode, "_AT_ONCE", 3 * kv_heads * page_size * size)
    lengths, shared = [1, 16, 130, 77, 90], [None, None, None, None, (3, 64 // page_size)]
    rows = rows_of(lengths, kv_heads, size, shared, page_size)
    keys, values, table = pool_of(rows, page_size, shared)
    q = torch.randn(len(rows), heads, size, generator=torch.Generator().manual_seed(1))
    tensors = *(x.to(dtype) for x in (q, keys, values)), table, torch.tensor(lengths)
    got, plain = decode.by_pages(*tensors), paged_decode.plain(*tensors)
    assert got.dtype == dtype
    assert_rows_equal_dense(got, q, rows, tolerance)
    torch.testing.assert_close(got, plain, atol=tolerance, rtol=0)


def test_with_gcc_it_runs_in_c():
    if native.library("decode", torch.float32, 32, GROUP=3, PAGE=16) is None:
        skip_without_gcc("decode.c")


def test_without_a_compiler_it_runs_in_pytorch(monkeypatch):
    rows = rows_of([40, 3], 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(native, "compiled", lambda *_, **__: None)
    assert_rows_equal_dense(paged_decode(q, keys, values, table, torch.tensor([40, 3])), q, rows)
