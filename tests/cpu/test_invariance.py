"""A sample is the same, bit for bit, whatever else is in its batch and however the work is divided."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pool import pool_of, rows_of

from nanoredi.config import SamplingConfig
from nanoredi.cpu import decode, native
from nanoredi.kernels.dispatch import prepare_for_sampling
from nanoredi.kernels.layers import linear
from nanoredi.kernels.paged_attention import paged_decode
from nanoredi.model.config import Qwen2Config
from nanoredi.model.qwen2 import Qwen2
from nanoredi.sampler import sampler
from nanoredi.sampler.sampler import Sampler
from nanoredi.sampler.scheduler import requests_for

RNG = np.random.default_rng(3)
HEAD = RNG.integers(0, 97, 70).tolist()
PROMPTS = [HEAD + RNG.integers(0, 97, n).tolist() for n in (3, 90, 41)] + [RNG.integers(0, 97, 130).tolist()]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}


@pytest.fixture(scope="module")
def model():
    config = Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3)
    return lambda dtype: Qwen2(config).init_weights(1).to(getattr(torch, dtype)).pack()


def tokens_of(model, dtype, prompts=PROMPTS, change=lambda sampler: None, **settings):
    config = SamplingConfig(**{"max_tokens": 24, "temperature": 1.0, "dtype": dtype, "batch_size": 64, **settings})
    one = Sampler(model(dtype), [], config)
    change(one)
    done = one.run(requests_for(prompts, 3, 0))
    return {(tuple(request.prompt), request.sample): request.tokens for request in done}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_are_the_same_bit_for_bit(model, dtype, monkeypatch):
    want = tokens_of(model, dtype)
    assert tokens_of(model, dtype, batch_size=1) == want
    assert {k: v for prompt in PROMPTS for k, v in tokens_of(model, dtype, [prompt]).items()} == want
    a_page = 2 * 2 * 2 * 16 * 32 * (4 if dtype == "float32" else 2)
    assert tokens_of(model, dtype, cache_gb=12 * a_page / 1e9) == want  # rows are preempted
    monkeypatch.setattr(sampler, "_PREFILL_TOKENS", 7)
    assert tokens_of(model, dtype) == want


def test_full_batches_and_resampled_rows(model, monkeypatch):
    """A GPU's scheduling, with the CPU's products."""
    preempted, shown = [], []

    def as_on_a_gpu(one):
        one.full_size = one.scheduler.resample = True
        preempt = one.scheduler.preempt
        one.scheduler.preempt = lambda: (preempt(), preempted.append(len(one.scheduler.waiting[0].tokens)))
        seen = one.model.hidden_states
        monkeypatch.setattr(one.model, "hidden_states", lambda ids, *more: shown.append(len(ids)) or seen(ids, *more))

    want = tokens_of(model, "float32", batch_size=8)
    a_page = 2 * 2 * 2 * 16 * 32 * 4
    assert tokens_of(model, "float32", change=as_on_a_gpu, batch_size=8, cache_gb=12 * a_page / 1e9) == want
    assert max(preempted) > 0 and set(shown) == {8, sampler._PREFILL_TOKENS}


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_attends_the_same_alone_and_beside_longer_ones(in_c, dtype, monkeypatch):
    monkeypatch.setattr(decode, "_SPAN", 32)
    if not in_c:
        monkeypatch.setattr(native, "compiled", lambda *_, **__: None)
    lengths = [5, 31, 100, 700]
    rows = rows_of(lengths, 2, 32)
    keys, values, table = pool_of(rows, 16)
    q = torch.randn(len(rows), 6, 32, generator=torch.Generator().manual_seed(1))
    q, keys, values, lengths = q.to(dtype), keys.to(dtype), values.to(dtype), torch.tensor(lengths)
    together = paged_decode(q, keys, values, table, lengths)
    for b in range(len(rows)):
        alone = paged_decode(q[b : b + 1], keys, values, table[b : b + 1], lengths[b : b + 1])
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, out", [(96, 288), (896, 128), (1536, 576), (1536, 8960), (4864, 896)])
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype, size, out):
    """What invariance relies on, for this machine's processor and libraries."""
    on_a_cpu = SimpleNamespace(full_size=False, device=torch.device("cpu"))
    assert Sampler._num_padding(on_a_cpu, 1, 64) == 1  # because a single row is multiplied by other code

    g = torch.Generator().manual_seed(1)
    weight = prepare_for_sampling((torch.randn(out, size, generator=g) / size**0.5).to(dtype), True)
    x = torch.randn(192, size, generator=g).to(dtype)
    with torch.no_grad():
        want = linear(x, weight)
        for n in (2, 3, 4, 8, 24, 64, 128):
            assert torch.equal(linear(x[-n:].contiguous(), weight), want[-n:])
