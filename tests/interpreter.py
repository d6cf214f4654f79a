"""Triton's interpreter stores bf16 as integers. It multiplies matrices of these integers, and truncates when it converts
to bf16. Importing this module makes it multiply the numbers they encode, and round to nearest as a device does."""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_s
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot, _convert_float = InterpreterBuilder.create_dot, triton_s._convert_float


def _widened(x: TensorHandle) -> TensorHandle:
    """bf16 as fp32, whose upper half it is; other dtypes unchanged."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(x: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """Round fp32 to the nearest bf16, ties to even; other conversions unchanged."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(x, source, target, mode)
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


InterpreterBuilder.create_dot = lambda self, a, b, *others: _create_dot(self, _widened(a), _widened(b), *others)
triton_s._convert_float = _rounded
