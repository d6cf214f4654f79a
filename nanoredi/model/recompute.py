"""Activation checkpointing: backward recomputes what forward did not keep (arXiv 1604.06174).

Autograd passes each tensor that an operation saves for backward to a pack hook, and asks an unpack hook for it later.
Here packing only numbers the tensor. The first unpacking reruns the forward up to the last saved tensor, which yields
all of them. The results of expensive operations are kept, and reused in the rerun.

torch.utils.checkpoint does this for any code, but imports torch._dynamo: 0.12 GB and a second at every start.
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
    """run(*inputs), keeping for backward only the inputs and the results of the operations in `kept`, such as
    "aten::mm". The rerun must do what the first run did: no random numbers, no changes in place."""
    results: list[Any] = []
    needed: list[int] = []  # for each saved tensor, the number of results kept before it
    made: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        needed.append(len(results))
        return len(needed) - 1

    def record(tensor: Tensor) -> None:
        made[len(made)] = tensor.detach()
        if len(made) == len(needed):
            raise _Enough

    def unpack(number: int) -> Tensor:
        if number not in made:
            made.clear()
            own = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
            hooks = saved_tensors_hooks(record, lambda _: None)
            with suppress(_Enough), torch.enable_grad(), hooks, _Results(kept, results, iter(results)):
                run(*own)
        return made.pop(number)

    with saved_tensors_hooks(pack, unpack), _Results(kept, results):
        out = run(*inputs)
    del results[needed[-1] if needed else 0 :]  # the rerun ends before these
    return out


class _Enough(Exception):
    """Every saved tensor has been recomputed: the rest of the forward is not needed."""


class _Results(TorchDispatchMode):
    """Intercepts every operation, below autograd: keeps the results of some, or replays the kept ones."""

    def __init__(self, kept: Collection[str], results: list[Any], given: Iterator[Any] | None = None):
        super().__init__()
        self.kept, self.results, self.given = kept, results, given

    # Without this torch imports torch._dynamo, to mark this class as one to skip.
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.name() not in self.kept:
            return op(*args, **(kwargs or {}))
        # Detached, because autograd attaches its graph to what this returns, which would be kept alive with it.
        if self.given:
            return tree_map_only(Tensor, Tensor.detach, next(self.given))
        result = op(*args, **(kwargs or {}))
        self.results.append(tree_map_only(Tensor, Tensor.detach, result))
        return result
