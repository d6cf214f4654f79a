"""That free memory goes back to the system: of large models, where the C library can."""

import ctypes

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
def test_it_is_given_back_for_a_large_model(large, in_c, num_steps, num_micro_batches, is_given, monkeypatch):
    """At each step, or where oneDNN makes no products once in 32 micro-batches."""
    pads = []

    class Library:
        malloc_trim = staticmethod(pads.append)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(heap, "library", lambda name, dtype: object() if in_c else None)
    after_step(torch.tensor(num_steps), num_micro_batches, heap._SMALL + large, torch.bfloat16)
    assert pads == ([0] if is_given else [])


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap.give_back(torch.tensor(1), 1, heap._SMALL + 1, torch.float32)
