"""Which version of an operation runs: the plain PyTorch one, which says what is computed, or one that is faster on a device.

    @operation
    def rotate(x, cos, sin): ...        the plain version, also to be had as rotate.plain

    @rotate.on("cuda")
    def _(x, cos, sin): ...             for tensors of this device type; NotImplemented means: take the plain one

The first argument's device decides. The loss's and the sampler's Triton kernels stand below the plain versions. What is for
speed on one type of device alone is in a package of its own, nanoredi/<type>, which registers what it has; it is imported with
the first tensor of that type, and where it was deleted the plain versions run. The hooks below are for what such a package
needs beside its operations.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Version = TypeVar("Version", bound=Callable[..., Any])

# Triton takes 76 MB, so it is imported only where it has something to run on: a GPU, or for tests its interpreter.
if TYPE_CHECKING or torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    try:
        import triton
        import triton.language as tl  # noqa: F401  for the files of kernels
    except ImportError:  # there is one for Linux alone
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
    """Called once for each fp32 parameter that one process trains alone, before the first step."""


@operation
def prepare_for_sampling(weight: Tensor, is_factor: bool) -> Tensor:
    """What replaces a weight that is only sampled from: is_factor says that nothing but `linear` will see it."""
    return weight


@operation
def decode_graphs(
    newest: Tensor, advance: Callable[..., Tensor], sizes: tuple[int, int, int], full_size: bool
) -> Callable[..., Tensor] | None:
    """What starts a sampler's decode steps (Sampler._advance) at less cost than calling them, if anything does: sizes are the
    rows of a full batch, all columns of the page table and a page's tokens; newest is a tensor on the device; full_size
    says that every step has all rows."""
    return None


@operation
def drop_gradient(parameter: Tensor) -> None:
    """Make a parameter ready for the next step's gradient."""
    parameter.grad = None


@operation
def after_step(num_steps: Tensor, num_micro_batches: int, num_parameters: int, compute_dtype: torch.dtype) -> None:
    """Called after each training step with the number of steps so far () on the parameters' device, the step's
    micro-batches, and what was trained."""
