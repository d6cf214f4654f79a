"""The log-probabilities of target tokens, differentiable for any upstream gradient, without ever holding
tokens x vocabulary.

It is for losses that are not linear in the log-probabilities, such as DPO's: what a row's weight will be is known only
in backward. So forward keeps two numbers a row, and backward makes each chunk's logits once more:

    logp_t = z_t[y_t] - logsumexp(z_t)      d logp_t / d z_t = onehot(y_t) - softmax(z_t)      z_t = lm_head @ hidden_t

Four matrix products instead of the weighted cross-entropy's three.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoredi.kernels.dispatch import operation
from nanoredi.kernels.layers import add_product, product
from nanoredi.kernels.logits import gradient_, logits_by_chunks, logprobs_


@operation
def linear_logprob(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, rows: Tensor | None = None, entropies: Tensor | None = None
) -> Tensor:
    """The log-probability of each row's target under softmax(lm_head @ hidden).

    Under no_grad (a reference model, scoring) it is one matrix product and keeps nothing. The gradient of lm_head adds
    up in fp32, as weighted_cross_entropy's does.

    Args:
        hidden: (N, D) final hidden states, fp32 or bf16.
        lm_head: (V, D) output embedding, of hidden's dtype or an fp32 master that is cast to it.
        targets: (N,) int64 in 0..V-1; read only in `rows`.
        rows: (R,) int64, the rows that are wanted, each once; None: all.
        entropies: (N,) fp32, where the entropies of the wanted rows' softmax are written, if given.

    Returns:
        logps (N,) fp32, differentiable once in hidden and lm_head; 0 where a row is not wanted.
    """
    if rows is None:
        rows = torch.arange(len(hidden), device=hidden.device)
    return LinearLogprob.apply(hidden, lm_head, targets, rows, entropies)


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, rows, entropies):
        # Three tensors and no views of one: FSDP2 hangs its hook on what leaves the model, and a view may lose it.
        logps, lse, one_minus_p = (torch.zeros(len(hidden), device=hidden.device) for _ in range(3))
        head = lm_head.to(hidden.dtype)
        for chunk, _, logits in logits_by_chunks(hidden, head, rows):
            logps[chunk], entropy, lse[chunk], one_minus_p[chunk] = logprobs_(logits, targets[chunk])
            if entropies is not None:
                entropies[chunk] = entropy
        ctx.save_for_backward(hidden, head, targets, rows, lse, one_minus_p)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        grad_head = (
            torch.zeros(ctx.saved_tensors[1].shape, device=grad_logps.device) if ctx.needs_input_grad[1] else None
        )
        return gradient_of_hidden(ctx, grad_logps, grad_head), grad_head, None, None, None


def gradient_of_hidden(ctx, grad_logps: Tensor, grad_head: Tensor | None) -> Tensor | None:
    """(N, D), if it is wanted; the gradient of lm_head is added to grad_head (V, D) fp32, if that is."""
    hidden, head, targets, rows, lse, one_minus_p = ctx.saved_tensors
    grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
    for chunk, x, logits in logits_by_chunks(hidden, head, rows):
        gradient_(logits, targets[chunk], grad_logps[chunk], lse[chunk], one_minus_p[chunk])
        if grad_hidden is not None:
            grad_hidden[chunk] = product(logits, head)
        if grad_head is not None:
            add_product(grad_head, logits.T, x)
    return grad_hidden
