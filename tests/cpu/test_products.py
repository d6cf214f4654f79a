"""Matrix products and linear layers against float64, whichever library computes them."""

import pytest
import torch
from conftest import skip_without_gcc
from torch.utils._python_dispatch import TorchDispatchMode

from nanoredi.cpu import native, products
from nanoredi.cpu.products import multiply, packed
from nanoredi.kernels.layers import PRODUCTS, add_product, linear, mlp, product, put_product
from nanoredi.model.recompute import recomputed

# A small shape; one large enough for oneDNN; one row more than the rows that are computed at a time; and for
# products.c several blocks of panels, an inner dimension in parts, and incomplete tiles.
SHAPES = [(3, 5, 7), (300, 400, 300), (2050, 8, 2060), (41, 4099, 1100), (9, 4100, 50), (1, 2, 1)]


def close(got, want, dtype):
    error = (got.double() - want).norm() / want.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6), error


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=["torch", "onednn", "c"])
def library(request, monkeypatch):
    """oneDNN without and with AVX-512, if torch has oneDNN; and products.c, where it can run."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(products, "_HAS_AVX512", request.param == "onednn")
    if request.param == "c":
        request.getfixturevalue("in_c")
    else:
        monkeypatch.setattr(native, "HAS_PAIRS", False)


@pytest.fixture
def in_c(monkeypatch):
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU multiplies no pairs of bf16 numbers")
    monkeypatch.setattr(native, "HAS_PAIRS", True)
    if native.library("products", torch.bfloat16) is None:
        skip_without_gcc("products.c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64(shape, dtype, library):
    m, k, n = shape
    a, b = matrix(m, k, dtype=dtype), matrix(k, n, dtype=dtype)
    want = a.double() @ b.double()
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T, torch.cat((b, b), dim=1)[:, :n], torch.cat((b.T, b.T), dim=1)[:, :k].T):
            close(product(left, right), want, dtype)
    exact = multiply(a, b, torch.float32)
    assert exact.dtype == torch.float32
    close(exact, want, dtype)
    out = torch.empty(m, n, dtype=dtype)
    assert put_product(out, a, b) is out
    close(out, want, dtype)
    total = torch.ones(m, n)
    add_product(total, a, b)
    close(total - 1, want, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_c_sums_are_fp32_and_nothing_else_is_written(shape, in_c):
    m, k, n = shape
    a, b = matrix(m, k, dtype=torch.bfloat16), matrix(k, n, dtype=torch.bfloat16)
    want = a.double() @ b.double()
    around = torch.ones(m + 2, n)
    for left in (a, a.T.contiguous().T):
        close(multiply(left, b, torch.float32), want, torch.float32)
        add_product(around[1:-1], left, b)
    close(around[1:-1] - 1, 2 * want, torch.float32)
    assert around[0].eq(1).all() and around[-1].eq(1).all()
    turned = torch.ones(n, m).T
    add_product(turned, a, b)
    close(turned - 1, want, torch.float32)
    assert multiply(a, b, torch.float64).dtype == torch.float64
    around = torch.ones(m + 2, n + 8, dtype=torch.bfloat16)
    put_product(around[1:-1, 4:-4], a, b)
    assert around[0].eq(1).all() and around[-1].eq(1).all() and around[:, :4].eq(1).all() and around[:, -4:].eq(1).all()


def test_in_c_nan_stays_in_its_row(in_c):
    a, b = matrix(20, 34, dtype=torch.bfloat16), matrix(34, 60, dtype=torch.bfloat16)
    a[7, 3] = torch.nan
    for left in (a, a.T.contiguous().T):
        lost = product(left, b).isnan()
        assert lost[7].all() and not lost[:7].any() and not lost[8:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_a_linear_layer_of_fp32_masters_and_its_gradients(rows, biased, dtype, library):
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


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size", [48, 20])
@pytest.mark.parametrize("master", [True, False])
def test_an_mlp_and_its_gradients(master, size, dtype, bound, library):
    """With an inner size of 20 by torch's operations, of 48 in C, where there is a compiler."""
    x = matrix(30, size, dtype=dtype).mul_(4)
    x[3] = 0
    x[4, :8] = torch.tensor([100.0, -100, 88, -88, 1e4, -1e4, 30, -30])
    of_weights = torch.float32 if master and dtype == torch.bfloat16 else dtype
    gate = torch.eye(size, dtype=of_weights)  # so that the gate's outputs are x
    up, down = (matrix(rows, size, dtype=of_weights) for rows in (size, 7))
    inputs = [t.requires_grad_() for t in (x, gate, up, down)]
    exact = [t.detach().to(dtype).double().requires_grad_() for t in inputs]
    want = (torch.nn.functional.silu(exact[0] @ exact[1].T) * (exact[0] @ exact[2].T)) @ exact[3].T
    out, upstream = mlp(*inputs), matrix(30, 7, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(mlp(*inputs), out)
    got = torch.autograd.grad(out, inputs, upstream)
    for a, b in zip((out, *got), (want, *torch.autograd.grad(want, exact, upstream.double()))):
        assert ((a.double() - b).norm() / b.norm()).item() < bound
    frozen = mlp(x, gate, up, down.detach())
    assert torch.equal(torch.autograd.grad(frozen, x, upstream)[0], got[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_layer(biased, dtype):
    weight, bias = matrix(301, 400, dtype=dtype), matrix(301, dtype=dtype) if biased else None
    layer = packed(weight, True)
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
    assert not packed(weight, True).is_mkldnn


def test_a_dtype_that_onednn_lacks_is_not_packed():
    weight = matrix(3, 4, dtype=torch.float64)
    assert torch.equal(packed(weight, True), weight)


def test_a_weight_of_no_product_is_copied_and_not_packed():
    weight = matrix(3, 4)
    copy = packed(weight, False)
    assert torch.equal(copy, weight) and copy.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_s_last_product_is_not_recomputed(dtype):
    if native.library("pointwise", dtype, 48) is None:
        skip_without_gcc("pointwise.c")

    class Products(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.number += op.name() in PRODUCTS
            return op(*args, **(kwargs or {}))

    def number(layer):
        inputs = [matrix(*shape, dtype=dtype).requires_grad_() for shape in ((30, 48), (48, 48), (48, 48), (7, 48))]
        with Products() as seen:
            layer(*inputs).sum().backward()
        return seen.number

    assert number(lambda *inputs: recomputed(mlp, (), *inputs)) == number(mlp) + 2 > 2
