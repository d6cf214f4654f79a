"""The vocabulary's losses for a master weight (masters.py): lm_head's gradient is added to its `grad` at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.cpu.masters import cast, kept_sum
from nanoredi.kernels import cross_entropy, logprob
from nanoredi.kernels.cross_entropy import weighted_cross_entropy
from nanoredi.kernels.logprob import linear_logprob


@weighted_cross_entropy.on("cpu")
def _(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor,
    rows: Tensor | None = None,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward already adds to lm_head's gradient, so the loss's own must be 1, or backward raises a RuntimeError."""
    if kept_sum(lm_head) is None:
        return NotImplemented
    rows = weights.nonzero().squeeze(1) if rows is None else rows
    return _CrossEntropy.apply(hidden, lm_head, targets, weights, rows, entropies, torch.is_grad_enabled())


@linear_logprob.on("cpu")
def _(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, rows: Tensor | None = None, entropies: Tensor | None = None
) -> Tensor:
    if kept_sum(lm_head) is None:
        return NotImplemented
    rows = torch.arange(len(hidden)) if rows is None else rows
    return _Logprob.apply(hidden, lm_head, targets, rows, entropies)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, weights, rows, entropies, grad_enabled):
        ctx.grad_hidden = torch.zeros_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        total = kept_sum(lm_head) if grad_enabled and ctx.needs_input_grad[1] else None
        head = cast(lm_head, hidden.dtype)
        outputs = ctx.grad_hidden, total, entropies
        logps = cross_entropy.logps_and_gradients(hidden, head, targets, weights, rows, outputs)
        ctx.mark_non_differentiable(logps)
        return (weights * logps).sum(), logps

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss != 1:
            raise RuntimeError("lm_head's gradient has been added already, so the loss's own gradient must be 1")
        grad_hidden, ctx.grad_hidden = ctx.grad_hidden, None
        return grad_hidden, None, None, None, None, None, None


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, rows, entropies):
        ctx.sum = kept_sum(lm_head)
        return logprob.LinearLogprob.forward(ctx, hidden, cast(lm_head, hidden.dtype), targets, rows, entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        return logprob.gradient_of_hidden(ctx, grad_logps, ctx.sum), None, None, None, None
