"""Activation checkpointing: backward makes again what forward did not keep (arXiv 1604.06174).

Autograd gives every tensor that an operation saves for its backward to one hook, and asks another for it later. Here
the first hook keeps only the tensor's number, in the order of saving. The second runs the forward again, in which the
same tensors are saved in the same order, and so has them all. Dear operations are excepted: their results are kept, and
the second forward is given them.

torch.utils.checkpoint does as much for any code. It imports torch._dynamo: 0.1 GB and a second of every start.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

# keeps(name, *args): whether the result of an operation, such as "aten::mm" of two tensors, is kept; None says that
# backward has no use for it, so that it need not be made again either.
Keeps = Callable[..., bool | None]


def recomputed(run: Callable[..., Tensor], keeps: Keeps, *inputs: Any) -> Tensor:
    """run(*inputs), of which backward finds the inputs and the results that `keeps` names; it makes the rest again.

    The second run must do what the first did: draw no random number, and change nothing in place.
    """
    results: list[Any] = []
    numbers = count()
    made: dict[int, Tensor] = {}

    def make() -> None:
        again = count()

        def pack(tensor: Tensor) -> None:
            number = next(again)
            made[number] = tensor.detach()
            if number + 1 == saved:
                raise _Enough

        own = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
        with suppress(_Enough), torch.enable_grad(), saved_tensors_hooks(pack, lambda _: None), _Give(keeps, results):
            run(*own)

    def unpack(number: int) -> Tensor:
        if number not in made:
            make()
        return made.pop(number)

    with saved_tensors_hooks(lambda _: next(numbers), unpack), _Keep(keeps, results):
        out = run(*inputs)
    saved = next(numbers)
    return out


class _Enough(Exception):
    """All is made that the first forward had saved: what would follow is of no use."""


class _Mode(TorchDispatchMode):
    """Sees every operation, below autograd."""

    def __init__(self, keeps: Keeps, results: list[Any]):
        super().__init__()
        self.keeps, self.results = keeps, results

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import torch._dynamo, to tell it to leave this class alone


class _Keep(_Mode):
    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        keeps = self.keeps(op.name(), *args)
        if keeps is None:
            self.results.append(result.new_zeros(()).expand(result.shape))  # in its place: one number
        elif keeps:
            self.results.append(_detached(result))
        return result


class _Give(_Mode):
    def __init__(self, keeps: Keeps, results: list[Any]):
        super().__init__(keeps, results)
        self.kept: Iterator[Any] = iter(results)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.keeps(op.name(), *args) is not False:
            return _detached(next(self.kept))
        return op(*args, **(kwargs or {}))


def _detached(result: Any) -> Any:
    """Of a tensor or a tuple of them. Autograd notes on what an operation returned where it came from: kept as it is,
    the result would keep the graph that keeps it."""
    if isinstance(result, Tensor):
        return result.detach()
    return tuple(map(_detached, result)) if isinstance(result, tuple) else result
