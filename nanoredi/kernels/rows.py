"""What is done to a chunk of logits, a row at a time: two Triton kernels, the same in C for a CPU (rows.c), and the plain
PyTorch that they must equal.

A row z (V,) has a target y. With o the log-sum-exp of all columns but y, and d = o - z[y],

    logp = z[y] - logsumexp(z) = -softplus(d)          1 - p(y) = sigmoid(d)

Both keep their digits where the model is sure: z[y] - logsumexp(z) and softmax - 1 would cancel to 0 there. The
gradient of w * logp with respect to z is

    w * (onehot(y) - softmax(z))  =  w * (1 - p(y)) in column y,  -w * exp(z_v - logsumexp(z)) in every other column v

The kernels give a row to one program, which reads it once for o (in C twice, the first time for the largest) and, where
the gradient is wanted, once more to overwrite it, all in fp32 with one rounding at the end. Nothing outside the row is
ever read or written, whatever the target says.
"""

import ctypes
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.cpu.native import call, compiled
from nanoredi.kernels.dispatch import runs_triton, tl, triton

_CPU_ELEMENTS = 1 << 20  # logits that a CPU turns at once


def logprobs_(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The targets' log-probabilities; with weights, the logits are overwritten by the gradient.

    Args:
        logits: (C, V) fp32 or bf16. Without weights they are scratch: what they hold afterwards means nothing.
        targets: (C,) int64.
        weights: (C,) fp32, w of each row.

    Returns:
        (C,) fp32 each: logp; and what gradient_ needs, logsumexp(z) and 1 - p(y).
    """
    if runs_c(logits):
        out = logits.new_empty(3, len(logits), dtype=torch.float32)
        _call("logprobs", logits, targets, weights, *out)
        return tuple(out)
    if not runs_triton(logits):
        tensors = (logits, targets) if weights is None else (logits, targets, weights)
        return tuple(map(torch.cat, zip(*(_plain_logprobs_(*part) for part in _few_rows(*tensors)))))
    out = logits.new_empty(3, len(logits), dtype=torch.float32)
    _logprobs_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        targets,
        weights,
        *out,
        logits.shape[1],
        WRITE_GRADIENT=weights is not None,
        BLOCK=_block(logits),
        num_warps=8,
    )
    return tuple(out)


def gradient_(logits: Tensor, targets: Tensor, weights: Tensor, lse: Tensor, missing: Tensor) -> None:
    """Overwrite logits (C, V) by the gradient of the sum of weights * logps; lse and missing are logprobs_'s."""
    if runs_c(logits):
        return _call("gradient", logits, targets, weights, lse, missing)
    if not runs_triton(logits):
        for part in _few_rows(logits, targets, weights, lse, missing):
            _plain_gradient_(*part)
        return
    _gradient_kernel[(len(logits),)](
        logits, logits.stride(0), targets, weights, lse, missing, logits.shape[1], BLOCK=_block(logits), num_warps=8
    )


def runs_c(logits: Tensor) -> bool:
    return logits.is_cpu and logits.dtype in (torch.float32, torch.bfloat16) and _library(logits) is not None


def _library(logits: Tensor) -> ctypes.CDLL | None:
    return compiled("rows", IN_BF16=int(logits.dtype == torch.bfloat16))


def _call(name: str, logits: Tensor, *others: Tensor | None) -> None:
    others = [None if x is None else x.contiguous() for x in others]
    kinds = "ti" + "t" * len(others) + "ii"
    call(_library(logits), name, kinds, logits, logits.stride(0), *others, *logits.shape)


def _few_rows(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of the rows of all tensors, that stay in a CPU's cache with what is made of them; elsewhere all at once."""
    num_rows = max(1, _CPU_ELEMENTS // logits.shape[1]) if logits.is_cpu else len(logits)
    return zip(*(x.split(num_rows) for x in (logits, *others)))


def _plain_logprobs_(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    y = targets.unsqueeze(1)
    z = logits.float()  # itself where it is fp32
    target = z.gather(1, y)
    z.scatter_(1, y, float("-inf"))
    largest = z.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)  # finite where V is 1, too
    gap = largest + z.sub_(largest).exp_().sum(1, keepdim=True).log_() - target
    logp, missing = -F.softplus(gap), torch.sigmoid(gap)
    lse = target - logp
    if weights is not None:
        w = weights.unsqueeze(1)
        z.mul_(-w * torch.exp(largest - lse)).scatter_(1, y, w * missing)
        if z is not logits:
            logits.copy_(z)
    return logp.squeeze(1), lse.squeeze(1), missing.squeeze(1)


def _plain_gradient_(logits: Tensor, targets: Tensor, weights: Tensor, lse: Tensor, missing: Tensor) -> None:
    w = weights.unsqueeze(1)
    z = logits.float().sub_(lse.unsqueeze(1)).exp_().mul_(-w)
    z.scatter_(1, targets.unsqueeze(1), w * missing.unsqueeze(1))
    if z is not logits:
        logits.copy_(z)


def _block(logits: Tensor) -> int:
    """Columns that a program holds at once."""
    return min(8192, triton.next_power_of_2(logits.shape[1]))


if triton is not None:

    @triton.jit
    def _logprobs_kernel(
        logits, stride, targets, weights, logps, lses, missings, V, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
    ):
        c = tl.program_id(0).to(tl.int64)
        row = logits + c * stride
        y = tl.load(targets + c)
        target = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)

        # Each lane keeps the largest logit it has met and the sum of exp(z - largest) over its columns. Of the two
        # terms, the old sum and the new 1, only one is to be scaled: one exponential a column.
        largest = tl.full((BLOCK,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
            z = tl.where(v == y, float("-inf"), z)
            scale = tl.exp(-tl.abs(z - largest))
            total = tl.where(z > largest, total * scale + 1.0, total + scale)
            largest = tl.maximum(largest, z)
        top = tl.max(largest, 0)
        gap = top + tl.log(tl.sum(total * tl.exp(largest - top), 0)) - target

        tail = tl.exp(-tl.abs(gap))
        missing = tl.where(gap > 0, 1.0, tail) / (1.0 + tail)  # sigmoid(gap)
        logp = -tl.maximum(gap, 0.0) - _log1p(tail)  # -softplus(gap)
        lse = target - logp
        tl.store(logps + c, logp)
        tl.store(lses + c, lse)
        tl.store(missings + c, missing)
        if WRITE_GRADIENT:
            _write_gradient(row, y, tl.load(weights + c), lse, missing, V, BLOCK)

    @triton.jit
    def _gradient_kernel(logits, stride, targets, weights, lses, missings, V, BLOCK: tl.constexpr):
        c = tl.program_id(0).to(tl.int64)
        y, w = tl.load(targets + c), tl.load(weights + c)
        _write_gradient(logits + c * stride, y, w, tl.load(lses + c), tl.load(missings + c), V, BLOCK)

    @triton.jit
    def _write_gradient(row, y, w, lse, missing, V, BLOCK: tl.constexpr):
        """Overwrite a row of logits by w * (onehot(y) - softmax)."""
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
            gradient = tl.where(v == y, w * missing, -w * tl.exp(z - lse))
            tl.store(row + v, gradient.to(row.dtype.element_ty), mask=v < V)

    @triton.jit
    def _log1p(t):
        """log(1 + t) for t in 0..1, to fp32's last digits: 2 artanh(s) with s = t / (2 + t) <= 1/3, by its series."""
        s = t / (2.0 + t)
        q = s * s
        series = 1.0 / 13 + q * (1.0 / 15)
        series = 1.0 / 9 + q * (1.0 / 11 + q * series)
        series = 1.0 / 5 + q * (1.0 / 7 + q * series)
        return 2.0 * s * (1.0 + q * (1.0 / 3 + q * series))
