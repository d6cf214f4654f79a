"""The layers' operations, and the matrix products of the loss over the vocabulary.

A weight may be an fp32 master weight: it is cast to the activations' dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.dispatch import operation

# The torch operations by which linear layers are computed.
PRODUCTS = {"aten::mm", "aten::addmm"}


@operation
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids]: (N,) int64 and (V, D) -> (N, D)."""
    return F.embedding(ids, weight)


@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The residual stream s = x + added, and its RMSNorm (arXiv 1910.07467, eq. 4), s / sqrt(mean(s^2) + eps) * weight:
    x (N, D), weight (D,), added (N, D) or None -> (N, D) each."""
    stream = x if added is None else x + added
    return stream, F.rms_norm(stream, x.shape[-1:], weight.to(x.dtype), eps)


@operation
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in) @ weight.T + bias: weight (out, in), bias (out,) -> (N, out), in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@operation
def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The gated MLP (SwiGLU, arXiv 2002.05202, eq. 5) of x (N, D), with weights (F, D), (F, D) and (D, F) -> (N, D)."""
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


@operation
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (N, F) each: the input of mlp's last product. Like the products below, without autograd."""
    return F.silu(gate) * up


@operation
def qkv(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x (N, D), the first two rotated: (N, H, E), (N, K, E), (N, K, E); cos and sin as for
    `rotate`."""
    q, k, v = (linear(x, w, b).unflatten(1, (-1, cos.shape[-1])) for w, b in zip(weights, biases))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


@operation
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (N, H, E) by its angle: (a cos - b sin, b cos + a sin).

    A pair is (x_i, x_{i+E/2}); cos and sin (N, 1, E) are of x's dtype, and the sines of the first halves are negative.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


@operation
def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N), of one dtype, without autograd, like the two below."""
    return a @ b


@operation
def put_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write a (M, K) @ b (K, N), of one dtype, to out (M, N)."""
    return torch.mm(a, b, out=out)


@operation
def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; total is fp32, a and b of any one dtype."""
    total.addmm_(a.to(total.dtype), b.to(total.dtype))


@add_product.on("cuda")
def _add_half_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        return NotImplemented
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
