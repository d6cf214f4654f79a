"""A simulated CUDA device: its tensors have shapes, dtypes and devices but no contents, and its steps can be
watched, operation by operation.

Importing it changes the process for good, so it belongs into one of its own (watched.py).
"""

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.device_mesh as device_mesh
from compiled import Pointer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_init, _fsdp_param_group, _fsdp_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

NO_COMPILER = 3  # the exit code where the device cannot be built

# Operations that start no kernel, beside views.
_NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh"}
# CUDA has these as operations of their own. Without a kernel for it, autograd would take them apart.
_WHOLE = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")


def _load() -> None:
    root = Path(torch.__file__).parent
    for name in ("libc10.so", "libtorch_cpu.so"):  # loaded already; now for the library's symbols, too
        ctypes.CDLL(str(root / "lib" / name), ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fake_cuda.so"
        includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        source = str(Path(__file__).with_name("fake_cuda.cpp"))
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", *includes, source, "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        except (OSError, subprocess.CalledProcessError) as error:
            print(getattr(error, "stderr", None) or error, file=sys.stderr)
            sys.exit(NO_COMPILER)


class _Event:
    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, *_: Any) -> None:
        pass

    wait = record

    def synchronize(self) -> None:
        waits.append("Event.synchronize")


class _Stream(_Event):
    wait_event = wait_stream = _Event.record

    def record_event(self, *_: Any) -> _Event:
        return _Event()


fake = FakeTensorMode(allow_non_fake_inputs=True)
waits: list[str] = []
launches: list[tuple[JITFunction, tuple, dict]] = []

_load()
_handle = SimpleNamespace(
    Event=_Event,
    Stream=_Stream,
    stream=contextlib.nullcontext,
    current_stream=lambda *_: _Stream(),
    current_device=lambda: 0,
    device_count=lambda: 1,
    is_available=lambda: True,
    set_device=lambda _: None,
    synchronize=lambda *_: waits.append("synchronize"),
    get_device_properties=lambda _: SimpleNamespace(multi_processor_count=132),  # an H100's
)
for module in (device_mesh, _fsdp_collectives, _fsdp_init, _fsdp_param_group, _fsdp_state):
    if hasattr(module, "_get_device_handle"):
        module._get_device_handle = lambda *_: _handle
for name, value in vars(_handle).items():
    if name not in ("is_available", "device_count"):
        setattr(torch.cuda, name, value)


def _pinned(tensor: Tensor) -> Tensor:
    pinned = tensor.detach() if isinstance(tensor, FakeTensor) else fake.from_tensor(tensor)
    pinned.untyped_storage().pinned = True
    return pinned


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def _launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    launches.append((kernel, tuple(Pointer(x) if isinstance(x, Tensor) else x for x in args), kwargs))


def _never(*_: Any) -> None:
    raise AssertionError("a tensor without contents was computed with")


_library = torch.library.Library("aten", "IMPL")
for name in _WHOLE:
    _library.impl(name, _never, "CUDA")
Tensor.pin_memory, Tensor.is_pinned = _pinned, _is_pinned
JITFunction._compile = JITFunction.run
JITFunction.run = _launch
torch.nn.Module.float = lambda self: self  # such parameters cannot be swapped, and the model is fp32 here


class Watch(TorchDispatchMode):
    """Counts what a step does to the device.

    Attributes:
        kernels: operations that start one, by name; Triton's own under "triton::".
        bytes: what each of these reads and writes, by name: each tensor that it is given or gives, once.
        peak: the most bytes of the device that the tensors seen so far have held at once.
        wrong: what waits for the device, and operations at which a CPU tensor meets a CUDA one, but for copies from pinned
            memory that nobody waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.peak = 0
        self.wrong: list[str] = []
        self._storages: dict[int, weakref.ref] = {}

    def __enter__(self) -> "Watch":
        waits.clear()
        self._first_launch = len(launches)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for kernel, args, _ in launches[self._first_launch :]:
            self.kernels[f"triton::{kernel.__name__}"] += 1
            self.bytes[f"triton::{kernel.__name__}"] += sum(x.nbytes for x in args if isinstance(x, Pointer))
        self.wrong += waits

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op.name()
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1 and not self._is_upload(name, args, kwargs, result):
            shapes = ", ".join(f"{x.device.type}{list(x.shape)}" for x in tensors)
            self.wrong.append(f"{name}({shapes})")
        if (
            "cuda" in devices
            and not _is_view(op, args, result)
            and op.namespace != "prim"
            and _plain(name) not in _NO_KERNEL
        ):
            # A sum in a narrower dtype first rounds what it is given, by another kernel.
            narrower = _plain(name) == "sum" and result.dtype.itemsize < args[0].dtype.itemsize
            self.kernels[name] += 1 + narrower
            self.bytes[name] += sum(x.nbytes for x in tensors)
        self._look_at_memory(x.untyped_storage() for x in tensors if x.is_cuda)
        return result

    def _look_at_memory(self, seen: Iterable[torch.UntypedStorage]) -> None:
        # FSDP lets go of storages by resizing them to nothing, which no operation tells of.
        alive = [*(s for ref in self._storages.values() if (s := ref()) is not None), *seen]
        self._storages = {s._cdata: weakref.ref(s) for s in alive}
        self.peak = max(self.peak, sum({s._cdata: s.nbytes() for s in alive}.values()))

    @staticmethod
    def _is_upload(name: str, args: tuple, kwargs: dict, result: Any) -> bool:
        """Whether it copies pinned memory to the device and does not wait."""
        if _plain(name) not in ("to", "_to_copy", "copy_") or not result.is_cuda:
            return False
        source, told = (args[1], args[2:]) if _plain(name) == "copy_" else (args[0], args[1:])
        return _is_pinned(source) and (kwargs.get("non_blocking", False) or True in told[:1])


def _is_view(op: Any, args: tuple, result: Any) -> bool:
    """Whether the result is a view of the argument. For reshape, to and contiguous that depends on the arguments."""
    if not op.is_view or not isinstance(result, Tensor):
        return op.is_view
    return result.untyped_storage()._cdata == args[0].untyped_storage()._cdata


def _plain(name: str) -> str:
    """ "aten::mul.Tensor" is mul."""
    return name.split("::")[1].split(".")[0]
