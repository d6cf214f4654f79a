"""What the C library holds of a CPU's memory beyond the tensors in it.

oneDNN keeps a compiled kernel for each size of a product, some half a megabyte, and every micro-batch has sizes of its
own. Kept among activations that are freed, these pin the heap: without being asked, glibc gives little of it back, and a
run grows by gigabytes. But to provide anew what was given back takes the system a tenth of a short step.
"""

import ctypes

import torch
from torch import Tensor

from nanoredi.cpu.native import library
from nanoredi.kernels.dispatch import after_step

_SMALL = 10_000_000  # parameters; the steps of so small a model, the toy's, take up to a third longer with it
_EVERY = 32  # micro-batches, of which oneDNN makes no products


@after_step.on("cpu")
def give_back(num_steps: Tensor, num_micro_batches: int, num_parameters: int, compute_dtype: torch.dtype) -> None:
    """Have the free memory go back to the system, where the C library is glibc and it is worth it."""
    if num_parameters <= _SMALL:
        return
    if library("products", compute_dtype) and int(num_steps) % max(1, _EVERY // num_micro_batches):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
