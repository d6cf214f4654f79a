"""Dispatch by device: an operation is a plain PyTorch function, which defines it, and faster versions by device type.

    @operation
    def rotate(x, cos, sin): ...        the plain version, also available as rotate.plain

    @rotate.on("cuda")
    def _(x, cos, sin): ...             for tensors on this device type; returns NotImplemented to use the plain version

The first argument's device decides. The Triton kernels of the loss and the sampler follow their plain versions in the
same file. Code that only makes one device type faster is in its own package, nanoredi/<type>, imported with the first
tensor of that type; if the package is deleted, the plain versions run. At the end of this file are hooks that such a
package may use beside its operations.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Version = TypeVar("Version", bound=Callable[..., Any])

# Importing Triton takes 76 MB, so it is imported only for a GPU or, in tests, its interpreter.
if TYPE_CHECKING or torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    try:
        import triton
        import triton.language as tl  # noqa: F401  for the files of kernels
    except ImportError:  # Triton exists for Linux only
        triton = tl = None
else:
    triton = tl = None


class operation(Generic[P, R]):  # noqa: N801  it is used as a decorator
    """A plain version, and faster ones by device type."""

    def __init__(self, plain: Callable[P, R]):
        functools.update_wrapper(self, plain)
        self.plain = plain
        self.faster: dict[str, Callable[P, R]] = {}

    def on(self, device_type: str) -> Callable[[Version], Version]:
        def register(version: Version) -> Version:
            self.faster[device_type] = version
            return version

        return register

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else next(iter(kwargs.values()))
        device_type = first.device.type
        _import_package(device_type)
        if device_type in self.faster:
            result = self.faster[device_type](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.plain(*args, **kwargs)


@functools.cache
def _import_package(device_type: str) -> None:
    if importlib.util.find_spec(f"nanoredi.{device_type}"):
        importlib.import_module(f"nanoredi.{device_type}")


@operation
def prepare_for_training(parameter: Tensor) -> None:
    """Called before the first step for each fp32 parameter that is not sharded."""


@operation
def prepare_for_sampling(weight: Tensor, for_linear: bool) -> Tensor:
    """The weight in the layout that samples fastest; for_linear: only `linear` will read it."""
    return weight


@operation
def decode_graphs(
    newest: Tensor, advance: Callable[..., Tensor], sizes: tuple[int, int, int], full_size: bool
) -> Callable[..., Tensor] | None:
    """A replacement for `advance`, a sampler's decode step, with less launch overhead, or None. newest is a tensor on the
    device; sizes are a full batch's rows, the page table's columns and a page's tokens; full_size: every step has all
    rows."""
    return None


@operation
def drop_gradient(parameter: Tensor) -> None:
    """Clear a parameter's gradient after a step."""
    parameter.grad = None


@operation
def after_step(num_steps: Tensor, num_micro_batches: int, num_parameters: int, compute_dtype: torch.dtype) -> None:
    """Called after each training step; num_steps () are the steps so far, on the parameters' device."""
