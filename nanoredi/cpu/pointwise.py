"""The pointwise parts of a block: SwiGLU and the rotary embedding; RMSNorm is in norm.py.

Each torch operation is a pass over a tensor and saves another one for backward; C (pointwise.c) makes one pass and
saves only the inputs.
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
    """swiglu's result, recomputed, and its gradients with respect to gate and up."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    outs = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    call_pointwise("swiglu_backward", gate, up, grad, *outs, gate.numel())
    return outs


@rotate.on("cpu")
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if library("pointwise", x.dtype, x.shape[-1] // 2) is None:
        return NotImplemented
    return _Rotate.apply(x, cos, sin)


# The kinds of the arguments of pointwise.c's functions, for native.call.
_ARGUMENTS = {
    "rms_norm": "ttttiif",
    "rms_norm_backward": "ttttttiii",
    "swiglu": "ttti",
    "swiglu_backward": "tttttti",
    "rotate": "ttttiiif",
}


def call_pointwise(name: str, *arguments: Tensor | int | float) -> None:
    """Call a function of pointwise.c on contiguous tensors; the first one's dtype is that of C's type Stored."""
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
