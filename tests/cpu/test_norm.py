"""RMSNorm and its gradients against float64."""

import pytest
import torch

from nanoredi.kernels import rms_norm


def plain(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


# In PyTorch, and for rows of 48 numbers in C, where there is a compiler.
@pytest.mark.parametrize("size", [24, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_norm_and_gradients_follow_the_formula(dtype, master, eps, size):
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(50, size, generator=generator).to(dtype) for _ in range(2))
    x[3] *= 1e-3
    x[4] = 0
    weight = (1 + torch.randn(size, generator=generator)).to(torch.float32 if master else dtype)
    inputs = x.requires_grad_(), weight.requires_grad_()
    _, out = rms_norm(*inputs, eps)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = plain(*exact, eps)
    pairs = zip((x, *inputs), (out, *torch.autograd.grad(out, inputs, upstream)))
    for (source, got), right in zip(pairs, (want, *torch.autograd.grad(want, exact, upstream.double()))):
        assert got.dtype == source.dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-3}[got.dtype]
        if got.dtype == torch.float32 and dtype == torch.bfloat16:
            tolerance = 1e-5
        assert ((got.double() - right).norm() / right.norm()).item() < tolerance


@pytest.mark.parametrize("size", [4, 32])
def test_inputs_that_need_no_gradient_get_none(size):
    x, weight = torch.randn(3, size), torch.randn(size)
    for needs in ((True, False), (False, True)):
        inputs = x.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        rms_norm(*inputs, 1e-6)[1].sum().backward()
        assert tuple(t.grad is not None for t in inputs) == needs
    torch.testing.assert_close(rms_norm(x, weight, 1e-6)[1], plain(x, weight, 1e-6))
    torch.testing.assert_close(rms_norm(x, torch.ones(1).expand(size), 1)[1], plain(x, torch.ones(size), 1))
