"""Returning freed memory to the system.

oneDNN caches a compiled kernel of half a megabyte for each new size of a product, and every micro-batch has new sizes.
Scattered among freed activations, these pin the heap, so that glibc returns little of it and a run grows by gigabytes:
malloc_trim returns it. Getting memory back costs a small model a tenth of its short steps, so there it is kept.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nanoredi.cpu.native import library
from nanoredi.kernels.dispatch import after_step

_SMALL = 10_000_000  # parameters; returning memory would make the steps of a smaller model up to a third longer
_EVERY = 32  # micro-batches between trims where oneDNN makes no products
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h's numbers


@after_step.on("cpu")
def give_back(num_steps: Tensor, num_micro_batches: int, num_parameters: int, compute_dtype: torch.dtype) -> None:
    """Return free memory to the system, where the C library is glibc and it is worth it."""
    if num_parameters <= _SMALL:
        _keep()
    elif not library("products", compute_dtype) or int(num_steps) % max(1, _EVERY // num_micro_batches) == 0:
        _glibc("malloc_trim")(0)


@functools.cache
def _keep() -> None:
    """Stop glibc from mapping large tensors one by one and from returning what is free at the heap's end."""
    for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        _glibc("mallopt")(parameter, 1 << 30)


def _glibc(name: str) -> Callable[..., int]:
    return getattr(ctypes.CDLL(None), name, lambda *_: 0)
