"""C, for what torch has no operation for on a CPU: compiled where it is first used, by the machine's own compiler.

It takes some tenths of a second a file, and nothing stays on the disk. Where there is no compiler, or none whose OpenMP
is the one that torch has loaded, the caller does it in PyTorch.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor

_COMPILER = "cc"
_KINDS = {"t": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-Wno-psabi"]


@functools.cache
def compiled(name: str, **constants: int) -> ctypes.CDLL | None:
    """The library of the C file of this name beside this one. None, once it was said why, where it cannot be had.

    Args:
        constants: what the file wants defined.
    """
    source = Path(__file__).with_name(f"{name}.c")
    definitions = [f"-D{constant}={value}" for constant, value in constants.items()]
    if not shutil.which(_COMPILER):
        return _without(source, f"there is no C compiler, {_COMPILER}")
    with tempfile.TemporaryDirectory() as folder:
        # In two steps, so that no second OpenMP is linked in: its functions are found in torch's, and so are its threads.
        part, library = f"{folder}/part.o", f"{folder}/library.so"
        try:
            for words in ([*_FLAGS, *definitions, "-c", source, "-o", part], ["-shared", part, "-lm", "-o", library]):
                subprocess.run([_COMPILER, *words], check=True, capture_output=True, text=True)
            return ctypes.CDLL(library)
        except subprocess.CalledProcessError as error:
            return _without(source, (error.stderr.strip().splitlines() or [f"it gave {error.returncode}"])[0])
        except OSError as error:
            return _without(source, str(error))


def call(library: ctypes.CDLL, name: str, kinds: str, *arguments: Tensor | int | float | None) -> None:
    """A C function, which must find tensors as it expects them; nothing but their memory's address is given to it.

    Args:
        kinds: of the arguments, a letter each: t, a tensor or None; i, an int64; f, an fp32 number.
    """
    function = getattr(library, name)
    function.argtypes = [_KINDS[kind] for kind in kinds]
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def _without(source: Path, why: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        text = f"note: {source.name} was not compiled ({why}); PyTorch does the same in more time"
        print(text, file=sys.stderr, flush=True)
