"""The rows of an embedding, whose gradient adds up in place where the embedding is a master (masters.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.cpu.masters import kept_sum


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids]: (N,) int64 and (V, D) -> (N, D)."""
    if torch.is_grad_enabled() and kept_sum(weight) is not None:
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)


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
