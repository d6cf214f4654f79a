"""Compile the Triton kernels for GPUs that this machine does not have, with the dtypes, sizes and alignments of a run."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = (80, 90, 100)  # A100, H100, B200


def compiled(
    launches: list[tuple[JITFunction, tuple, dict]], targets: tuple[int, ...] = TARGETS
) -> dict[str, dict[str, dict[str, int]]]:
    """[kernel][sm_...] -> registers a thread, bytes of shared memory, and bytes of stack, to which registers spill."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for target in targets:
        driver.set_active(_Device(target))
        for kernel, args, kwargs in launches:
            binary = kernel._compile(*args, grid=(1,), warmup=True, **kwargs)
            uses = found.setdefault(_name(kernel, args, kwargs), {}).setdefault(f"sm_{target}", {})
            for what, number in _resources(binary).items():  # with and without tensors that may be None
                uses[what] = max(number, uses.get(what, 0))
    return found


class _Device:
    def __init__(self, target: int):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


class Pointer:
    """A tensor without memory, as Triton sees it. Its storage begins at a multiple of 512 bytes, like CUDA's."""

    def __init__(self, tensor: Tensor):
        self.dtype, self.nbytes = tensor.dtype, tensor.nbytes
        self.at = 512 + tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.at

    def ptr_range(self) -> int:
        return 1 << 62


def _name(kernel: JITFunction, args: tuple, kwargs: dict) -> str:
    """A kernel's name, with the first tensor's dtype and the constants that it is specialised for."""
    constants = {k: v for k, v in kwargs.items() if k in kernel.arg_names and isinstance(v, (int, bool))}
    dtype = next(str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, Pointer))
    return " ".join([kernel.__name__.strip("_"), dtype, *(f"{k}={v}" for k, v in constants.items())])


def _resources(binary: Any) -> dict[str, int]:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        said = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "shared": binary.metadata.shared, "stack": stack}
