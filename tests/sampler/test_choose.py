"""Drawing tokens: what top-k and top-p keep, exactly; frequencies; the uniform numbers."""

import math

import numpy as np
import pytest
import torch
from conftest import DEVICE, use_triton

from nanoredi.kernels import dispatch, top_p
from nanoredi.sampler.choose import _draw, choose, uniform


def by_sorting(probs, share, by_mass):
    """Which tokens (B, V) are kept, by a full stable sort in float64."""
    order = probs.double().argsort(dim=1, descending=True, stable=True)
    p = probs.double().gather(1, order)
    before = p.cumsum(1) - p
    kept = (
        before < share * (1 - 1e-12) * p.sum(1, keepdim=True)
        if by_mass
        else (torch.arange(p.shape[1]) < share) & (p > 0)
    )
    return torch.zeros_like(kept).scatter_(1, order, kept)


def rows(size):
    """Flat, peaked, and steep rows; rows with many equal values, with zeros, and with one token that has all."""
    g = torch.Generator().manual_seed(size)
    logits = torch.randn(9, size, generator=g) * torch.tensor([0.1, 0.8, 3, 10, 40, 2, 2, 1, 0])[:, None]
    logits[5] = logits[5].round()
    logits[6, size // 2 :] = -torch.inf
    logits[7, 3] = 1000.0
    return logits.softmax(-1)


@pytest.mark.parametrize(
    "enough, by_mass", [(0.95, True), (0.5, True), (1e-9, True), (0.999999, True), (1, False), (7, False)]
)
@pytest.mark.parametrize("size", [41, 300, 20_000])
def test_the_kept_tokens_are_those_of_a_full_sort(size, enough, by_mass, version, monkeypatch):
    probs = rows(size)
    want = torch.where(by_sorting(probs, enough, by_mass), probs, 0.0)
    assert torch.equal(top_p.keep_likeliest(probs, enough, by_mass), want)
    if version == "fastest" and size < 1000 and enough in (0.95, 1e-9, 7):
        use_triton(monkeypatch, top_p.keep)
        monkeypatch.setattr(top_p, "_BLOCK", 256)
        assert torch.equal(top_p.keep_likeliest(probs.to(DEVICE), enough, by_mass).cpu(), want)


@pytest.mark.parametrize("size, triton", [(300, False), (300, True), (20_000, False)])
def test_fewer_likely_tokens_than_top_p_asks_for(size, triton, monkeypatch):
    if triton:
        use_triton(monkeypatch, top_p.keep)
    probs = torch.zeros(1, size, device=DEVICE if triton else "cpu")
    probs[0, [3, 7]] = 0.5
    assert torch.equal(top_p.keep_likeliest(probs, 50, by_mass=False), probs)


def expected(probs, top_p, top_k):
    """The exact distribution after top-k, then top-p, by a full sort in float64."""
    order = probs.argsort(descending=True)
    kept = order[: top_k or len(order)]
    p = probs[kept] / probs[kept].sum()
    size = int((p.cumsum(0) < top_p - 1e-12).sum()) + 1
    out = torch.zeros_like(probs)
    out[kept[:size]] = p[:size] / p[:size].sum()
    return out


@pytest.mark.parametrize(
    "temperature, top_p, top_k",
    [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.3, 0.95, 7), (1.0, 1.0, 4), (0.7, 0.999, 0)],
)
def test_frequencies_pass_a_chi_squared_test(temperature, top_p, top_k):
    n, logits = 100_000, torch.randn(200, generator=torch.Generator().manual_seed(1)) * 2
    want = expected((logits.double() / temperature).softmax(-1), top_p, top_k)
    uniforms = torch.from_numpy(uniform(np.arange(n) * 7919, np.full(n, 3)))
    drawn = torch.cat([choose(logits.expand(len(u), -1), u, temperature, top_p, top_k) for u in uniforms.split(5000)])
    seen = torch.bincount(drawn, minlength=200).double()
    assert not seen[want == 0].any()
    # Cells expected less than 10 times count together.
    rare = (want * n < 10) & (want > 0)
    cells = [(seen[i], want[i] * n) for i in torch.where((want > 0) & ~rare)[0]] + (
        [(seen[rare].sum(), want[rare].sum() * n)] if rare.any() else []
    )
    chi = sum((o - e) ** 2 / e for o, e in cells if e > 0).item()
    freedom = len(cells) - 1
    # Wilson and Hilferty's normal approximation; 4 sigma.
    assert not freedom or ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)) < 4


def test_equal_tokens_are_kept_from_the_left():
    uniforms = torch.from_numpy(uniform(np.arange(4000), np.zeros(4000, dtype=np.int64)))
    drawn = choose(torch.zeros(4000, 1000), uniforms, 1.0, 0.5, 0)
    assert drawn.max() == 499 and len(drawn.unique()) == 500
    assert choose(torch.zeros(4000, 1000), uniforms, 1.0, 1.0, 5).unique().tolist() == [0, 1, 2, 3, 4]


def test_the_largest_uniform_draws_a_kept_token():
    u = torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)
    for size in (3, 300, 20_000):
        logits = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
        kept = by_sorting((logits / 0.6).softmax(-1), 0.9, True)
        assert kept.gather(1, choose(logits, u, 0.6, 0.9, 0)[:, None]).all()


def test_uniforms_are_uniform_and_keyed():
    u = uniform(np.arange(-50_000, 50_000), np.zeros(100_000, dtype=np.int64))
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.002
    steps = uniform(np.full(1000, 5), np.arange(1000))
    assert len(np.unique(steps)) == 1000 and abs(np.corrcoef(steps[1:], steps[:-1])[0, 1]) < 0.1
    # SplitMix64 from the seed 1234567, first output 6457827717110365317 (the generator's published test values).
    assert uniform(np.array([1234567]), np.array([0])).item() == (6457827717110365317 >> 11) / 2**53


@pytest.mark.parametrize("temperature, top_p, top_k", [(0, 1.0, 0), (0.6, 1.0, 0), (0.6, 0.9, 0), (0.6, 0.9, 5)])
@pytest.mark.parametrize("size", [41, 20_000])
def test_a_row_that_is_no_distribution_has_no_token(size, temperature, top_p, top_k):
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(0))
    uniforms = torch.linspace(0, 0.999, 6, dtype=torch.float64)
    whole = choose(logits, uniforms, temperature, top_p, top_k)
    logits[1, 5], logits[2, 0], logits[4] = torch.nan, torch.inf, -torch.inf
    logits[3, 7] = -torch.inf  # a token that cannot come is none
    logits[3, whole[3]] += 1
    tokens = choose(logits, uniforms, temperature, top_p, top_k)
    assert tokens[[1, 2, 4]].tolist() == [-1, -1, -1]
    assert torch.equal(tokens[[0, 5]], whole[[0, 5]]) and 0 <= tokens[3] < size


def test_the_device_s_way_of_drawing_survives_a_row_that_is_no_distribution():
    """There it would end in an assertion that no program survives."""
    probs = torch.full((2, 300), torch.nan)
    if dispatch.triton is None:
        pytest.skip("Triton is not installed")
    needed = torch.full((2, 1), torch.nan, dtype=torch.float64, device=DEVICE)
    kept = top_p.keep.faster["cuda"](probs.to(DEVICE), needed, True)
    _draw(kept, torch.tensor([0.0, 0.9], dtype=torch.float64, device=DEVICE))
    _draw(probs, torch.tensor([0.0, 0.9], dtype=torch.float64))
