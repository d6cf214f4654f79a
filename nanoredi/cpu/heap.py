"""What the C library holds of a CPU's memory beyond the tensors in it.

oneDNN keeps a compiled kernel for each size of a product, some half a megabyte, and every micro-batch has sizes of its
own. Kept among activations that are freed, these pin the heap: without being asked, glibc gives little of it back, and a
run grows by gigabytes. But to provide anew what was given back takes the system a tenth of a short step.
"""

import ctypes

from nanoredi.kernels.products import made_in_c
from nanoredi.model.qwen2 import Qwen2

_SMALL = 10_000_000  # parameters; the steps of so small a model, the toy's, take up to a third longer with it
_EVERY = 32  # micro-batches, of which oneDNN makes no products


def give_back(model: Qwen2, num_steps: int, num_micro_batches: int) -> None:
    """Have the free memory of a process that trains this model go back to the system, where the C library is glibc, and
    it is worth it after so many steps, of so many micro-batches each."""
    if sum(p.numel() for p in model.parameters()) <= _SMALL:
        return
    if made_in_c(model.compute_dtype) and num_steps % max(1, _EVERY // num_micro_batches):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
