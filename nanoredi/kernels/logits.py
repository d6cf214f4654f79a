"""Logits a chunk of rows at a time, and the log-probabilities, entropies and gradients of a chunk, in plain PyTorch and
in a Triton kernel.

A row z (V,) has a target y. With o the log-sum-exp of all columns but y, and d = o - z[y],

    logp = z[y] - logsumexp(z) = -softplus(d)          1 - p(y) = sigmoid(d)

Both stay accurate where the model is sure: there z[y] - logsumexp(z) and softmax - 1 would cancel to 0. The gradient of
w * logp with respect to z is

    w * (onehot(y) - softmax(z))  =  w * (1 - p(y)) in column y,  -w * exp(z_v - logsumexp(z)) in every other column v

The entropy of softmax(z) comes from the same pass. With H' that of the softmax of all columns but y, it is

    -p log p - (1-p) log(1-p) + (1-p) H'  =  softplus(-|d|) + |d| sigmoid(-|d|) + (1-p) H'          p = p(y)

In the kernel one program handles one row: it reads the row once for o and H' and, if the gradient is wanted, once more
to overwrite it, all in fp32 with one rounding at the end. A target outside the vocabulary makes the result NaN; nothing
outside the row is ever read or written.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.dispatch import operation, tl, triton
from nanoredi.kernels.layers import put_product

# A chunk's logits have at most this many elements, whatever the vocabulary. Smaller chunks read and write the gradient
# of lm_head more often and make smaller matrix products; bench/kernels.py --chunks measures it.
MAX_CPU_ELEMENTS = 1 << 24  # 64 MiB in fp32
MAX_GPU_ELEMENTS = 192 << 20  # 384 MiB in bf16


def logits_by_chunks(hidden: Tensor, lm_head: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (chunk of rows (C,), their hidden states (C, D), their logits (C, V)); all logits share one buffer."""
    if not len(rows):
        return
    num_rows = (MAX_GPU_ELEMENTS if hidden.is_cuda else MAX_CPU_ELEMENTS) // lm_head.shape[0]
    chunks = rows.tensor_split(-(-len(rows) // max(1, num_rows)))  # of even sizes, the first the largest
    buffer = hidden.new_empty(len(chunks[0]), lm_head.shape[0])
    for chunk in chunks:
        x = hidden[chunk]
        yield chunk, x, put_product(buffer[: len(chunk)], x, lm_head.T)


@operation
def logprobs_(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The targets' log-probabilities and the entropies; with weights, the logits are overwritten by the gradient.

    Args:
        logits: (C, V) fp32 or bf16. Without weights, too, their contents are undefined afterwards.
        targets: (C,) int64.
        weights: (C,) fp32, w of each row.

    Returns:
        (C,) fp32 each: logp, and the entropy of softmax(z).
    """
    z, y = logits.float(), targets[:, None]
    target, others = z.gather(1, y).squeeze(1), z.scatter(1, y, float("-inf"))
    gap = others.logsumexp(1) - target
    logp, one_minus_p, far = -F.softplus(gap), gap.sigmoid(), -gap.abs()
    shares = others.softmax(1)
    of_others = torch.special.entr(shares, out=shares).sum(1)
    entropy = F.softplus(far) - far * far.sigmoid() + one_minus_p * of_others
    if weights is not None:
        gradient = (z - (target - logp)[:, None]).exp() * -weights[:, None]
        logits.copy_(gradient.scatter(1, y, (weights * one_minus_p)[:, None]))
    return logp, entropy


if triton is not None:

    @logprobs_.on("cuda")
    def _launch_logprobs(logits, targets, weights=None):
        logps, entropies = logits.new_empty(2, len(logits), dtype=torch.float32)
        block = min(4096, triton.next_power_of_2(logits.shape[1]))  # columns that a program holds at once
        row = logits, logits.stride(0), targets, weights, logps, entropies, logits.shape[1]
        _logprobs_kernel[(len(logits),)](*row, WRITE_GRADIENT=weights is not None, BLOCK=block, num_warps=8)
        return logps, entropies

    @triton.jit
    def _logprobs_kernel(
        logits, stride, targets, weights, logps, entropies, V, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
    ):
        c = tl.program_id(0).to(tl.int64)
        row = logits + c * stride
        y = tl.load(targets + c)
        target = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)

        # Each lane keeps the largest logit so far and, over its columns, the sums of exp(z - largest) and of
        # (z - largest) exp(z - largest). Either the old sum or the new term has to be rescaled, never both: one
        # exponential a column. The target and columns beyond V count as -1e30, not -inf, since 0 * -inf is NaN.
        largest = tl.full((BLOCK,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row + v, mask=v < V, other=-1.0e30).to(tl.float32)
            z = tl.where(v == y, -1.0e30, z)
            above = z - largest
            scale = tl.exp(-tl.abs(above))
            moment = tl.where(above > 0, (moment - total * above) * scale, moment + above * scale)
            total = tl.where(above > 0, total * scale + 1.0, total + scale)
            largest = tl.maximum(largest, z)
        top = tl.max(largest, 0)
        above = largest - top
        scale = tl.exp(above)
        mean = tl.sum((moment + total * above) * scale, 0)
        total_of_others = tl.sum(total * scale, 0)
        gap = top + tl.log(total_of_others) - target

        tail = tl.exp(-tl.abs(gap))
        one_minus_p = tl.where(gap > 0, 1.0, tail) / (1.0 + tail)  # sigmoid(gap)
        logp = -tl.maximum(gap, 0.0) - _log1p(tail)  # -softplus(gap)
        small = tail / (1.0 + tail)  # the smaller one of p and 1 - p
        of_others = tl.log(total_of_others) - mean / total_of_others
        tl.store(logps + c, logp)
        tl.store(entropies + c, _log1p(tail) + tl.abs(gap) * small + one_minus_p * of_others)
        if WRITE_GRADIENT:
            w, lse = tl.load(weights + c), target - logp
            for start in range(0, V, BLOCK):
                v = start + tl.arange(0, BLOCK)
                z = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
                gradient = tl.where(v == y, w * one_minus_p, -w * tl.exp(z - lse))
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
