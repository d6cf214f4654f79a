"""Triton, where its kernels have something to run on: a GPU, or for tests its interpreter (TRITON_INTERPRET=1).

Elsewhere the plain versions run, and 76 MB of Triton stay out of memory.
"""

import os

import torch
from torch import Tensor

__all__ = ["runs_triton", "tl", "triton"]

triton = tl = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    try:
        import triton
        import triton.language as tl
    except ImportError:  # there is one for Linux alone
        pass


def runs_triton(tensor: Tensor) -> bool:
    return triton is not None and tensor.is_cuda
