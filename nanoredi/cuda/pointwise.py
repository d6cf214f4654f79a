"""What a block computes between its matrix products, on a GPU: Triton kernels with their backwards, which read and
write each tensor once. They compute in fp32 and round where they store.

RMSNorm of the residual stream s = x + added, with r = 1 / sqrt(mean(s^2) + eps), is y = s r w. With the gradients gy of
y and gs of s, which continues past the norm, and since dr/ds_i = -r^3 s_i / D,

    dw = sum_rows gy s r            dx = dadded = gs + r (gy w - s r^2 mean(gy w s))

SwiGLU is y = g p u, where p = sigmoid(g), whose derivative is p (1 - p):

    dg = gy u p (1 + g (1 - p))     du = gy g p

A rotation's backward rotates the gradient by the negative angle.

The gradients of w and of the biases before the rotation are sums over rows. Each program adds up a part of the rows in
fp32, and one more operation adds up the parts, so that the order of the sum is always the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.kernels.dispatch import tl, triton
from nanoredi.kernels.layers import mlp, qkv, rms_norm, swiglu

# Programs that divide the rows among them where they sum over rows; tokens, elements, and parts with as many columns
# that a program loads at once.
_PARTS, _TOKENS, _ELEMENTS, _TILE = 512, 32, 2048, 32


@rms_norm.on("cuda")
def _(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _Norm.apply(x, weight, eps, added)


@mlp.on("cuda")
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _Product.apply(*_MLP.apply(x, gate, up, down), down)


@qkv.on("cuda")
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return _QKV.apply(x, cos, sin, *weights, *biases)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, added):
        x = x.contiguous()
        stream, out = x if added is None else torch.empty_like(x), torch.empty_like(x)
        added = None if added is None else added.contiguous()
        _launch(_norm_kernel, len(x), x, added, weight, stream, out, x.shape[1], eps)
        ctx.save_for_backward(stream, weight)
        ctx.eps, ctx.is_sum = eps, added is not None
        ctx.set_materialize_grads(False)
        return stream, out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_stream, grad):
        stream, weight = ctx.saved_tensors
        if grad is None:
            return grad_stream, None, None, grad_stream if ctx.is_sum else None
        grad_x, num_parts = torch.empty_like(stream), min(len(stream), _PARTS)
        parts = stream.new_empty(num_parts, stream.shape[1], dtype=torch.float32)
        grad_stream = None if grad_stream is None else grad_stream.contiguous()
        given = stream, weight, grad.contiguous(), grad_stream
        _launch(_norm_backward_kernel, num_parts, *given, grad_x, parts, len(stream), stream.shape[1], ctx.eps)
        return grad_x, _sum(parts, weight.dtype), None, grad_x if ctx.is_sum else None


class _MLP(torch.autograd.Function):
    """The MLP but for its last product, and the backward of all of it. Since what backward needs is saved before that
    product, activation checkpointing, which recomputes a block as far as the last saved tensor, need not recompute the
    product. Nor is swiglu(gate, up) saved: backward reads gate and up anyway, and recomputes it."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.dtypes = [w.dtype for w in weights]
        weights = [w.to(x.dtype) for w in weights]
        gate, up = (F.linear(x, w) for w in weights[:2])
        ctx.save_for_backward(x, gate, up, *weights)
        ctx.mark_non_differentiable(gate, up)
        ctx.set_materialize_grads(False)  # gate and up have none
        return x.new_empty(()).expand_as(x), gate, up  # the first is a placeholder for the result in the graph

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, gate, up, *weights = ctx.saved_tensors
        grad_product = grad @ weights[2]
        product, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
        programs = (triton.cdiv(gate.numel(), _ELEMENTS),)
        tensors = gate, up, grad_product, product, grad_gate, grad_up
        _swiglu_backward_kernel[programs](*tensors, gate.numel(), BLOCK=_ELEMENTS)
        grad_x = (grad_gate @ weights[0]).addmm_(grad_up, weights[1])
        made = grad_gate.T @ x, grad_up.T @ x, grad.T @ product
        return grad_x, *(y.to(dtype) for y, dtype in zip(made, ctx.dtypes))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, placeholder, gate, up, down):
        return F.linear(_swiglu(gate, up), down.to(gate.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, *parameters):
        ctx.dtypes = [p.dtype for p in parameters]
        weights, biases = ([p.to(x.dtype) for p in some] for some in (parameters[:3], parameters[3:]))
        q, k, v = (F.linear(x, w, b).unflatten(1, (-1, cos.shape[-1])) for w, b in zip(weights, biases))
        ctx.save_for_backward(x, cos, sin, *weights)
        rotated, _ = _rotate(q, k, None, cos, sin, 1.0)
        return *rotated.split([q.shape[1], k.shape[1]], dim=1), v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        """The weights' three gradients are one product; x's is the sum of three, each added within the next one."""
        x, cos, sin, *weights = ctx.saved_tensors
        rotated, parts = _rotate(grad_q, grad_k, grad_v, cos, sin, -1.0)
        sizes = [len(w) for w in weights]
        grad = rotated.flatten(1)
        grad_q, grad_k, grad_v = grad.split(sizes, dim=1)
        grad_x = (grad_q @ weights[0]).addmm_(grad_k, weights[1]).addmm_(grad_v, weights[2])
        grad_weight, grad_bias = (grad.T @ x).to(ctx.dtypes[0]), _sum(parts, ctx.dtypes[3])
        return grad_x, None, None, *grad_weight.split(sizes), *grad_bias.split(sizes)


def _rotate(
    q: Tensor, k: Tensor, v: Tensor | None, cos: Tensor, sin: Tensor, sign: float
) -> tuple[Tensor, Tensor | None]:
    """The heads of q and k rotated and those of v, if given, as they are, side by side: (N, H + K or H + 2K, E). With v
    also the sums over parts of the rows, (P, (H + 2K) E) fp32."""
    tensors = [None if x is None else x.contiguous() for x in (q, k, v)]
    num_rows, num_heads, size = len(q), sum(x.shape[1] for x in tensors if x is not None), q.shape[2]
    out, blocks = q.new_empty(num_rows, num_heads, size), triton.cdiv(num_rows, _TOKENS)
    num_parts = blocks if v is None else min(blocks, _PARTS // 4)
    parts = None if v is None else out.new_empty(num_parts, num_heads * size, dtype=torch.float32)
    given = *tensors, cos.contiguous(), sin.contiguous(), out, parts
    sizes = num_rows, q.shape[1], k.shape[1], sign, size // 2
    _rotate_kernel[(num_parts, num_heads)](*given, *sizes, TOKENS=_TOKENS)
    return out, parts


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the parts (P, D) fp32, rounded once to a dtype: torch's sum would need one more kernel to round."""
    out = parts.new_empty(parts.shape[1], dtype=dtype)
    _sum_kernel[(triton.cdiv(len(out), _TILE),)](parts, out, *parts.shape, TILE=_TILE)
    return out


def _launch(kernel, programs: int, *args) -> None:
    """Launch a kernel of which each program takes whole rows, as wide as the first argument's."""
    block = triton.next_power_of_2(args[0].shape[1])
    kernel[(programs,)](*args, BLOCK=block, num_warps=min(16, max(4, block // 256)))


@swiglu.on("cuda")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The rows may be strided, as they are where one product has computed both."""
    (num_rows, num_columns), out = gate.shape, gate.new_empty(gate.shape)
    programs = num_rows, triton.cdiv(num_columns, _ELEMENTS)
    _swiglu_kernel[programs](gate, up, out, gate.stride(0), up.stride(0), num_columns, BLOCK=_ELEMENTS)
    return out


@triton.jit
def _norm_kernel(x, added, weight, stream, out, D, eps, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0).to(tl.int64) * D + d, d < D
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        s += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        s = s.to(stream.dtype.element_ty).to(tl.float32)  # as backward will read it
        tl.store(stream + at, s.to(stream.dtype.element_ty), mask=inside)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(s * s, 0) / D + eps)
    tl.store(out + at, (s * r * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(stream, weight, grad, grad_stream, grad_x, parts, N, D, eps, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    part, inside = tl.program_id(0).to(tl.int64), d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(part, N, tl.num_programs(0)):
        at = n * D + d
        s = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(s * s, 0) / D + eps)
        along = tl.sum(g * w * s, 0) / D * r * r
        total += g * s * r
        dx = r * (g * w - s * along)
        if grad_stream is not None:
            dx += tl.load(grad_stream + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + part * D + d, total, mask=inside)


@triton.jit
def _sum_kernel(parts, out, P, D, TILE: tl.constexpr):
    """A program takes TILE columns, and TILE parts at a time."""
    d = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, P, TILE):
        p = start + tl.arange(0, TILE)[:, None]
        total += tl.load(parts + p * D + d, mask=(p < P) & (d < D), other=0.0)
    tl.store(out + d, tl.sum(total, 0)[None, :].to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _swiglu_kernel(gate, up, out, gate_stride, up_stride, num_columns, BLOCK: tl.constexpr):
    n, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + n * gate_stride + f, mask=f < num_columns, other=0.0).to(tl.float32)
    u = tl.load(up + n * up_stride + f, mask=f < num_columns, other=0.0).to(tl.float32)
    product = (g * tl.sigmoid(g) * u).to(out.dtype.element_ty)
    tl.store(out + n * num_columns + f, product, mask=f < num_columns)


@triton.jit
def _swiglu_backward_kernel(gate, up, grad, out, grad_gate, grad_up, number, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < number, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < number, other=0.0).to(tl.float32)
    gy = tl.load(grad + i, mask=i < number, other=0.0).to(tl.float32)
    p = tl.sigmoid(g)
    tl.store(out + i, (g * p * u).to(out.dtype.element_ty), mask=i < number)
    tl.store(grad_gate + i, (gy * u * p * (1.0 + g * (1.0 - p))).to(grad_gate.dtype.element_ty), mask=i < number)
    tl.store(grad_up + i, (gy * g * p).to(grad_up.dtype.element_ty), mask=i < number)


@triton.jit
def _rotate_kernel(q, k, v, cos, sin, out, parts, N, H, K, sign, HALF: tl.constexpr, TOKENS: tl.constexpr):
    """A program takes a part of the tokens, TOKENS at a time, for one head of q, k or v."""
    part, head = tl.program_id(0), tl.program_id(1)
    x, num_heads, own = q, H, head  # the tensor, its number of heads, and the head in it
    if head >= H:
        x, num_heads, own = k, K, head - H
    if v is not None:
        if head >= H + K:
            x, num_heads, own = v, K, head - H - K
    BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    e = tl.arange(0, BLOCK)[None, :]
    firsts = tl.zeros((TOKENS, BLOCK), tl.float32)
    seconds = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(part * TOKENS, N, tl.num_programs(0) * TOKENS):
        n = (start + tl.arange(0, TOKENS))[:, None].to(tl.int64)
        inside = (n < N) & (e < HALF)
        pair = x + (n * num_heads + own) * 2 * HALF + e
        a = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(pair + HALF, mask=inside, other=0.0).to(tl.float32)
        if head < H + K:
            # The second halves' angles are the first ones', their sines without the sign.
            c = tl.load(cos + n * 2 * HALF + HALF + e, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + n * 2 * HALF + HALF + e, mask=inside, other=0.0).to(tl.float32) * sign
            a, b = a * c - b * s, b * c + a * s
        pair = out + (n * tl.num_programs(1) + head) * 2 * HALF + e
        tl.store(pair, a.to(out.dtype.element_ty), mask=inside)
        tl.store(pair + HALF, b.to(out.dtype.element_ty), mask=inside)
        firsts += a
        seconds += b
    if parts is not None:
        e = tl.arange(0, BLOCK)
        pair = parts + (part * tl.num_programs(1) + head) * 2 * HALF + e
        tl.store(pair, tl.sum(firsts, 0), mask=e < HALF)
        tl.store(pair + HALF, tl.sum(seconds, 0), mask=e < HALF)
