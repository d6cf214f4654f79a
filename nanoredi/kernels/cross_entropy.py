"""The loss of SFT and REDI, and its gradients, without ever holding tokens x vocabulary.

Both losses are linear in the log-probabilities of the target tokens:

    loss = sum_t w_t * logp_t        logp_t = z_t[y_t] - logsumexp(z_t)        z_t = lm_head @ hidden_t

All w_t are known before the forward pass (objectives.py), so the gradient of a row of logits is known as soon as the
row is. Forward goes over chunks of rows: it computes a chunk's logits, overwrites them with their gradient (logits.py),
multiplies that into the gradients of hidden and lm_head, and reuses the memory for the next chunk. Backward only
returns the two finished gradients.
"""

import torch
from torch import Tensor

from nanoredi.kernels.dispatch import operation
from nanoredi.kernels.layers import add_product, product
from nanoredi.kernels.logits import logits_by_chunks, logprobs_

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None]


@operation
def weighted_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor,
    rows: Tensor | None = None,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the targets' log-probabilities, and these log-probabilities.

    The gradient of lm_head is accumulated in fp32, whatever the weight's dtype. Backward returns it in fp32, so a bf16
    lm_head whose grad_dtype is float32 (distributed.shard sets it) gets it unrounded; otherwise it is rounded once. For
    a frozen lm_head it is not computed.

    Args:
        hidden: (N, D) final hidden states, fp32 or bf16.
        lm_head: (V, D) output embedding, of hidden's dtype or an fp32 master weight that is cast to it.
        targets: (N,) int64 in 0..V-1, the token each row must predict; read only where the weight is not 0.
        weights: (N,) fp32, of any sign; a row of weight 0 costs nothing.
        rows: (R,) int64, the indices of the rows whose weight is not 0. The batch has them from the CPU; without them
            the host waits for the device to find them.
        entropies: (N,) fp32, if given, receives the entropy of these rows' softmax.

    Returns:
        loss () fp32, differentiable once in hidden and lm_head; logps (N,) fp32, not differentiable, 0 where the
        weight is 0.
    """
    if rows is None:
        rows = weights.nonzero().squeeze(1)
    return _WeightedCrossEntropy.apply(hidden, lm_head, targets, weights, rows, entropies, torch.is_grad_enabled())


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, weights, rows, entropies, grad_enabled):
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        # Accumulated in fp32: in bf16 a small term added to a large sum is lost.
        grad_head = torch.zeros_like(lm_head, dtype=torch.float32) if wanted[1] else None
        ctx.grads = grad_hidden, grad_head
        outputs = grad_hidden, grad_head, entropies
        logps = logps_and_gradients(hidden, lm_head.to(hidden.dtype), targets, weights, rows, outputs)
        ctx.mark_non_differentiable(logps)
        return (weights * logps).sum(), logps

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("the gradients are returned once; a second backward needs a second forward")
        grads, ctx.grads = ctx.grads, None
        return *(grad if grad is None else grad.mul_(grad_loss) for grad in grads), None, None, None, None, None


def logps_and_gradients(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, rows: Tensor, outputs: Outputs
) -> Tensor:
    """The log-probabilities (N,) of these rows, 0 elsewhere.

    Args:
        weights: (N,) fp32; None if no gradient is wanted.
        outputs: three tensors, or None for each: the gradient of hidden (N, D), overwritten in these rows; that of
            lm_head (V, D) fp32, added to; the entropies (N,) fp32, overwritten in these rows.
    """
    grad_hidden, grad_head, entropies = outputs
    wanted = grad_hidden is not None or grad_head is not None
    logps = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    for chunk, x, logits in logits_by_chunks(hidden, head, rows):
        logps[chunk], entropy = logprobs_(logits, targets[chunk], weights[chunk] if wanted else None)
        if entropies is not None:
            entropies[chunk] = entropy
        if grad_hidden is not None:
            grad_hidden[chunk] = product(logits, head)
        if grad_head is not None:
            add_product(grad_head, logits.T, x)
    return logps
