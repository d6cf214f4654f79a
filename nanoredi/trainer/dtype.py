"""The dtype to compute in, and the rate of matrix products that the device reaches in it."""

import time

import torch

from nanoredi.common.errors import UserError
from nanoredi.kernels.dispatch import triton
from nanoredi.kernels.layers import product


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that "float32", "bfloat16" or "auto" means on a device; auto is bfloat16 if it has units for that.

    Raises:
        UserError: for a GPU where Triton does not run, and for bfloat16 on a GPU that does not multiply in it.
    """
    if device.type == "cuda":
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
        if lacking := _lacking_for_triton():
            raise UserError(f"a GPU needs Triton, which {lacking}, or hide the GPU with CUDA_VISIBLE_DEVICES=")
        if name == "bfloat16" and not has_units:
            raise UserError(
                f"{torch.cuda.get_device_name(device)} does not multiply in bfloat16 (compute capability 8.0 and later "
                "do): give --dtype float32, or auto"
            )
    else:
        can = torch.cpu.get_capabilities()
        has_units = can.get("amx_bf16") or can.get("avx512_bf16")
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if has_units else torch.float32


def _lacking_for_triton() -> str | None:
    """What keeps Triton from running, and what would help."""
    if triton is None:
        return "is not installed: pip install triton"
    try:
        triton.runtime.driver.active  # noqa: B018  on first use it is compiled for this machine's Python and driver
    except Exception as error:  # there is one for each of a compiler, Python.h and libcuda.so
        return f"cannot be set up ({error}): install a compiler and Python's header files"
    return None


def device_alone() -> torch.device:
    """The device of a process that is not one of several ranks."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settled_dtype(name: str, before: str = "auto") -> str:
    """The dtype, "float32" or "bfloat16", of work that may be a resume: the one asked for; for "auto" the one that the
    work was begun with, so that it can be resumed on another machine; else compute_dtype's choice."""
    if name == before == "auto":
        return str(compute_dtype(name, device_alone())).removeprefix("torch.")
    return before if name == "auto" else name


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s that the device reaches in a large matrix product, measured in a tenth of a second.

    Other processes may be using the device. On a GPU the fastest of many products counts. On a CPU the CPU time of a
    single thread counts, times the number of threads: it does not advance while another process has the core.
    """
    on_gpu, num_threads = device.type == "cuda", torch.get_num_threads()
    size, clock = (8192, time.perf_counter) if on_gpu else (512, time.thread_time)
    a = torch.randn(size, size, device=device).to(dtype)
    times: list[float] = []
    torch.set_num_threads(1)
    try:
        while len(times) < 4 or sum(times) < 0.1:
            start = clock()
            product(a, a)
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(clock() - start)
    finally:
        torch.set_num_threads(num_threads)
    return 2 * size**3 / min(times) * (1 if on_gpu else num_threads)
