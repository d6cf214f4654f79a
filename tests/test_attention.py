"""Packed attention against a dense masked reference."""

import pytest
import torch

from nanoredi import blockwise
from nanoredi.attention import PackedAttention

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


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("lengths", [(300, 5, 129), (256,), (64, 257)])
def test_long_sequences_go_a_block_of_queries_at_a_time(lengths, dtype, bound, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", 64)
    inputs = [x.detach().mul(3).to(dtype).requires_grad_() for x in qkv(sum(lengths), size=16)]
    out = PackedAttention(cumulative(lengths))(0, *inputs)
    assert "Blockwise" in out.grad_fn.name()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = dense(*exact, lengths)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, upstream)
    for a, b in zip((out, *got), (want, *torch.autograd.grad(want, exact, upstream.double()))):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < bound
