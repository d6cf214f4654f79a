"""What a block does between its products: the MLP's gate and the rotation by position; norm.py has RMSNorm.

On a GPU, and on a CPU without a C compiler, they are written out in torch's operations. Each of these goes over a whole
tensor, and leaves autograd another one; in C (pointwise.c) there is one pass, and only what went in is kept.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.cpu.native import call, compiled

_SIZE = 16  # what the last dimension, or half of it, is a multiple of for C


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202, eq. 5): (N, F) each, of one dtype -> (N, F). In C without a gradient, which
    products.gated_linear has."""
    if not runs_pointwise(gate):
        return F.silu(gate) * up
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    call_pointwise("swiglu", gate.contiguous(), up.contiguous(), out, gate.numel())
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In C: swiglu's result once more, and its gradients in gate and up."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    outs = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    call_pointwise("swiglu_backward", gate, up, grad, *outs, gate.numel())
    return outs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (N, H, E) by its angle: (a cos - b sin, b cos + a sin).

    A pair is (x_i, x_{i+E/2}); cos and sin (N, 1, E) are of x's dtype, and the sines of the first halves are negative.
    """
    if runs_pointwise(x, x.shape[-1] // 2):
        return _Rotate.apply(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def runs_pointwise(x: Tensor, size: int | None = None) -> bool:
    """Whether there is C for tensors like x, whose rows are worked on in parts of `size`."""
    fits = x.is_cpu and (size or x.shape[-1]) % _SIZE == 0 and x.dtype in (torch.float32, torch.bfloat16)
    return fits and _library(x) is not None


# What the functions of pointwise.c take, for native.call.
_ARGUMENTS = {
    "rms_norm": "ttttiif",
    "rms_norm_backward": "ttttttiii",
    "swiglu": "ttti",
    "swiglu_backward": "tttttti",
    "rotate": "ttttiiif",
    "update_square": "ttttiiffff",
}


def call_pointwise(name: str, *arguments: Tensor | int | float) -> None:
    """A function of pointwise.c, on contiguous tensors. The first one's dtype is that of all that C does not call float."""
    call(_library(arguments[0]), name, _ARGUMENTS[name], *arguments)


def _library(x: Tensor) -> ctypes.CDLL | None:
    return compiled("pointwise", SIZE=_SIZE, IN_BF16=int(x.dtype == torch.bfloat16))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _rotated(grad, *ctx.saved_tensors, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    call_pointwise("rotate", x, cos.contiguous(), sin.contiguous(), out, *x.shape, sign)
    return out
