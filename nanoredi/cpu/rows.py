"""The log-probabilities and gradients of a chunk of logits in C (rows.c) or, without a compiler, in PyTorch with few
enough rows at a time to stay in the cache."""

import torch
from torch import Tensor

from nanoredi.cpu.native import call, library
from nanoredi.kernels.logits import logprobs_

_AT_ONCE = 1 << 20  # logits


@logprobs_.on("cpu")
def _(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tensors = (logits, targets) if weights is None else (logits, targets, weights)
    if not (c := library("rows", logits.dtype)):
        num_rows = max(1, _AT_ONCE // logits.shape[1])
        parts = zip(*(logprobs_.plain(*part) for part in zip(*(x.split(num_rows) for x in tensors))))
        logps, entropies = map(torch.cat, parts)
        return logps, entropies
    logps, entropies = logits.new_empty(2, len(logits), dtype=torch.float32)
    along = [targets.contiguous(), None if weights is None else weights.contiguous(), logps, entropies]
    call(c, "logprobs", "tittttii", logits, logits.stride(0), *along, *logits.shape)
    return logps, entropies
