"""The loss of SFT and REDI, and its gradients, without ever holding tokens x vocabulary.

Both losses are linear in the log-probabilities of the target tokens (objectives.py has the weights):

    loss = sum_t w_t * logp_t        logp_t = z_t[y_t] - logsumexp(z_t)        z_t = lm_head @ hidden_t

All w_t are known before the forward pass, so the gradient with respect to a row of logits is known as soon as that row
is:

    d loss / d z_t = w_t * (onehot(y_t) - softmax(z_t))

Hence forward walks over chunks of rows, makes a chunk's logits, turns them in place into their own gradient,
multiplies that into the gradients of hidden and lm_head, and forgets it. Backward only hands the two finished
gradients over.
"""

import torch
from torch import Tensor

# One chunk's logits hold at most this many elements (64 MiB in fp32), whatever the vocabulary.
MAX_CHUNK_LOGITS = 1 << 24


def weighted_cross_entropy(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the targets' log-probabilities, and these log-probabilities.

    Args:
        hidden: (N, D) final hidden states, fp32 or bf16.
        lm_head: (V, D) output embedding, of hidden's dtype.
        targets: (N,) int64, the token each row must predict; read only where the weight is not 0.
        weights: (N,) fp32, any mixture of signs; a row of weight 0 costs nothing.
        rows: (R,) int64, the indices of the rows whose weight is not 0. Made on the CPU with the batch, they spare the
            device a wait; without them they are looked up here.

    Returns:
        loss () fp32, differentiable once in hidden and lm_head; logps (N,) fp32, not differentiable, 0 where the
        weight is 0.
    """
    if rows is None:
        rows = weights.nonzero().squeeze(1)
    return _WeightedCrossEntropy.apply(hidden, lm_head, targets, weights, rows, torch.is_grad_enabled())


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, weights, rows, grad_enabled):
        grad_hidden = torch.zeros_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        # Chunks (and tied embeddings) add up in fp32: in bf16 a small term added to a large sum is lost.
        grad_head = torch.zeros_like(lm_head, dtype=torch.float32) if grad_enabled and ctx.needs_input_grad[1] else None
        logps = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)

        for chunk in rows.split(max(1, MAX_CHUNK_LOGITS // lm_head.shape[0])):
            x, y, w = hidden[chunk], targets[chunk].unsqueeze(1), weights[chunk].unsqueeze(1)
            logits = (x @ lm_head.T).float()  # (C, V)
            logits -= logits.logsumexp(1, keepdim=True)
            logps[chunk] = logits.gather(1, y).squeeze(1)
            if grad_hidden is None and grad_head is None:
                continue
            # The target's column is 1 - p, which cancels where the model is sure; the sum of the other p does not.
            others = logits.exp_().scatter_(1, y, 0.0)
            grad_logits = others.scatter_(1, y, -others.sum(1, keepdim=True)).mul_(-w).to(x.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ lm_head
            if grad_head is not None:
                _add_product(grad_head, grad_logits.T, x)

        ctx.grads = grad_hidden, grad_head
        ctx.mark_non_differentiable(logps)
        return (weights * logps).sum(), logps

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError(
                "weighted_cross_entropy hands its gradients over once; a second backward needs a second forward"
            )
        grad_hidden, grad_head = ctx.grads
        ctx.grads = None
        for grad in (grad_hidden, grad_head):
            if grad is not None:
                grad.mul_(grad_loss)
        return grad_hidden, grad_head, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's fp32 whatever the dtype of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
