"""What a block does between its products: the MLP's gate and the rotation by position; norm.py has RMSNorm.

Each of torch's operations goes over a whole tensor, and leaves autograd another one; in C (pointwise.c) there is one pass,
and only what went in is kept.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.cpu.native import call, library
from nanoredi.kernels import layers
from nanoredi.kernels.layers import rotate


@layers.swiglu.on("cpu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if library("pointwise", gate.dtype, gate.shape[1]) is None:
        return NotImplemented
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    call_pointwise("swiglu", gate.contiguous(), up.contiguous(), out, gate.numel())
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """swiglu's result once more, and its gradients in gate and up."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    outs = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    call_pointwise("swiglu_backward", gate, up, grad, *outs, gate.numel())
    return outs


@rotate.on("cpu")
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if library("pointwise", x.dtype, x.shape[-1] // 2) is None:
        return NotImplemented
    return _Rotate.apply(x, cos, sin)


# What the functions of pointwise.c take, for native.call.
_ARGUMENTS = {
    "rms_norm": "ttttiif",
    "rms_norm_backward": "ttttttiii",
    "swiglu": "ttti",
    "swiglu_backward": "tttttti",
    "rotate": "ttttiiif",
}


def call_pointwise(name: str, *arguments: Tensor | int | float) -> None:
    """A function of pointwise.c, on contiguous tensors. The first one's dtype is that of all that C does not call float."""
    call(library("pointwise", arguments[0].dtype, 16), name, _ARGUMENTS[name], *arguments)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    call_pointwise("rotate", x, cos.contiguous(), sin.contiguous(), out, *x.shape, sign)
    return out
