"""Attention over pages, in plain PyTorch, by this device's version and in Triton, against dense attention in float64;
chunked prefill; copies."""

import errno

import pytest
import torch
from conftest import DEVICE, use_triton
from dense import dense, qkv
from pool import assert_rows_equal_dense, pool_of, rows_of

from nanoredi.common.errors import sentence
from nanoredi.kernels import dispatch, paged_attention
from nanoredi.kernels.paged_attention import paged_decode, write
from nanoredi.sampler.kv_cache import PagedCache

PRECISIONS = [(torch.float32, 2e-5), (torch.bfloat16, 0.02)]


def fastest(*tensors):
    return paged_decode(*(x.to(DEVICE) for x in tensors)).cpu()


def in_triton(*tensors):
    if dispatch.triton is None:
        pytest.skip("Triton is not installed")
    if DEVICE.type == "cpu":
        import interpreter  # noqa: F401  it learns to multiply and to round bf16
    return paged_decode.faster["cuda"](*(x.to(DEVICE) for x in tensors)).cpu()


@pytest.mark.parametrize("attend", [paged_decode.plain, fastest, in_triton])
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize(
    "size, page_size, heads, kv_heads",
    [
        (64, 16, 6, 2),
        (64, 5, 16, 1),
        (128, 64, 4, 4),
        (128, 7, 14, 2),
        (48, 7, 14, 2),
        (24, 5, 16, 1),
        (20, 16, 6, 2),
        (20, 64, 4, 4),
    ],
)
def test_one_token_a_row_equals_dense(attend, dtype, tolerance, size, page_size, heads, kv_heads):
    lengths, shared = [1, 16, 130, 77, 90], [None, None, None, None, (3, 64 // page_size)]
    rows = rows_of(lengths, kv_heads, size, shared, page_size)
    keys, values, table = pool_of(rows, page_size, shared)
    q = torch.randn(len(rows), heads, size, generator=torch.Generator().manual_seed(1))
    got = attend(*(x.to(dtype) for x in (q, keys, values)), table, torch.tensor(lengths))
    assert got.dtype == dtype
    assert_rows_equal_dense(got, q, rows, tolerance)


@pytest.mark.parametrize("attend", [paged_decode.plain, fastest, in_triton])
def test_where_one_token_takes_nearly_all(attend):
    """Scores of hundreds, the largest of a row on any of its pages."""
    lengths = [40, 33, 50, 34]
    rows = rows_of(lengths, 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = 200 * torch.randn(len(rows), 6, 32, generator=torch.Generator().manual_seed(1))
    got = attend(q, keys, values, table, torch.tensor(lengths))
    assert_rows_equal_dense(got, q, rows, 1e-3)


@pytest.mark.parametrize("attend", [fastest, in_triton])
@pytest.mark.parametrize("length", [1, 40, 900])
def test_a_long_row_is_split_among_programs(attend, length, monkeypatch):
    monkeypatch.setattr(paged_attention, "SPAN", 64)
    rows = rows_of([length], 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    assert_rows_equal_dense(attend(q, keys, values, table, torch.tensor([length])), q, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_attends_the_same_bit_for_bit_whatever_is_beside_it(dtype, monkeypatch):
    """Beside longer rows it has more, empty spans; alone it may have a single one, which needs no combining."""
    monkeypatch.setattr(paged_attention, "SPAN", 64)
    lengths = [5, 64, 65, 130, 300]
    rows = rows_of(lengths, 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = torch.randn(len(rows), 6, 32, generator=torch.Generator().manual_seed(1))
    q, keys, values = (x.to(dtype) for x in (q, keys, values))
    together = in_triton(q, keys, values, table, torch.tensor(lengths))
    for b, length in enumerate(lengths):
        for more in (0, 4, 11):  # columns that it does not need
            columns = torch.cat((table, table), dim=1)[b : b + 1, : -(-length // 16) + more]
            alone = in_triton(q[b : b + 1], keys, values, columns, torch.tensor([length]))
            assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("heads, kv_heads, size", [(6, 2, 32), (3, 3, 20), (2, 1, 6)])
def test_new_tokens_are_written_to_their_pages(heads, kv_heads, size, dtype, tolerance, rotated, monkeypatch):
    g = torch.Generator().manual_seed(1)
    # Strided, as one product computes them.
    made = torch.randn(5, (heads + 2 * kv_heads) * size, generator=g).to(DEVICE, dtype).unflatten(1, (-1, size))
    qkv = made.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.randn(5, 1, size // 2, generator=g).to(DEVICE)
    rope = [torch.cat(x, -1).to(dtype) for x in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin()))]
    pools = torch.randn(2, 4, kv_heads, 8, size, generator=g).to(DEVICE, dtype)
    indices = torch.randperm(4 * kv_heads * 8, generator=g)[: 5 * kv_heads].to(DEVICE)

    def written(way):
        keys, values = pools.clone()
        return way(*qkv, None if rotated else rope, keys, values, indices), keys, values

    plain, fastest = written(write.plain), written(write)
    use_triton(monkeypatch, write)
    for got in (fastest, written(write)):
        for ours, wanted in zip(got, plain, strict=True):
            torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=tolerance)
    assert (plain[1] != pools[0]).any(-1).flatten().nonzero().squeeze(1).tolist() == sorted(indices.tolist())
    assert torch.equal(plain[2].view(-1, size)[indices], qkv[2].flatten(0, 1))


@pytest.mark.parametrize("page_size", [4, 16])
def test_chunked_prefill_and_decode_equal_one_pass(page_size):
    """Two rows in chunks, the second one's last page copied from the first one's, then decoded; as without a cache."""
    layers, kv_heads, size, n = 2, 2, 8, 12
    cache = PagedCache((layers, 12, kv_heads, page_size, size), torch.float32, torch.device("cpu"))
    whole = [[[x.detach() for x in qkv(n, seed=10 * row + layer)] for layer in range(layers)] for row in range(2)]
    pages = [list(range(r * 4, r * 4 + -(-n // page_size))) for r in range(2)]
    got = {(row, layer): [] for row in range(2) for layer in range(layers)}
    for chunks in ([(0, 0, 5)], [(0, 5, 9), (1, 0, 3)], [(1, 3, 9)]):
        attend, positions = cache.prefill([(pages[row], start, end) for row, start, end in chunks])
        assert positions.tolist() == [p for _, start, end in chunks for p in range(start, end)]
        for layer in range(layers):
            parts = [[x[start:end] for x in whole[row][layer]] for row, start, end in chunks]
            out = attend(layer, *(torch.cat(x) for x in zip(*parts)))
            for (row, *_), o in zip(chunks, out.split([end - start for _, start, end in chunks])):
                got[row, layer].append(o)
    last = pages[0][-1]
    cache.copy([last], [11])
    pages[0][-1] = 11
    cache.keys[:, last] = torch.nan  # no longer used
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


def test_memory_that_the_system_refuses_is_no_fault_of_the_disk(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(OSError) as caught:
        PagedCache((1, 1, 1, 4, 8), torch.float32, torch.device("cpu"))
    assert "there is not enough memory" in sentence(caught.value) and "--cache_gb" in sentence(caught.value)
