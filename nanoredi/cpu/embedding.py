"""Embedding lookup whose gradient is accumulated in place, for master weights (masters.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.cpu.masters import kept_sum
from nanoredi.kernels.layers import embedding


@embedding.on("cpu")
def _(ids: Tensor, weight: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or kept_sum(weight) is None:
        return NotImplemented
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.sum = kept_sum(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        ctx.sum.index_add_(0, *ctx.saved_tensors, grad)
        return None, None
