"""Packed attention against a dense masked reference."""

import pytest
import torch
from dense import cumulative, dense, qkv

from nanoredi.model.attention import PackedAttention

LENGTHS = (3, 1, 9, 6)


pytestmark = pytest.mark.usefixtures("version")


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


def test_later_tokens_have_no_influence():
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


def test_a_nan_score_is_not_hidden():
    """NaN in a row's own past, and there alone, reaches the result, because guards.py must see it."""
    q, k, v = (x.detach() for x in qkv(60, size=64))
    k[30, 0, 5] = torch.nan
    lost = PackedAttention(cumulative((60,)))(0, q, k, v).isnan()
    assert lost[30:, :3].all() and not lost[:30].any() and not lost[:, 3:].any()
