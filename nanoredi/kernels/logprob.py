"""The log-probabilities of target tokens, differentiable for any upstream gradient, without ever holding
tokens x vocabulary.

It serves losses that are not linear in the log-probabilities, such as DPO's: the weight of a row is only known in
backward, where it is the upstream gradient. From there on the gradient is that of a weighted cross-entropy, so backward
is that one's forward (cross_entropy.py) and recomputes each chunk's logits: four matrix products instead of three.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.kernels.cross_entropy import logps_and_gradients
from nanoredi.kernels.dispatch import operation


@operation
def linear_logprob(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, rows: Tensor | None = None, entropies: Tensor | None = None
) -> Tensor:
    """The log-probability of each row's target under softmax(lm_head @ hidden).

    Under no_grad (a reference model, scoring) it is one matrix product and keeps nothing. The gradient of lm_head is
    accumulated in fp32, as in weighted_cross_entropy.

    Args:
        hidden, lm_head, targets, entropies: as in weighted_cross_entropy.
        rows: (R,) int64, distinct rows to compute; None: all. Targets are read only there.

    Returns:
        logps (N,) fp32, differentiable once in hidden and lm_head; 0 outside `rows`.
    """
    if rows is None:
        rows = torch.arange(len(hidden), device=hidden.device)
    return LinearLogprob.apply(hidden, lm_head, targets, rows, entropies)


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, rows, entropies):
        head = lm_head.to(hidden.dtype)
        ctx.save_for_backward(hidden, head, targets, rows)
        return logps_and_gradients(hidden, head, targets, None, rows, (None, None, entropies))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        shape = ctx.saved_tensors[1].shape
        grad_head = torch.zeros(shape, device=grad_logps.device) if ctx.needs_input_grad[1] else None
        return gradient_of_hidden(ctx, grad_logps, grad_head), grad_head, None, None, None


def gradient_of_hidden(ctx, grad_logps: Tensor, grad_head: Tensor | None) -> Tensor | None:
    """The gradient (N, D) of hidden, or None if not needed; lm_head's is added to grad_head (V, D) fp32, if given."""
    hidden, head, targets, rows = ctx.saved_tensors
    grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
    logps_and_gradients(hidden, head, targets, grad_logps, rows, (grad_hidden, grad_head, None))
    return grad_hidden
