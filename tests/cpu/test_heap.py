"""Free memory is returned to the system after steps of large models and kept after those of small ones, if the C library
can do so."""

import ctypes
import resource

import pytest
import torch

from nanoredi.cpu import heap
from nanoredi.kernels.dispatch import after_step


@pytest.mark.parametrize(
    "large, in_c, num_steps, num_micro_batches, is_given",
    [
        (True, False, 5, 4, True),
        (False, False, 5, 4, False),
        (True, True, 7, 4, False),
        (True, True, 8, 4, True),
        (True, True, 7, 40, True),
    ],
)
def test_free_memory_goes_back_for_a_large_model(large, in_c, num_steps, num_micro_batches, is_given, monkeypatch):
    """At each step, or once in 32 micro-batches if oneDNN computes no products."""
    pads = []

    class Library:
        malloc_trim = staticmethod(pads.append)
        mallopt = staticmethod(lambda *_: 1)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(heap, "library", lambda name, dtype: object() if in_c else None)
    after_step(torch.tensor(num_steps), num_micro_batches, heap._SMALL + large, torch.bfloat16)
    assert pads == ([0] if is_given else [])


def test_free_memory_stays_for_a_small_model(monkeypatch):
    """Once the heap has grown, memory that a step allocates and frees causes no page faults in the next one."""
    heap._keep.cache_clear()
    accepted = []
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        pytest.skip("the C library is not glibc")

    class Library:
        mallopt = staticmethod(lambda *arguments: accepted.append(library.mallopt(*arguments)))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    for _ in range(2):
        after_step(torch.tensor(1), 1, heap._SMALL, torch.float32)
    assert accepted == [1, 1]
    faults = []
    for _ in range(15):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(1 << 23) for _ in range(2)]
        del tensors
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[8:]) < 100, faults


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap._keep.cache_clear()
    for large in (False, True):
        heap.give_back(torch.tensor(1), 1, heap._SMALL + large, torch.float32)
