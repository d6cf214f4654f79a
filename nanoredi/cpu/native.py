"""C for what torch has no operation for on a CPU, compiled at first use by the machine's own compiler.

A file takes some tenths of a second, and nothing stays on the disk. Without a compiler whose OpenMP is the one that
torch has loaded, callers use PyTorch instead.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_COMPILER, _SECONDS = "cc", 60  # a file takes tenths of one
_KINDS = {"t": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-Wno-psabi"]

# A file's head or row size must be a multiple of this.
_MULTIPLES = {"causal": 64, "decode": 4, "pointwise": 16, "products": 1, "rows": 1}
# Whether the CPU has AVX512-BF16 but no AMX: with AMX oneDNN is faster than products.c.
HAS_PAIRS = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def library(name: str, dtype: torch.dtype, size: int = 0, **constants: int) -> ctypes.CDLL | None:
    """The C file of this name, compiled for the caller's tensors; None where the caller must use PyTorch.

    Args:
        dtype: of the tensors.
        size: of a head, or of a row.
        constants: further macros.
    """
    if dtype not in (torch.float32, torch.bfloat16) or size % _MULTIPLES[name]:
        return None
    if name == "products":  # for bf16 only
        return compiled(name) if dtype == torch.bfloat16 and HAS_PAIRS else None
    if size:
        constants["SIZE"] = 16 if name == "pointwise" else size
    return compiled(name, IN_BF16=int(dtype == torch.bfloat16), **constants)


@functools.cache
def compiled(name: str, **constants: int) -> ctypes.CDLL | None:
    """Compile the C file of this name beside this one, with these macros; if that fails, say so and return None."""
    source = Path(__file__).with_name(f"{name}.c")
    definitions = [f"-D{constant}={value}" for constant, value in constants.items()]
    if not shutil.which(_COMPILER):
        return _without(source, f"there is no C compiler, {_COMPILER}")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            # Linked without -fopenmp, so that the OpenMP (and the threads) of torch are used, not a second one's.
            part, library = f"{folder}/part.o", f"{folder}/library.so"
            for words in (
                [*_FLAGS, *definitions, "-c", str(source), "-o", part],
                ["-shared", part, "-lm", "-o", library],
            ):
                _compile(words)
            return ctypes.CDLL(library)
    except subprocess.CalledProcessError as error:
        return _without(source, (error.stderr.strip().splitlines() or [f"it gave {error.returncode}"])[0])
    except subprocess.TimeoutExpired:
        return _without(source, f"{_COMPILER} took over {_SECONDS} seconds")
    except OSError as error:
        return _without(source, str(error))


def _compile(words: list[str]) -> None:
    subprocess.run(
        [_COMPILER, *words],
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        start_new_session=True,  # a Ctrl-C that ends an answer in a chat must not end the compiler
    )


def call(library: ctypes.CDLL, name: str, kinds: str, *arguments: Tensor | int | float | None) -> None:
    """Call a C function. It gets only the addresses of tensors: their layout is the caller's responsibility.

    Args:
        kinds: a letter for each argument: t, a tensor or None; i, an int64; f, an fp32 number.
    """
    function = getattr(library, name)
    function.argtypes = [_KINDS[kind] for kind in kinds]
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def _without(source: Path, why: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        text = f"note: {source.name} was not compiled ({why}); PyTorch does the same in more time"
        print(text, file=sys.stderr, flush=True)
