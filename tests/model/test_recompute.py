"""Activation checkpointing by itself; what blocks do with it is in test_model.py."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from nanoredi.model.recompute import recomputed

torch.manual_seed(0)
WEIGHTS = [torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def run(x, scale):
    """Two products, one saved on the way by what follows it, one not, and two operations with several results."""
    top, _ = (x @ WEIGHTS[0]).topk(4)
    halves = F.silu(top * scale).split(2, dim=-1)
    return F.pad(halves[0] * halves[1], (2, 2)) @ WEIGHTS[1]


def none(name, *args):
    return False


def some(name, *args):
    return name in ("aten::mm", "aten::topk")


@pytest.mark.parametrize("keeps", [none, some])
def test_gradients_are_those_of_everything_kept(keeps):
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out, want = recomputed(run, keeps, x, 3.0), run(x, 3.0)
    assert torch.equal(out, want)
    for twice in (True, False):  # a graph may be gone through again
        got = torch.autograd.grad(out.square().sum(), [x, *WEIGHTS], retain_graph=twice)
        plain = torch.autograd.grad(want.square().sum(), [x, *WEIGHTS], retain_graph=twice)
        assert all(map(torch.equal, got, plain))


def test_the_second_run_ends_with_the_last_tensor_that_was_saved():
    seen = []

    def keeps(name, *args):
        seen.append(name)
        return False

    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out = recomputed(run, keeps, x, 3.0)
    assert [name for name in seen if some(name)] == ["aten::mm", "aten::topk", "aten::mm"]
    seen.clear()
    torch.autograd.grad(out.sum(), x)
    assert [name for name in seen if some(name)] == ["aten::mm", "aten::topk"]


def test_nothing_outlives_its_graph():
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
            middle = torch.exp(x)
            alive = weakref.ref(middle)
            out = recomputed(run, some, middle, 3.0)
            if backward:
                out.sum().backward()
            del middle, out
            assert alive() is None
    finally:
        gc.enable()
