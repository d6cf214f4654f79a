"""Rotation by position against complex numbers, in PyTorch and, where there is a compiler, in C."""

import pytest
import torch
from conftest import skip_without_gcc
from tiny import tiny_config

from nanoredi.cpu import native
from nanoredi.kernels.layers import rotate
from nanoredi.model.qwen2 import rotary_angles

PLACES = torch.tensor([0, 1, 2, 700, 31])


@pytest.fixture(params=["torch", "c"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "compiled", lambda *_, **__: None)
    elif native.library("pointwise", torch.float32, 16) is None:
        skip_without_gcc("pointwise.c")


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_pairs_rotate_and_their_gradients_rotate_back(dtype, bound, way):
    config = tiny_config(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024)
    cos, sin = rotary_angles(PLACES, config, dtype)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(5, 3, 64, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    turn = torch.complex(cos[..., 32:].double(), sin[..., 32:].double())  # (5, 1, 32)

    def turned(pairs, by):
        both = torch.complex(*pairs.detach().double().chunk(2, dim=-1)) * by
        return torch.cat((both.real, both.imag), dim=-1)

    out = rotate(x, cos, sin)
    (grad,) = torch.autograd.grad(out, x, upstream.transpose(0, 1).contiguous().transpose(0, 1))
    for got, want in ((out, turned(x, turn)), (grad, turned(upstream, turn.conj()))):
        assert got.dtype == dtype
        assert ((got.double() - want).norm() / want.norm()).item() < bound
