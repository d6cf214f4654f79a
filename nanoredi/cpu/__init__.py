"""What exists only to be fast on a CPU: C, and PyTorch arranged for its caches. Importing it registers all of it with
kernels/dispatch.py; nothing imports it but that, and without it the plain versions run."""

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
