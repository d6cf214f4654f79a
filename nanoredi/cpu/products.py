"""Matrix products and linear layers, by the fastest available code.

For fp32 products torch uses MKL, which does not use AVX-512 on AMD's processors; oneDNN does, and is faster for large
products. It compiles a kernel for each new size, which takes up to a millisecond and half a megabyte, so small products
stay with MKL.

In bf16 torch uses oneDNN. On a CPU with AVX512-BF16 but no AMX products.c is faster, and adds to an fp32 sum in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.cpu.masters import cast, kept_sum
from nanoredi.cpu.native import call, library
from nanoredi.cpu.pointwise import swiglu, swiglu_backward
from nanoredi.kernels.dispatch import prepare_for_sampling
from nanoredi.kernels.layers import PRODUCTS, add_product, linear, mlp, product, put_product

# Multiply-adds of a product from which compiling a kernel pays.
_LARGE = 1 << 25
# Elements of a temporary product. Larger ones are made in pieces: glibc gets over 32 MB from the system anew each time.
_PIECE = 1 << 22


@product.on("cpu")
def multiply(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a (M, K) @ b (K, N), of one dtype.

    Args:
        dtype: of the result (M, N), if another one: fp32, to be added to a sum.
    """
    if _prefers_c(a):
        made = torch.float32 if dtype not in (None, a.dtype) else a.dtype
        return _c(a.new_empty(a.shape[0], b.shape[1], dtype=made), a, b).to(dtype or a.dtype)
    if a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE and _prefers_onednn(a):
        return _onednn(a, b.T)
    return (a @ b).to(dtype or a.dtype)


@put_product.on("cpu")
def _(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if _prefers_c(a):
        return _c(out, a, b)
    if not _prefers_onednn(a):
        return NotImplemented
    columns = max(1, _PIECE // len(out))
    for part, factor in zip(out.split(columns, dim=1), b.split(columns, dim=1)):
        part.copy_(multiply(a, factor))
    return out


@add_product.on("cpu")
def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    if _prefers_c(a):
        _c(total, a, b, add=True)
        return
    rows = max(1, _PIECE // total.shape[1])
    for part, factor in zip(total.split(rows), a.split(rows)):
        part += multiply(factor, b, total.dtype)


@linear.on("cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weight may also be one from prepare_for_sampling; then there are no gradients."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _linear(x, _for_product(weight, x), None if bias is None else cast(bias, x.dtype))


@mlp.on("cpu")
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """With C, backward recomputes silu(gate) * up, which is faster than keeping both factors and the product."""
    if library("pointwise", x.dtype, len(up)) is None:
        return NotImplemented
    return gated_linear(linear(x, gate), linear(x, up), down)


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or weight.is_mkldnn:
        return linear(swiglu(gate, up), weight)
    return _Made.apply(_GatedLinear.apply(gate, up, weight), gate, up, weight)


@prepare_for_sampling.on("cpu")
def packed(weight: Tensor, for_linear: bool) -> Tensor:
    """A linear layer's weight (out, in) in oneDNN's layout: the products of a decode step's few rows take 0.4 to 0.9 of
    the time. Otherwise, and for other weights, a copy: one weight left memory-mapped would keep the whole file in
    memory."""
    in_bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if for_linear and torch.backends.mkldnn.is_available() and (weight.dtype == torch.float32 or in_bf16):
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return weight.detach().clone()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _prefers_c(x):
        return torch.ops.nanoredi.linear(x, weight, bias)
    if x.numel() * len(weight) >= _LARGE and _prefers_onednn(x):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.sum = kept_sum(weight)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        weight, bias = _for_product(weight, x), None if bias is None else cast(bias, x.dtype)
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad_x = multiply(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(ctx.sum, weight_dtype, grad, x) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0, dtype=bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class _GatedLinear(torch.autograd.Function):
    """Only the gradients; _Made computes the product afterwards. As the tensors are saved before it, activation
    checkpointing, which reruns a block up to the last saved tensor, need not recompute a block's last product."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.sum, ctx.dtype = kept_sum(weight), weight.dtype
        ctx.save_for_backward(gate, up, _for_product(weight, gate))
        return gate.new_zeros(()).expand(len(gate), len(weight))  # a placeholder for the result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        x, *grads = swiglu_backward(gate, up, multiply(grad, weight))
        return *grads, weight_gradient(ctx.sum, ctx.dtype, grad, x) if ctx.needs_input_grad[2] else None


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx, placeholder, gate, up, weight):
        return _linear(swiglu(gate, up), _for_product(weight, gate), None)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def _for_product(weight: Tensor, x: Tensor) -> Tensor:
    """A layer's weight as its products with x (or gradients like x) read it: C reads an fp32 master weight directly."""
    return weight.detach() if _prefers_c(x) and weight.dtype == torch.float32 else cast(weight, x.dtype)


def weight_gradient(total: Tensor | None, dtype: torch.dtype, grad: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of a linear layer's weight, from inputs x (N, in) and gradients (N, out): added to the total, or
    returned in this dtype."""
    if total is None:
        return multiply(grad.T, x, dtype)
    _add(total, grad.T, x)
    return None


def _prefers_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and _HAS_AVX512


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # rows with gaps take oneDNN a hundred times as long
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _prefers_c(x: Tensor) -> bool:
    return library("products", x.dtype) is not None and x.numel() > 0


def _c(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b + bias in bf16 (an fp32 b is rounded), written to out (M, N) of bf16 or fp32, or added to an fp32 out."""
    if out.stride(1) != 1:  # C writes along rows
        made = _c(out.new_empty(out.shape), a, b, bias)
        return out.add_(made) if add else out.copy_(made)
    a, a_step, a_along = _readable(a)
    b, b_step, b_along = _readable(b.T)
    bias = None if bias is None else bias.contiguous()
    left = a, a_step, a_along
    right = b, b.dtype == torch.float32, b_step, b_along
    result = bias, out, out.stride(0), out.dtype == torch.float32, add
    kinds = "tii" + "tiii" + "ttiii" + "iii"
    call(library("products", a.dtype), "product", kinds, *left, *right, *result, *out.shape, a.shape[1])
    return out


def _readable(x: Tensor) -> tuple[Tensor, int, int]:
    """A left factor, or a transposed right one, (outer, inner), as products.c can read it; the stride of its rows, or
    else of its columns; whether the inner dimension is contiguous."""
    if x.stride(1) == 1 and x.shape[1] % 2 == 0:
        return x, x.stride(0), 1
    if x.stride(0) != 1:
        x = x.T.contiguous().T
    return x, x.stride(1), 0


def _linear_c(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _c(x.new_empty(len(x), len(weight)), x, weight.T, bias)


# Registered as a torch operation, so that activation checkpointing can keep its result.
PRODUCTS |= {"mkldnn::_linear_pointwise", "nanoredi::linear"}
_operations = torch.library.Library("nanoredi", "FRAGMENT")
_operations.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_operations.impl("linear", _linear_c, "CPU")

_HAS_AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
