"""Masters' gradient sums and casts: equal to autograd's gradients, and in the dtype asked for."""

import pytest
import tiny
import torch
from torch import nn

from nanoredi.cpu.masters import cast, kept_sum, make_master
from nanoredi.kernels import embedding, linear, rms_norm, weighted_cross_entropy
from nanoredi.kernels.dispatch import drop_gradient
from nanoredi.trainer.optimizer import AdamW


def two_losses(model, dtype, level="off"):
    """The gradients of two micro-batches, one through the loss and one through the log-probs."""
    model.compute_dtype = dtype
    for block in model.model.layers:
        block.activation_checkpointing = level
    ids, *where = tiny.packed(tiny.sequences())
    weights = torch.linspace(-1, 1, len(ids))
    model.loss(ids, *where, ids.roll(-1), weights)[0].backward()
    model.logprobs(ids.roll(-1), torch.arange(len(ids)), torch.zeros(len(ids)), ids, *where).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("level", ["off", "attention", "products"])
def test_sums_are_the_gradients_that_autograd_adds_up(tied, dtype, level):
    want = two_losses(tiny.tiny_model(tied), dtype)
    model = tiny.tiny_model(tied)
    for p in model.parameters():
        make_master(p)
    sums = {name: p.grad for name, p in model.named_parameters()}
    got = two_losses(model, dtype, level)
    for name, p in model.named_parameters():
        assert got[name] is sums[name] and p.grad.dtype == torch.float32
        # In bf16 the embedding's gradient is summed in another order.
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4 * want[name].abs().max().item())
    for p in model.parameters():
        drop_gradient(p)
    assert all(p.grad is sums[name] and not p.grad.any() for name, p in model.named_parameters())


def test_a_parameter_that_is_no_master_drops_its_gradient():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    assert kept_sum(p) is None
    drop_gradient(p)
    assert p.grad is None


def test_a_copy_lasts_until_the_master_changes():
    p = nn.Parameter(torch.rand(5))
    assert cast(p, torch.float32) is p
    assert cast(p, torch.bfloat16) is not cast(p, torch.bfloat16)
    make_master(p)
    copy = cast(p, torch.bfloat16)
    assert cast(p, torch.bfloat16) is copy
    with torch.no_grad():
        p.add_(1)
    assert torch.equal(cast(p, torch.bfloat16), p.detach().bfloat16())


def test_the_loss_of_a_master_has_a_gradient_of_1():
    hidden, head = torch.rand(4, 3), nn.Parameter(torch.rand(7, 3))
    make_master(head)
    loss, _ = weighted_cross_entropy(hidden, head, torch.arange(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="must be 1"):
        (2 * loss).backward()


def test_gradients_of_a_repeated_token_add_up():
    weight = nn.Parameter(torch.rand(4, 2))
    make_master(weight)
    embedding(torch.tensor([3, 1, 3]), weight).sum().backward()
    assert weight.grad.tolist() == [[0, 0], [1, 1], [0, 0], [2, 2]]


def test_under_no_grad_nothing_is_added():
    weight, norm = nn.Parameter(torch.rand(4, 4)), nn.Parameter(torch.rand(4))
    make_master(weight)
    make_master(norm)
    with torch.no_grad():
        _, x = rms_norm(embedding(torch.tensor([3, 1]), weight), norm, 1e-6)
        weighted_cross_entropy(linear(x, weight), weight, torch.tensor([0, 1]), torch.ones(2))
    assert not weight.grad.any() and not norm.grad.any()


def test_a_copy_follows_the_optimiser():
    """Steps of AdamW that are large enough to be seen in bf16."""
    model = tiny.tiny_model(tied=True)
    for p in model.parameters():
        make_master(p)
    optimizer = AdamW(model, lr=0.1, weight_decay=0.0)
    for _ in range(2):
        before = [cast(p, torch.bfloat16).clone() for p in model.parameters()]
        two_losses(model, torch.bfloat16)
        optimizer.step(torch.tensor(1.0), 1.0, torch.tensor(0.0))
        for p, old in zip(model.parameters(), before):
            assert torch.equal(cast(p, torch.bfloat16), p.detach().bfloat16()) and not torch.equal(p.bfloat16(), old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_masters_is_training_without(dtype):
    """The losses of some large steps; a stale copy of any weight would lead elsewhere."""

    def losses(masters):
        model = tiny.tiny_model(tied=True)
        model.compute_dtype = dtype
        for p in model.parameters() if masters else ():
            make_master(p)
        optimizer = AdamW(model, lr=0.02, weight_decay=0.0)
        ids, *where = tiny.packed(tiny.sequences())
        for _ in range(6):
            loss, _ = model.loss(ids, *where, ids.roll(-1), torch.full((len(ids),), -1 / len(ids)))
            loss.backward()
            optimizer.step(torch.tensor(1.0), 1.0, torch.tensor(0.0))
            yield loss.item()

    got, want = (torch.tensor(list(losses(masters))) for masters in (True, False))
    assert want[-1] < want[0] / 2
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)
