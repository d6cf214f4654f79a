"""RMSNorm (arXiv 1910.07467, eq. 4): y = x * r * weight, r = 1 / sqrt(mean(x^2) + eps).

In torch on a CPU each step of the formula and of its derivative is a pass over all of x. In C there is one pass
(pointwise.c), and the fallback below has few. With D elements a row and upstream gradient g, the derivatives are

    d weight = sum_rows g * x * r            d x = r * (g * weight - x * r^2 * sum_row(g * x * weight) / D)
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.cpu.masters import cast, kept_sum
from nanoredi.cpu.native import library
from nanoredi.cpu.pointwise import call_pointwise
from nanoredi.kernels.layers import rms_norm

# C sums the weight's gradient over this many parts of the rows, so that the order does not depend on the threads.
_PARTS = 8


@rms_norm.on("cpu")
def _(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x if added is None else x + added
    if library("pointwise", x.dtype, x.shape[-1]):
        return x, _InC.apply(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return x, _RMSNorm.apply(x, weight, eps)
    return rms_norm.plain(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        r = (square / x.shape[-1] + eps).rsqrt_()  # (N, 1)
        ctx.save_for_backward(x, weight, r)
        ctx.sum = kept_sum(weight)
        return (x * r).mul_(cast(weight, wide)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        w = weight.to(r.dtype)
        products = grad.to(r.dtype) * x
        grad_weight = None
        if ctx.sum is not None:
            ctx.sum.addmv_(products.T, r.squeeze(1))
        elif ctx.needs_input_grad[1]:
            grad_weight = (r.T @ products).squeeze(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        along = r.pow(3) * (products @ w)[:, None] / -x.shape[-1]
        return (grad * w).mul_(r).addcmul_(x, along).to(x.dtype), grad_weight, None


class _InC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, r = x.contiguous(), x.new_empty(len(x), dtype=torch.float32)
        ctx.save_for_backward(x, weight, r)
        ctx.sum = kept_sum(weight)
        out = torch.empty_like(x)
        call_pointwise("rms_norm", x, cast(weight, r.dtype).contiguous(), out, r, *x.shape, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        grad_x, parts = torch.empty_like(x), r.new_empty(_PARTS, x.shape[1])
        call_pointwise(
            "rms_norm_backward",
            x,
            cast(weight, r.dtype).contiguous(),
            r,
            grad.contiguous(),
            grad_x,
            parts,
            *x.shape,
            _PARTS,
        )
        if ctx.sum is not None:
            ctx.sum.add_(parts.sum(0))
            return grad_x, None, None
        return grad_x, parts.sum(0).to(weight.dtype), None
