"""That free memory goes back to the system at the right two moments, and no others."""

import ctypes

import pytest
import tiny
import torch

from nanoredi import heap
from nanoredi import model as model_module


@pytest.mark.parametrize("large", [True, False])
def test_it_is_given_back_before_the_vocabularys_gradients(large, monkeypatch):
    events = []

    class Library:
        @staticmethod
        def malloc_trim(pad):
            # The blocks' gradients come after the head's, and before the embedding's.
            done = sum(p.grad is not None for p in model.model.layers[0].parameters())
            events.append(f"trim, {done} gradients")

    def loss(*args):
        events.append("loss")
        return plain(*args)

    plain = model_module.weighted_cross_entropy
    monkeypatch.setattr(model_module, "weighted_cross_entropy", loss)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    model = tiny.tiny_model(tied=True)
    monkeypatch.setattr(heap, "_MAPPED_APART", 4 * model.lm_head_weight.numel() + (not large))
    heap.trim_before_peaks(model)
    ids, *where = tiny.packed(tiny.sequences())
    with torch.no_grad():
        model(ids, *where)
    assert not events
    model.loss(ids, *where, ids, torch.ones(len(ids)))[0].backward()
    num = len(list(model.model.layers[0].parameters()))
    assert events == (["trim, 0 gradients", "loss", f"trim, {num} gradients"] if large else ["loss"])


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(heap, "_MAPPED_APART", 0)
    model = tiny.tiny_model(tied=True)
    heap.trim_before_peaks(model)
    assert not any(module._forward_hooks for module in model.modules())
