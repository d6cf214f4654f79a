"""What the C library holds of a CPU's memory beyond the tensors in it.

oneDNN keeps a compiled kernel for each size of a product, some half a megabyte, and every micro-batch has sizes of its
own. Kept among activations that are freed, these pin the heap: without being asked, glibc gives little of it back, and a
run grows by gigabytes. But to provide anew what was given back takes the system a tenth of a short step; so the little that
a small model needs is kept.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nanoredi.cpu.native import library
from nanoredi.kernels.dispatch import after_step

_SMALL = 10_000_000  # parameters; the steps of so small a model, the toy's, take up to a third longer with it
_EVERY = 32  # micro-batches, of which oneDNN makes no products
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h's numbers


@after_step.on("cpu")
def give_back(num_steps: Tensor, num_micro_batches: int, num_parameters: int, compute_dtype: torch.dtype) -> None:
    """Have the free memory go back to the system, where the C library is glibc and it is worth it."""
    if num_parameters <= _SMALL:
        _keep()
    elif not library("products", compute_dtype) or int(num_steps) % max(1, _EVERY // num_micro_batches) == 0:
        _glibc("malloc_trim")(0)


@functools.cache
def _keep() -> None:
    """Neither take large tensors from the system one by one nor give back what is free at the heap's end."""
    for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        _glibc("mallopt")(parameter, 1 << 30)


def _glibc(name: str) -> Callable[..., int]:
    return getattr(ctypes.CDLL(None), name, lambda *_: 0)
