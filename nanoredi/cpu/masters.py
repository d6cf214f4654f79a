"""fp32 masters on a CPU: their gradients add up in place, and what is computed with them is a copy that lasts.

Autograd has every operation make its gradient as a new tensor, and adds that to the parameter's `grad` later. A
vocabulary's gradients, the embedding's and the head's, are hundreds of megabytes; the system must provide them anew for
each micro-batch, which on a CPU takes longer than working them out, and so it is with casts of the weights. A master
keeps both: its `grad`, zeroed after a step and not dropped, to which the operations of this package add, leaving autograd
nothing to do; and, where products are of another dtype, a copy of it, renewed when the master has changed.
"""

from typing import Any

import torch
from torch import Tensor

from nanoredi.kernels.dispatch import drop_gradient, prepare_for_training


@prepare_for_training.on("cpu")
def make_master(parameter: Any) -> None:
    """The parameter must be an fp32 leaf, whose gradient nobody asks torch.autograd.grad for any more."""
    parameter.grad, parameter.is_master, parameter.copies = torch.zeros_like(parameter), True, {}


def kept_sum(parameter: Tensor) -> Tensor | None:
    """What gradients are to be added to in place; None where autograd is to do it."""
    return parameter.grad if getattr(parameter, "is_master", False) else None


def cast(parameter: Any, dtype: torch.dtype) -> Tensor:
    """The parameter in this dtype; of another one without its history. Not to be changed."""
    if parameter.dtype == dtype:
        return parameter
    if not getattr(parameter, "is_master", False):
        return parameter.detach().to(dtype)
    version, copy = parameter.copies.get(dtype, (None, None))
    if version != parameter._version:
        copy = parameter.detach().to(dtype) if copy is None else copy.copy_(parameter.detach())
        parameter.copies[dtype] = parameter._version, copy
    return copy


@drop_gradient.on("cpu")
def _(parameter: Tensor) -> None:
    total = kept_sum(parameter)
    if total is None:
        return NotImplemented
    total.zero_()
