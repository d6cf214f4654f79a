"""Packed attention in C against a dense masked reference; tests that all versions share are in test_attention.py."""

import pytest
import torch
from conftest import skip_without_gcc
from dense import cumulative, dense, qkv

from nanoredi.cpu import native
from nanoredi.model.attention import PackedAttention

# For the result and the gradients of q, k and v. In bf16 a result is rounded (1.7e-3), and so are the attention weights
# and their gradients before it; torch's attention has 5e-3 to 8e-3 for q and k, 2e-3 to 5e-3 for v.
BOUNDS = {torch.float32: [2e-6] * 4, torch.bfloat16: [1.7e-3, 2.8e-3, 2.8e-3, 2.2e-3]}


@pytest.mark.parametrize("lengths", [(300, 5, 129), (48,), (1, 47, 49, 193)])
@pytest.mark.parametrize(
    "heads, kv_heads, size, dtype",
    [
        (6, 2, 64, torch.float32),
        (6, 2, 64, torch.bfloat16),
        (2, 2, 128, torch.bfloat16),
        (5, 1, 192, torch.float32),  # compiling a size and dtype takes a second
    ],
)
def test_in_c_packed_equals_dense_forward_and_backward(heads, kv_heads, size, dtype, lengths):
    inputs = qkv(sum(lengths), heads, kv_heads, size)
    inputs = [x.detach().mul(3).to(dtype).requires_grad_() for x in inputs]
    if native.library("causal", dtype, size) is None:
        skip_without_gcc("causal.c")
    out = PackedAttention(cumulative(lengths))(0, *inputs)
    assert "CausalAttention" in out.grad_fn.name()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = dense(*exact, lengths)
    rounding = (size / 64) ** 0.5 if dtype == torch.float32 else 1  # of a sum of E products
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    upstream = upstream.transpose(0, 2).contiguous().transpose(0, 2)  # not contiguous in the expected order
    got = torch.autograd.grad(out, inputs, upstream)
    for a, b, bound in zip((out, *got), (want, *torch.autograd.grad(want, exact, upstream.double())), BOUNDS[dtype]):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < bound * rounding


def test_without_a_compiler_torch_attends(monkeypatch):
    native.compiled.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    inputs = qkv(60, size=64)
    out = PackedAttention(cumulative((50, 10)))(0, *inputs)
    native.compiled.cache_clear()
    assert "CausalAttention" not in out.grad_fn.name()
    torch.testing.assert_close(out.double(), dense(*inputs, (50, 10)), atol=1e-5, rtol=0)
