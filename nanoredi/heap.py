"""What the C library holds of a CPU's memory beyond the tensors in it.

oneDNN keeps a compiled kernel for each size of a product, some half a megabyte, and every micro-batch has sizes of its
own. Kept among activations that are freed, these pin the heap: without being asked, glibc gives little of it back, and a
run grows by gigabytes.
"""

import ctypes

from nanoredi.model import Qwen2

_SMALL = 10_000_000  # parameters; the steps of so small a model, the toy's, take up to a third longer with it


def give_back(model: Qwen2) -> None:
    """Have the free memory of a process that trains this model go back to the system, where the C library is glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None and sum(p.numel() for p in model.parameters()) > _SMALL:
        malloc_trim(0)
