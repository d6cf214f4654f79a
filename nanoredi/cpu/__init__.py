"""Everything that only serves speed on a CPU: C, and PyTorch arranged for its caches. Importing the package registers
it with kernels/dispatch.py, the only one that imports it; without it the plain versions run."""

from nanoredi.cpu import (  # noqa: F401
    adamw,
    causal,
    decode,
    embedding,
    head,
    heap,
    masters,
    norm,
    pointwise,
    products,
    rows,
    top_p,
)
