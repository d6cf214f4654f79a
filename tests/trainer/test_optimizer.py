"""AdamW against torch's own class, and the learning rate's schedule."""

import copy

import pytest
import torch
from conftest import ROOT
from forks import ended
from tiny import tiny_model

from nanoredi.trainer.optimizer import AdamW, gradient_square, schedule


def test_adamw_is_torch_s_bit_for_bit_with_clipping_and_a_skipped_step(version):
    ours = tiny_model(tied=True)
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours, 1e-2, 0.1)
    oracle = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for number, (lr, size, skip) in enumerate([(1e-2, 1e-3, 0), (3e-3, 1.0, 0), (1e-2, 1.0, 1), (2e-3, 0.1, 0)]):
        before = copy.deepcopy(ours)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = size * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        if skip:
            next(ours.parameters()).grad[0, 0] = torch.nan
        norm = gradient_square(ours).sqrt()
        optimizer.lr = oracle.param_groups[0]["lr"] = lr
        optimizer.step(norm, 1.0, torch.tensor(float(skip)))
        assert all(p.grad is None for p in ours.parameters())
        if not skip:
            assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item() == pytest.approx(norm.item())
            oracle.step()
            moved = [(a.double() - b.double()).square().sum() for a, b in zip(ours.parameters(), before.parameters())]
            assert optimizer.update_square().item() == pytest.approx(sum(moved).item(), rel=1e-4)
        assert {int(t) for t in optimizer.num_steps} == {[1, 2, 2, 3][number]}
        for p, q, m, v in zip(ours.parameters(), theirs.parameters(), optimizer.exp_avg, optimizer.exp_avg_sq):
            assert torch.equal(p, q)
            assert torch.equal(m, oracle.state[q]["exp_avg"]) and torch.equal(v, oracle.state[q]["exp_avg_sq"])


def test_the_size_of_an_update_of_a_bf16_model():
    model = tiny_model(tied=True).bfloat16()
    optimizer = AdamW(model, 1e-2, 0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
    optimizer.step(torch.tensor(1.0), 1.0, torch.tensor(0.0))
    # A first step's moments are (1 - b1) g and (1 - b2) g^2: it is the rate long in every number, but for eps.
    want = 1e-2**2 * sum(p.numel() for p in model.parameters())
    assert optimizer.update_square().item() == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(
    "total, warmup, want",
    [
        (10, 0.2, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (4, 0.0, [1.0, 0.75, 0.5, 0.25]),
        (1, 0.1, [1.0]),
        (2, 1.0, [0.5, 1.0]),
    ],
)
def test_schedule(total, warmup, want):
    assert [schedule(step, total, warmup) for step in range(total)] == pytest.approx(want)


def test_training_on_a_cpu_imports_no_compiler(toy_data, forks, tmp_path):
    """It takes 0.1 GB and a second of every start; torch's own optimizers and activation checkpointing import it."""
    words = "--recipe toy --max_steps 2 --save_every 1 --batch_size 4 --evaluate false --dtype float32 --out run"
    flags = [*words.split(), "--activation_checkpointing", "attention"]
    flags += ["--model", toy_data / "model", "--data", toy_data / "pairs.jsonl"]
    done = ended(forks.start(tmp_path, "tests/no_compiler.py", ROOT / "train_redi.py", *flags))
    assert done.returncode == 0, done.stderr
