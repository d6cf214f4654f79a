"""Activation checkpointing on its own; blocks with it are tested in test_model.py."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from nanoredi.model.recompute import recomputed

torch.manual_seed(0)
WEIGHTS = [torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def run(x, scale):
    """Two products, one before the last saved tensor and one after it, and two operations with several results."""
    top, _ = (x @ WEIGHTS[0]).topk(4)
    halves = F.silu(top * scale).split(2, dim=-1)
    return F.pad(halves[0] * halves[1], (2, 2)) @ WEIGHTS[1]


SOME = ("aten::mm", "aten::topk")


@pytest.mark.parametrize("kept", [(), SOME])
def test_gradients_equal_those_without_recomputation(kept):
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out, want = recomputed(run, kept, x, 3.0), run(x, 3.0)
    assert torch.equal(out, want)
    for twice in (True, False):  # backward may run twice through a graph
        got = torch.autograd.grad(out.square().sum(), [x, *WEIGHTS], retain_graph=twice)
        plain = torch.autograd.grad(want.square().sum(), [x, *WEIGHTS], retain_graph=twice)
        assert all(map(torch.equal, got, plain))


def test_recomputation_ends_with_the_last_saved_tensor():
    seen = []

    class Seen(tuple):
        def __contains__(self, name):
            seen.append(name)
            return False

    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out = recomputed(run, Seen(), x, 3.0)
    assert [name for name in seen if name in SOME] == ["aten::mm", "aten::topk", "aten::mm"]
    seen.clear()
    torch.autograd.grad(out.sum(), x)
    assert [name for name in seen if name in SOME] == ["aten::mm", "aten::topk"]


def test_a_result_that_backward_does_not_need_is_freed():
    """The last product comes after the last saved tensor."""
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out = recomputed(run, SOME, x, 3.0)
    alive = weakref.ref(out.untyped_storage())
    loss = out.sum()
    del out
    gc.collect()
    assert alive() is None
    loss.backward()


def test_nothing_outlives_its_graph():
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
            middle = torch.exp(x)
            alive = weakref.ref(middle)
            out = recomputed(run, SOME, middle, 3.0)
            if backward:
                out.sum().backward()
            del middle, out
            assert alive() is None
    finally:
        gc.enable()
