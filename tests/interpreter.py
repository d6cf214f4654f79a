"""Triton's interpreter keeps bf16 as the bits of integers. It multiplies matrices of it as if these were the numbers, and cuts
off what is too much for it. With this imported it multiplies the numbers, and rounds as a device does."""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_s
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot, _convert_float = InterpreterBuilder.create_dot, triton_s._convert_float


def _widened(x: TensorHandle) -> TensorHandle:
    """Itself, or bf16 as fp32, of which it is the upper half."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(x: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """To the nearest bf16, of two the even one."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(x, source, target, mode)
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


InterpreterBuilder.create_dot = lambda self, a, b, *others: _create_dot(self, _widened(a), _widened(b), *others)
triton_s._convert_float = _rounded
