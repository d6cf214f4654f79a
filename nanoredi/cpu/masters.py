"""fp32 master weights on a CPU: gradients are accumulated in place, and casts are cached.

Autograd makes each gradient a new tensor and then adds it to the parameter's `grad`. Those of the embedding and the
head are hundreds of megabytes, and on a CPU getting the memory from the system takes longer than computing them; the
same holds for casts of the weights. A master weight keeps both: its `grad`, zeroed after a step rather than dropped, to
which the operations of this package add directly; and, if products are of another dtype, a copy, updated after a step.
"""

from typing import Any

import torch
from torch import Tensor

from nanoredi.kernels.dispatch import drop_gradient, prepare_for_training


@prepare_for_training.on("cpu")
def make_master(parameter: Any) -> None:
    """The parameter must be an fp32 leaf; from now on torch.autograd.grad does not see its gradient."""
    parameter.grad, parameter.is_master, parameter.copies = torch.zeros_like(parameter), True, {}


def kept_sum(parameter: Tensor) -> Tensor | None:
    """The `grad` to which gradients are added in place; None where that is autograd's task."""
    return parameter.grad if getattr(parameter, "is_master", False) else None


def cast(parameter: Any, dtype: torch.dtype) -> Tensor:
    """The parameter in this dtype, to be read only; a cast is detached."""
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
    # torch's fused AdamW changes weights without a new version, so `cast` would return the copy from before.
    torch.autograd.graph.increment_version(parameter)
