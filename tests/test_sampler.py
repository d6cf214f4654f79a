"""Sampling: greedy equals no cache, samples do not depend on the batch, frequencies are the distribution's."""

import math

import pytest
import tiny
import torch

from nanoredi.config import SamplingConfig
from nanoredi.draw import choose, uniform
from nanoredi.errors import UserError
from nanoredi.sampler import Request, Sampler, requests_for

PROMPTS = [ids.tolist() for ids in tiny.sequences()]


def complete(requests, stop_ids=(), **settings):
    """The finished requests, in the order they were given."""
    sampler = Sampler(
        tiny.tiny_model(tied=True), list(stop_ids), SamplingConfig(**{"max_tokens": 20, "dtype": "float32", **settings})
    )
    assert len(list(sampler.run(requests))) == len(requests)
    return requests


def greedy_without_cache(prompt, max_tokens, stop_ids=()):
    model, tokens = tiny.tiny_model(tied=True), list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        with torch.no_grad():
            hidden = model(*tiny.packed([torch.tensor(tokens)]))[-1]
        token = int((model.lm_head_weight @ hidden).argmax())
        if token in stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_equals_decoding_without_a_cache(batch_size):
    # Prompts of 2 to 30 tokens; with 3 rows for 8 requests, finished rows are replaced by waiting ones, and rows move.
    requests = [Request(prompt) for prompt in PROMPTS * 2]
    for request in complete(requests, temperature=0.0, batch_size=batch_size):
        assert request.tokens == greedy_without_cache(request.prompt, 20)
        assert request.finish_reason == "length"


def test_stop_tokens_end_a_row_and_are_not_part_of_it():
    free = [greedy_without_cache(p, 20) for p in PROMPTS]
    stops = {free[0][4], free[3][0]}
    for request in complete([Request(p) for p in PROMPTS], stops, temperature=0.0, batch_size=2):
        assert request.tokens == greedy_without_cache(request.prompt, 20, stops)
        assert request.finish_reason == ("stop" if len(request.tokens) < 20 else "length")
    assert not complete([Request(PROMPTS[3])], stops, temperature=0.0)[0].tokens


def test_the_context_ends_a_row():
    prompt = PROMPTS[3] * 2  # 60 of 64 tokens
    request = complete([Request(prompt)], temperature=0.0)[0]
    assert (len(request.tokens), request.finish_reason) == (4, "length")
    with pytest.raises(UserError, match="a prompt has 64 tokens with its template and fills the context of 64"):
        complete([Request(prompt + [1, 2, 3, 4])])


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7}, {"top_k": 5}, {"top_p": 1.0, "temperature": 1.5}])
def test_a_sample_does_not_depend_on_its_batch_or_the_order(settings):
    def samples(prompts, batch_size):
        requests = complete(requests_for(prompts, n=3, seed=5), stop_ids=[7, 8], batch_size=batch_size, **settings)
        return {(tuple(r.prompt), r.sample): r.tokens for r in requests}

    alone = {}
    for prompt in PROMPTS:
        alone |= samples([prompt], 1)
    assert samples(PROMPTS, 64) == samples(PROMPTS[::-1], 5) == alone
    assert len(set(map(tuple, alone.values()))) == 12


def test_seeds_samples_and_repeated_prompts_differ():
    keys = [r.key for seed in (1, 2) for r in requests_for([[1, 2], [1, 2], [1, 3]], n=2, seed=seed)]
    assert len(set(keys)) == 12
    assert [r.key for r in requests_for([[1, 2]], n=4, seed=1)] == [
        r.key for r in requests_for([[1, 2], [1, 2]], n=2, seed=1)
    ]


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
    uniforms = uniform(torch.arange(n) * 7919, torch.full((n,), 3))
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


def test_a_flat_distribution_wider_than_the_first_guess():
    logits = torch.zeros(2, 5000)
    drawn = choose(logits.expand(2, -1), torch.tensor([0.0, 0.999999]), 1.0, 0.9, 0)
    assert len(set(drawn.tolist())) == 2
    many = choose(
        torch.zeros(4000, 1000), uniform(torch.arange(4000), torch.zeros(4000, dtype=torch.int64)), 1.0, 0.5, 0
    )
    assert 480 < len(many.unique()) <= 500


def test_uniforms_are_uniform_and_keyed():
    u = uniform(torch.arange(-50_000, 50_000), torch.zeros(100_000, dtype=torch.int64))
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.002
    steps = uniform(torch.full((1000,), 5), torch.arange(1000))
    assert len(steps.unique()) == 1000 and abs(torch.corrcoef(torch.stack((steps[1:], steps[:-1])))[0, 1]) < 0.1
    # SplitMix64 from the seed 1234567, first output 6457827717110365317 (the generator's published test values).
    assert uniform(torch.tensor([1234567]), torch.tensor([0])).item() == (6457827717110365317 >> 11) / 2**53
