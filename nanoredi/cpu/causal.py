"""Causal attention for training on a CPU, in C, one sequence at a time. For each query head, with n tokens,

    S = Q K^T / sqrt(E)  (n, n)      P = softmax(S)      O = P V

Only the causal half of S is computed, a block of queries at a time. Forward keeps each row's largest score and the
inverse of its softmax's sum, from which backward recomputes P (FlashAttention, arXiv 2205.14135, appendix B.2):

    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP))      dQ = dS K / sqrt(E)      dK = dS^T Q / sqrt(E)

torch's own kernel calls MKL for many small products. In C sums and softmaxes are fp32. Where a CPU multiplies pairs of
bf16 numbers, P and dS are rounded to bf16 for their products, as in flash attention on a GPU; elsewhere all factors are
fp32. Inputs and outputs have the tensors' dtype.
"""

import torch
from torch import Tensor

from nanoredi.cpu.native import call, library
from nanoredi.model.attention import ATTENTION, PackedAttention, causal_attention


@causal_attention.on("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, sequences: PackedAttention) -> Tensor:
    if library("causal", q.dtype, q.shape[2]) is None:
        return NotImplemented
    return CausalAttention.apply(q, k, v, sequences.lengths)


class CausalAttention(torch.autograd.Function):
    """apply(q (N, H, E), k (N, K, E), v (N, K, E), lengths of the packed sequences) -> (N, H, E)."""

    @staticmethod
    def forward(ctx, q, k, v, lengths):
        out, tops, shares = torch.ops.nanoredi.causal_attention(q, k, v, lengths)
        ctx.save_for_backward(q, k, v, tops, shares)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx, grad):
        tensors = [x.contiguous() for x in (*ctx.saved_tensors, grad)]
        grads = [torch.empty_like(x) for x in tensors[:3]]
        for sequence in zip(*(x.split(ctx.lengths) for x in (*tensors, *grads))):
            _call("attend_backward", *sequence)
        return *grads, None


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The result (N, H, E); per row the largest score times log2(e) and the inverse of its sum, (N, H) fp32 each."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, tops, shares = torch.empty_like(q), torch.empty(q.shape[:2]), torch.empty(q.shape[:2])
    for sequence in zip(*(x.split(lengths) for x in (q, k, v, out, tops, shares))):
        _call("attend", *sequence)
    return out, tops, shares


# Registered as a torch operation, so that activation checkpointing can keep its results.
ATTENTION.add("nanoredi::causal_attention")
_operations = torch.library.Library("nanoredi", "DEF")
_operations.define("causal_attention(Tensor q, Tensor k, Tensor v, int[] lengths) -> (Tensor, Tensor, Tensor)")
_operations.impl("causal_attention", _attend, "CPU")


def _call(name: str, q: Tensor, k: Tensor, *others: Tensor) -> None:
    kinds = "tt" + "t" * len(others) + "iiif"
    c = library("causal", q.dtype, q.shape[2])
    call(c, name, kinds, q, k, *others, *q.shape[:2], k.shape[1], q.shape[2] ** -0.5)
