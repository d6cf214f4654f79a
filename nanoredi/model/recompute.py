"""Activation checkpointing: backward makes again what forward did not keep (arXiv 1604.06174).

Autograd gives every tensor that an operation saves for its backward to one hook, and asks another for it later. Here the
first only numbers the tensor. The second runs the forward again, as far as the last tensor that was saved, and so has
them all. Expensive operations are excepted: their results are kept for the second run.

torch.utils.checkpoint does as much for any code. It imports torch._dynamo: 0.12 GB and a second of every start.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def recomputed(run: Callable[..., Tensor], kept: Collection[str], *inputs: Any) -> Tensor:
    """run(*inputs), of which backward finds the inputs and the results of the operations in `kept`, such as "aten::mm";
    it makes the rest again. The second run must do what the first did: draw no random number, change nothing in place."""
    results: list[Any] = []
    needed: list[int] = []  # for each tensor that is saved, the results that were kept before it
    made: dict[int, Tensor] = {}

    def number(tensor: Tensor) -> int:
        needed.append(len(results))
        return len(needed) - 1

    def make_again(tensor: Tensor) -> None:
        made[len(made)] = tensor.detach()
        if len(made) == len(needed):
            raise _Enough

    def find(number: int) -> Tensor:
        if number not in made:
            made.clear()
            own = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
            hooks = saved_tensors_hooks(make_again, lambda _: None)
            with suppress(_Enough), torch.enable_grad(), hooks, _Results(kept, results, iter(results)):
                run(*own)
        return made.pop(number)

    with saved_tensors_hooks(number, find), _Results(kept, results):
        out = run(*inputs)
    del results[needed[-1] if needed else 0 :]  # the second run does not come to them
    return out


class _Enough(Exception):
    """All is made that the first forward had saved: what would follow is of no use."""


class _Results(TorchDispatchMode):
    """Sees every operation, below autograd: keeps the results of some, or gives those that were kept."""

    def __init__(self, kept: Collection[str], results: list[Any], given: Iterator[Any] | None = None):
        super().__init__()
        self.kept, self.results, self.given = kept, results, given

    # Else torch would import torch._dynamo, to tell it to leave this class alone.
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.name() not in self.kept:
            return op(*args, **(kwargs or {}))
        result = next(self.given) if self.given else op(*args, **(kwargs or {}))
        # Autograd notes on what an operation returned where it came from: kept as it is, it would keep its own graph.
        free = tree_map_only(Tensor, Tensor.detach, result)
        if self.given:
            return free
        self.results.append(free)
        return result
