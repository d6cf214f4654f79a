"""The size of an update in one pass over each parameter; without a compiler in pieces that stay in the cache."""

import torch
from torch import Tensor

from nanoredi.cpu.native import call, library
from nanoredi.kernels.adamw import update_square

_PIECE = 1 << 14  # elements of which C makes one sum
_AT_ONCE = 1 << 18  # elements that PyTorch works on at a time


@update_square.on("cpu")
def _(
    new: Tensor, mean: Tensor, mean_square: Tensor, rate: Tensor, correction: Tensor, eps: float, decayed: float
) -> Tensor:
    tensors = new, mean, mean_square
    c = library("pointwise", new.dtype, new.shape[-1]) if new.dtype == torch.float32 else None
    if c and all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
        squares = torch.empty(-(-new.numel() // _PIECE))
        factors = rate.item(), correction.item(), eps, decayed
        call(c, "update_square", "ttttiiffff", *tensors, squares, new.numel(), _PIECE, *factors)
        return squares.sum()
    pieces = zip(*(x.flatten().split(_AT_ONCE) for x in tensors))
    return torch.stack([update_square.plain(x, m, v, rate, correction, eps, decayed) for x, m, v in pieces]).sum()
