"""What is done to a chunk of logits: in C (rows.c), which reads a row twice, the first time for the largest; without a
compiler in PyTorch, a few rows at a time, which stay in the cache with what is made of them."""

import torch
from torch import Tensor

from nanoredi.cpu.native import call, library
from nanoredi.kernels.logits import gradient_, logprobs_

_AT_ONCE = 1 << 20  # logits


@logprobs_.on("cpu")
def _(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
    if library("rows", logits.dtype):
        out = tuple(logits.new_empty(4, len(logits), dtype=torch.float32))
        _call("logprobs", logits, targets, weights, *out)
        return out
    tensors = (logits, targets) if weights is None else (logits, targets, weights)
    parts = zip(*(logprobs_.plain(*part) for part in _few_rows(*tensors)))
    return tuple(map(torch.cat, parts))


@gradient_.on("cpu")
def _(logits: Tensor, *others: Tensor) -> None:
    if library("rows", logits.dtype):
        return _call("gradient", logits, *others)
    for part in _few_rows(logits, *others):
        gradient_.plain(*part)


def _call(name: str, logits: Tensor, *others: Tensor | None) -> None:
    along = [None if x is None else x.contiguous() for x in others]
    kinds = "ti" + "t" * len(along) + "ii"
    call(library("rows", logits.dtype), name, kinds, logits, logits.stride(0), *along, *logits.shape)


def _few_rows(*tensors: Tensor) -> zip:
    num_rows = max(1, _AT_ONCE // tensors[0].shape[1])
    return zip(*(x.split(num_rows) for x in tensors))
