"""Layers and products, plain and by the machine's own versions, against float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

from nanoredi.kernels import embedding, gated_linear, linear, rms_norm, rotate
from nanoredi.kernels.layers import add_product, product, put_product

pytestmark = pytest.mark.usefixtures("version")
DTYPES = pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def close(got, want, bound):
    return ((got.double() - want).norm() / want.norm()).item() < bound


def norm(x, weight):
    return rms_norm(x, weight, 1e-6)


def exact_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


LAYERS = {
    "norm": (norm, exact_norm, [(9, 48), (48,)]),
    "norm of an odd size": (norm, exact_norm, [(9, 33), (33,)]),
    "linear": (linear, F.linear, [(9, 48), (20, 48), (20,)]),
    "linear without a bias": (linear, F.linear, [(9, 48), (20, 48)]),
    "gated": (gated_linear, lambda a, b, w: (F.silu(a) * b) @ w.T, [(9, 48), (9, 48), (20, 48)]),
    "gated, of an odd size": (gated_linear, lambda a, b, w: (F.silu(a) * b) @ w.T, [(9, 33), (9, 33), (20, 33)]),
}


@DTYPES
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_fp32_masters_and_its_gradients(name, dtype, bound):
    layer, exact, shapes = LAYERS[name]
    num_activations = sum(shape[0] == 9 for shape in shapes)
    inputs = [
        matrix(*shape, dtype=dtype if i < num_activations else torch.float32).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    doubles = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    want, out = exact(*doubles), layer(*inputs)
    assert out.dtype == dtype and close(out.detach(), want.detach(), bound)
    with torch.no_grad():
        assert close(layer(*inputs), want.detach(), bound)
    upstream = matrix(*out.shape, dtype=dtype)
    for x, got, right in zip(
        inputs,
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(want, doubles, upstream.double()),
    ):
        assert got.dtype == x.dtype and close(got, right, bound)


@DTYPES
@pytest.mark.parametrize("size", [32, 6])
def test_pairs_are_rotated_and_their_gradients_back(size, dtype, bound):
    x, upstream = matrix(7, 3, size, dtype=dtype).requires_grad_(), matrix(7, 3, size, dtype=dtype)
    angles = torch.arange(7.0)[:, None, None] / torch.arange(1, size // 2 + 1)
    cos, sin = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
    turn = torch.complex(cos.double(), sin.double())
    out = rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    (grad,) = torch.autograd.grad(out, x, upstream)
    for got, start, by in ((out.detach(), x.detach(), turn), (grad, upstream, turn.conj())):
        both = torch.complex(*start.double().chunk(2, dim=-1)) * by
        assert got.dtype == dtype and close(got, torch.cat((both.real, both.imag), -1), bound)


def test_an_embedding_s_repeated_token_adds_up():
    weight = matrix(4, 2).requires_grad_()
    ids = torch.tensor([3, 1, 3], device=DEVICE)
    out = embedding(ids, weight)
    assert torch.equal(out, weight[ids])
    out.sum().backward()
    assert weight.grad.tolist() == [[0, 0], [1, 1], [0, 0], [2, 2]]


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 7), (41, 99, 110), (1, 2, 1)])
def test_products(shape, dtype, bound):
    m, k, n = shape
    a, b = matrix(m, k, dtype=dtype), matrix(k, n, dtype=dtype)
    want = a.double() @ b.double()
    out, total = torch.empty(m, n, dtype=dtype, device=DEVICE), torch.ones(m, n, device=DEVICE)
    assert put_product(out, a, b) is out
    add_product(total, a, b)
    assert close(product(a, b), want, bound) and close(out, want, bound) and close(total - 1, want, bound)
