"""That free memory goes back to the system: of large models, where the C library can."""

import ctypes

import pytest
import tiny

from nanoredi.cpu import heap


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

    model = tiny.tiny_model(tied=True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(heap, "made_in_c", lambda dtype: in_c)
    monkeypatch.setattr(heap, "_SMALL", sum(p.numel() for p in model.parameters()) - large)
    heap.give_back(model, num_steps, num_micro_batches)
    assert pads == ([0] if is_given else [])


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(heap, "_SMALL", 0)
    heap.give_back(tiny.tiny_model(tied=True), 1, 1)
