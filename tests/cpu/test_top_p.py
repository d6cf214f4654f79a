"""The histogram against the full sort of the plain version, rows that are no distribution included."""

import pytest
import torch

from nanoredi.cpu import top_p
from nanoredi.kernels.top_p import keep, keep_likeliest


@pytest.mark.parametrize("enough, by_mass", [(0.95, True), (1e-9, True), (0.999999, True), (1, False), (7, False)])
@pytest.mark.parametrize("size", [41, 300, 20_000])
def test_the_histogram_keeps_what_the_sort_does(size, enough, by_mass, monkeypatch):
    monkeypatch.setattr(top_p, "_FEW", 0)
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(7, size, generator=generator) * torch.tensor([0.0, 0.1, 0.8, 3, 10, 40, 2])[:, None]
    logits[6] = logits[6].round()
    logits[5, size // 2 :] = -torch.inf
    probs = logits.softmax(-1)
    got = keep_likeliest(probs, enough, by_mass)
    monkeypatch.setattr(keep, "faster", {})
    assert torch.equal(got, keep_likeliest(probs, enough, by_mass))


def test_a_row_of_nan_leaves_the_others_alone(monkeypatch):
    monkeypatch.setattr(top_p, "_FEW", 0)
    probs = torch.rand(3, 300, generator=torch.Generator().manual_seed(0))
    want = keep_likeliest(probs, 0.5, True)
    probs[1] = torch.nan
    assert torch.equal(keep_likeliest(probs, 0.5, True)[::2], want[::2])


def test_fewer_likely_tokens_than_top_p_asks_for(monkeypatch):
    monkeypatch.setattr(top_p, "_FEW", 0)
    probs = torch.zeros(1, 300)
    probs[0, [3, 7]] = 0.5
    assert torch.equal(keep_likeliest(probs, 50, by_mass=False), probs)
