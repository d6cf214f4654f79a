"""Packed and cached attention against a dense masked reference."""

import pytest
import torch

from nanoredi.attention import KVCache, PackedAttention

LENGTHS = (3, 1, 9, 6)


def qkv(n, heads=6, kv_heads=2, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, h, size, generator=g, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def dense(q, k, v, lengths):
    """Softmax over one (N, N) matrix a head, everything outside a token's own past masked, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sequence))
    allowed = (sequence[:, None] == sequence) & (place[:, None] >= place)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihe,jhe->hij", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("max_seqlen", [None, max(LENGTHS)])
def test_packed_equals_dense_forward_and_backward(max_seqlen):
    inputs = qkv(sum(LENGTHS))
    out = PackedAttention(cumulative(LENGTHS), max_seqlen)(0, *inputs)
    want = dense(*inputs, LENGTHS)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, upstream)
    for a, b in zip(got, torch.autograd.grad(want, inputs, upstream.double())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_cache_equals_packed_token_by_token():
    """Prefill two rows, decode both to other lengths, in a cache that must grow; the same outputs as without a
    cache."""
    cache, layers = KVCache(2, 2, 8, torch.float32, torch.device("cpu")), 2
    whole = {
        (row, layer): [x.detach() for x in qkv(10, seed=10 * row + layer)]
        for row in range(2)
        for layer in range(layers)
    }
    lengths = [4, 2]
    cache.reserve(2, 4)
    attend = cache.prefill(0, cumulative(lengths), 4)
    for layer in range(layers):
        parts = [[x[:n] for x in whole[row, layer]] for row, n in enumerate(lengths)]
        attend(layer, *(torch.cat(p) for p in zip(*parts)))
    for _ in range(4):
        cache.reserve(2, max(lengths) + 1)
        attend = cache.decode(torch.tensor(lengths), max(lengths))
        for layer in range(layers):
            q, k, v = (torch.stack([whole[row, layer][i][n] for row, n in enumerate(lengths)]) for i in range(3))
            out = attend(layer, q, k, v)
            for row, n in enumerate(lengths):
                want = dense(*(x[: n + 1] for x in whole[row, layer]), [n + 1])[-1]
                torch.testing.assert_close(out[row].double(), want, atol=1e-5, rtol=0)
        lengths = [n + 1 for n in lengths]


def test_a_moved_row_is_the_same_row():
    cache = KVCache(1, 2, 8, torch.float32, torch.device("cpu"))
    cache.reserve(3, 5)
    q, k, v = (x.detach() for x in qkv(5))
    cache.prefill(2, cumulative([5]), 5)(0, q, k, v)
    cache.move(2, 0)
    assert torch.equal(cache.keys[:, 0, :, :5], cache.keys[:, 2, :, :5]) and torch.equal(
        cache.values[0, 0, :, :5], v.transpose(0, 1)
    )
