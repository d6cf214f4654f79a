"""Matrix products and linear layers against float64, whichever library makes them."""

import pytest
import torch

from nanoredi.kernels import products
from nanoredi.kernels.products import add_product, linear, packed, product, put_product

# Small; of the size from which on oneDNN may be asked; and one more than a piece that is made at once.
SHAPES = [(3, 5, 7), (300, 400, 300), (2050, 8, 2060)]


def close(got, want, dtype):
    error = (got.double() - want).norm() / want.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6), error


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=[False, True])
def onednn(request, monkeypatch):
    """With and without AVX-512, on any machine whose torch has oneDNN."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(products, "_HAS_AVX512", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64(shape, dtype, onednn):
    m, k, n = shape
    a, b = matrix(m, k, dtype=dtype), matrix(k, n, dtype=dtype)
    want = a.double() @ b.double()
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T, torch.cat((b, b), dim=1)[:, :n], torch.cat((b.T, b.T), dim=1)[:, :k].T):
            close(product(left, right), want, dtype)
    exact = product(a, b, torch.float32)
    assert exact.dtype == torch.float32
    close(exact, want, dtype)
    out = torch.empty(m, n, dtype=dtype)
    assert put_product(out, a, b) is out
    close(out, want, dtype)
    total = torch.ones(m, n)
    add_product(total, a, b)
    close(total - 1, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_a_linear_layer_of_fp32_masters_and_its_gradients(rows, biased, dtype, onednn):
    x = matrix(rows, 400, dtype=dtype).requires_grad_()
    weight = matrix(301, 400).requires_grad_()
    bias = matrix(301).requires_grad_() if biased else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    exact = [t.detach().to(dtype).double().requires_grad_() for t in inputs]
    want = torch.nn.functional.linear(*exact)
    out = linear(x, weight, bias)
    assert out.dtype == dtype
    close(out, want.detach(), dtype)
    with torch.no_grad():
        close(linear(x, weight, bias), want.detach(), dtype)
    upstream = matrix(rows, 301, dtype=dtype)
    got = torch.autograd.grad(out, inputs, upstream)
    assert [g.dtype for g in got] == [t.dtype for t in inputs]
    for g, w in zip(got, torch.autograd.grad(want, exact, upstream.double())):
        close(g, w, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_layer(biased, dtype):
    weight, bias = matrix(301, 400, dtype=dtype), matrix(301, dtype=dtype) if biased else None
    layer = packed(weight)
    assert layer.is_mkldnn or not torch.backends.mkldnn.is_available() or dtype == torch.bfloat16
    for rows in (1, 2, 9, 300):
        x = matrix(rows, 400, dtype=dtype)
        want = torch.nn.functional.linear(*(t if t is None else t.double() for t in (x, weight, bias)))
        for given in (x, x.T.contiguous().T):
            got = linear(given, layer, bias)
            assert got.dtype == dtype
            close(got, want, dtype)


def test_nothing_is_packed_where_there_is_no_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight = matrix(3, 4)
    assert packed(weight) is weight


def test_a_dtype_that_onednn_lacks_is_not_packed():
    weight = matrix(3, 4, dtype=torch.float64)
    assert packed(weight) is weight
