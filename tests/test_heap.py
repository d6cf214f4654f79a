"""That free memory goes back to the system: of large models, where the C library can."""

import ctypes

import pytest
import tiny

from nanoredi import heap


@pytest.mark.parametrize("large", [True, False])
def test_it_is_given_back_for_a_large_model(large, monkeypatch):
    pads = []

    class Library:
        malloc_trim = staticmethod(pads.append)

    model = tiny.tiny_model(tied=True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(heap, "_SMALL", sum(p.numel() for p in model.parameters()) - large)
    heap.give_back(model)
    assert pads == ([0] if large else [])


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(heap, "_SMALL", 0)
    heap.give_back(tiny.tiny_model(tied=True))
