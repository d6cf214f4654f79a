"""Layers and products against float64: the plain versions, the device's and Triton's (in its interpreter where there is
no GPU)."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, use_triton

from nanoredi.cuda import pointwise
from nanoredi.kernels import embedding, linear, mlp, qkv, rms_norm
from nanoredi.kernels.layers import add_product, product, put_product

DTYPES = pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])


@pytest.fixture(params=["plain", "fastest", "triton"], autouse=True)
def version(request, monkeypatch):
    if request.param == "plain":
        request.getfixturevalue("plain")
    elif request.param == "triton":
        use_triton(monkeypatch, rms_norm, mlp, qkv)
    return request.param


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    """Block sizes such that a program has several rows, tokens, elements and parts, and the last program fewer."""
    for name, number in (("_PARTS", 5), ("_TOKENS", 4), ("_ELEMENTS", 128), ("_TILE", 2)):
        monkeypatch.setattr(pointwise, name, number)


def matrix(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(DEVICE, dtype)


def close(got, want, bound):
    return (got.double() - want).norm() <= bound * want.norm()


def norm(x, weight):
    return rms_norm(x, weight, 1e-6)[1]


def exact_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def norm_and_stream(x, added, weight):
    """Uses both results, so that their gradients are added."""
    return torch.cat(rms_norm(x, weight, 1e-6, added))


def exact_norm_and_stream(x, added, weight):
    return torch.cat((x + added, exact_norm(x + added, weight)))


def joint(layer):
    """qkv with its results side by side: three query heads and one key-value head, of size 6 or 32."""

    def side_by_side(x, *parameters):
        size = len(parameters[1])
        angles = torch.arange(len(x), device=DEVICE)[:, None, None] / torch.arange(1, size // 2 + 1, device=DEVICE)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return torch.cat(layer(x, parameters[:3], parameters[3:], *rope), 1).flatten(1)

    return side_by_side


def exact_qkv(x, weights, biases, cos, sin):
    q, k, v = (F.linear(x, w, b).unflatten(1, (-1, cos.shape[-1])) for w, b in zip(weights, biases))
    turn = torch.complex(*(y.double().chunk(2, dim=-1)[1] for y in (cos, sin)))
    q, k = (torch.complex(*y.chunk(2, dim=-1)) * turn for y in (q, k))
    return *(torch.cat((y.real, y.imag), -1) for y in (q, k)), v


def exact_mlp(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


N = 0  # stands for the number of tokens
ROWS = pytest.mark.parametrize("n", [0, 1, 9])
LAYERS = {
    "norm": (norm, exact_norm, [(N, 48), (48,)]),
    "norm of an odd size": (norm, exact_norm, [(N, 33), (33,)]),
    "norm of a sum": (norm_and_stream, exact_norm_and_stream, [(N, 48), (N, 48), (48,)]),
    "norm of a sum, of an odd size": (norm_and_stream, exact_norm_and_stream, [(N, 33), (N, 33), (33,)]),
    "linear": (linear, F.linear, [(N, 48), (20, 48), (20,)]),
    "linear without a bias": (linear, F.linear, [(N, 48), (20, 48)]),
    "MLP": (mlp, exact_mlp, [(N, 20), (48, 20), (48, 20), (20, 48)]),
    "MLP of an odd size": (mlp, exact_mlp, [(N, 20), (33, 20), (33, 20), (20, 33)]),
    "qkv": (joint(qkv), joint(exact_qkv), [(N, 48), (96, 48), (32, 48), (32, 48), (96,), (32,), (32,)]),
    "qkv of an odd size": (joint(qkv), joint(exact_qkv), [(N, 33), (18, 33), (6, 33), (6, 33), (18,), (6,), (6,)]),
}


@DTYPES
@ROWS
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_fp32_masters_and_its_gradients(name, n, dtype, bound):
    layer, exact, shapes = LAYERS[name]
    inputs = [
        (matrix(n, *shape[1:], dtype=dtype, seed=i) if shape[0] == N else matrix(*shape, seed=i)).requires_grad_()
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


def test_a_sum_over_rows_is_rounded_once(monkeypatch):
    """A program adds up the rows 0 and 8, 256 + 1, and another has row 4, -256. In bf16 257 would be 256."""
    monkeypatch.setattr(pointwise, "_PARTS", 8)
    upstream = torch.zeros(12, 1)
    upstream[0], upstream[8], upstream[4] = 256, 1, -256
    x = torch.ones(12, 16, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.ones(16, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weights = [torch.eye(16, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    biases = [torch.zeros(16, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for _ in range(3)]
    rope = torch.ones(12, 1, 16, dtype=torch.bfloat16), torch.zeros(12, 1, 16, dtype=torch.bfloat16)
    outs = [norm(x, scale), *(y.flatten(1) for y in qkv(x, weights, biases, *(y.to(DEVICE) for y in rope)))]
    for parameter, out in zip((scale, *biases), outs):
        (gradient,) = torch.autograd.grad(out, parameter, upstream.to(out).expand_as(out), retain_graph=True)
        assert gradient.dtype == torch.bfloat16 and gradient.tolist() == [1.0] * 16


def test_embedding_gradients_of_a_repeated_token_add_up():
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
