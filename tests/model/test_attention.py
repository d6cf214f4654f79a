"""Packed attention against a dense masked reference."""

import pytest
import torch
from conftest import skip_without_gcc
from dense import dense, qkv

from nanoredi.cpu import native
from nanoredi.cpu.causal import runs_causal
from nanoredi.model.attention import PackedAttention

LENGTHS = (3, 1, 9, 6)


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


# Of the result and the gradients of q, k and v. In bf16 a result is rounded (1.7e-3), and so are the weights and their
# gradients before it; torch's own attention has 5e-3 to 8e-3 for q and k, 2e-3 to 5e-3 for v.
@pytest.mark.parametrize(
    "dtype, bounds", [(torch.float32, [2e-6] * 4), (torch.bfloat16, [1.7e-3, 2.8e-3, 2.8e-3, 2.2e-3])]
)
@pytest.mark.parametrize("lengths", [(300, 5, 129), (48,), (1, 47, 49, 193)])
@pytest.mark.parametrize("heads, kv_heads, size", [(6, 2, 64), (2, 2, 128), (5, 1, 192)])
def test_in_c_packed_equals_dense_forward_and_backward(heads, kv_heads, size, lengths, dtype, bounds):
    inputs = qkv(sum(lengths), heads, kv_heads, size)
    inputs = [x.detach().mul(3).to(dtype).requires_grad_() for x in inputs]
    if not runs_causal(inputs[0]):
        skip_without_gcc("causal.c")
    out = PackedAttention(cumulative(lengths))(0, *inputs)
    assert "CausalAttention" in out.grad_fn.name()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = dense(*exact, lengths)
    rounding = (size / 64) ** 0.5 if dtype == torch.float32 else 1  # of a sum of E products
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    upstream = upstream.transpose(0, 2).contiguous().transpose(0, 2)  # not as it lies in memory
    got = torch.autograd.grad(out, inputs, upstream)
    for a, b, bound in zip((out, *got), (want, *torch.autograd.grad(want, exact, upstream.double())), bounds):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < bound * rounding


def test_without_a_compiler_it_is_torch_s(monkeypatch):
    native.compiled.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    inputs = qkv(60, size=64)
    out = PackedAttention(cumulative((50, 10)))(0, *inputs)
    native.compiled.cache_clear()
    assert "CausalAttention" not in out.grad_fn.name()
    torch.testing.assert_close(out.double(), dense(*inputs, (50, 10)), atol=1e-5, rtol=0)


def test_what_comes_later_has_no_part_at_all():
    inputs = qkv(60, size=64)
    out = PackedAttention(cumulative((60,)))(0, *inputs)
    upstream = torch.zeros_like(out)
    upstream[20] = 1.0
    for grad in torch.autograd.grad(out, inputs, upstream):
        assert not grad[21:].any() and grad[20].all()
    later = [x.detach().clone() for x in inputs]
    for x, large in zip(later, (1e18, 1e18, 3e38)):
        x[21:] = large
    assert torch.equal(PackedAttention(cumulative((60,)))(0, *later)[:21], out[:21])


def test_a_score_that_is_not_a_number_is_not_hidden():
    """Of a row's own past alone; guards.py must see it."""
    q, k, v = (x.detach() for x in qkv(60, size=64))
    k[30, 0, 5] = torch.nan
    lost = PackedAttention(cumulative((60,)))(0, q, k, v).isnan()
    assert lost[30:, :3].all() and not lost[:30].any() and not lost[:, 3:].any()
