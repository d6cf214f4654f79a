"""Sampling: greedy equals transformers and no cache; samples depend on nothing but their prompt, number and seed."""

import numpy as np
import pytest
import tiny
import torch
from conftest import DEVICE, ROOT, use_triton
from forks import ended

from nanoredi.common.errors import UserError
from nanoredi.config import SamplingConfig
from nanoredi.cuda import graphs
from nanoredi.cuda.graphs import Graphs
from nanoredi.kernels import dispatch, paged_attention
from nanoredi.kernels.paged_attention import paged_decode
from nanoredi.kernels.top_p import keep
from nanoredi.sampler import sampler
from nanoredi.sampler.pages import Pages
from nanoredi.sampler.sampler import Sampler
from nanoredi.sampler.scheduler import Request, Scheduler, requests_for

PROMPTS = [ids.tolist() for ids in tiny.sequences()]


def complete(requests, stop_ids=(), **settings):
    """The finished requests, in the order they were given."""
    config = SamplingConfig(**{"max_tokens": 20, "dtype": "float32", **settings})
    sampler = Sampler(tiny.tiny_model(tied=True).pack(), list(stop_ids), config)
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


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_broken_weights_are_said(temperature):
    model = tiny.tiny_model(tied=True)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    whole = Sampler(model, [], SamplingConfig(max_tokens=20, dtype="float32", temperature=temperature))
    with pytest.raises(
        UserError, match="the model's logits over the temperature are not finite: its weights are broken"
    ):
        list(whole.run([Request(prompt) for prompt in PROMPTS]))


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
    once, twice = requests_for([[1, 2]], n=4, seed=1), requests_for([[1, 2], [1, 2]], n=2, seed=1)
    assert [(r.key, r.sample) for r in once] == [(r.key, r.sample) for r in twice]
    assert [r.sample for r in twice] == [0, 1, 2, 3]


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_equals_transformers_token_by_token(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny.tiny_model(tied)
    model.save_pretrained(tmp_path / "model")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    requests = [Request(p) for p in [*PROMPTS, PROMPTS[3][:16], PROMPTS[1] + PROMPTS[0], PROMPTS[3] + PROMPTS[1]]]
    settings = SamplingConfig(max_tokens=15, temperature=0.0, batch_size=4, page_size=8)
    assert len(list(Sampler(model, [], settings).run(requests))) == len(requests)
    for request in requests:
        ids = torch.tensor([request.prompt])
        want = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert request.tokens == want[0, len(request.prompt) :].tolist()


def samples(n=4, **settings):
    """The samples of prompts with a common head, by prompt and number."""
    head = PROMPTS[3][:17]
    prompts = [head + p for p in PROMPTS[:3]] + [PROMPTS[3], head[:16], PROMPTS[0][:1]]
    requests = requests_for(prompts, n=n, seed=5)
    complete(requests, stop_ids=[7, 8], **{"temperature": 1.0, "top_p": 0.9, "max_tokens": 16, **settings})
    return {(tuple(r.prompt), r.sample): (r.tokens, r.finish_reason) for r in requests}


@pytest.fixture(scope="module")
def plain_samples():
    return samples(batch_size=1, page_size=64)


@pytest.mark.parametrize(
    "batch_size, page_size, sharing",
    [(64, 16, True), (64, 16, False), (64, 256, True), (64, 256, False), (1, 16, False), (1, 256, True)],
)
def test_samples_do_not_depend_on_pages_batches_or_sharing(plain_samples, batch_size, page_size, sharing, monkeypatch):
    assert len({reason for _, reason in plain_samples.values()}) == 2
    if not sharing:
        monkeypatch.setattr(Pages, "find_prefix", lambda self, tokens: ([], None))
    assert samples(batch_size=batch_size, page_size=page_size) == plain_samples


@pytest.mark.parametrize("budget", [1, 7, 1000])
def test_samples_do_not_depend_on_preemption_or_the_size_of_chunks(plain_samples, budget, monkeypatch):
    preempted = []
    monkeypatch.setattr(
        Scheduler,
        "preempt",
        lambda self, preempt=Scheduler.preempt: (preempt(self), preempted.append(len(self.waiting[0].tokens))),
    )
    monkeypatch.setattr(sampler, "_PREFILL_TOKENS", budget)
    # 2 layers x 2 heads x 8 x (keys and values) x 4 bytes: room for 80 tokens in pages of 4; a row may need 54.
    assert samples(batch_size=8, page_size=4, cache_gb=80 * 256 / 1e9) == plain_samples
    assert len(preempted) > 5 and max(preempted) > 0


class Graph:
    """In place of a CUDA graph: a replay runs the step on what the static memory holds."""

    def __init__(self, one, num_rows, num_columns):
        self.static, self.tokens = torch.zeros(2, num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
        slots, uniforms = self.static[0], self.static[1].view(torch.float64)
        self.replay = lambda: self.tokens.copy_(one.advance(slots, uniforms, num_columns))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What a GPU does, on the CPU: steps with padding rows, and with few columns of the page table."""

    def decode(self, rows):
        slots, *given = np.array([(row.slot, row.request.key, row.num_sampled) for row in rows]).T
        for row in rows:
            row.num_cached += 1
        tokens = self.graphs(slots, sampler.uniform(*given), max(row.num_cached for row in rows))
        assert self.lengths[-1] == 0  # the padding row
        return rows, tokens[: len(rows)].clone(), None

    def capture(self, *size):
        graph = Graph(self, *size)
        return graph, graph.static, graph.tokens

    monkeypatch.setattr(Sampler, "_decode", decode)
    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setitem(dispatch.decode_graphs.faster, DEVICE.type, Graphs)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it simulates a GPU")
def test_samples_by_the_kernels_and_in_padded_batches(plain_samples, as_on_a_gpu, monkeypatch):
    use_triton(monkeypatch, paged_decode, keep)
    for module in (paged_attention, graphs):
        monkeypatch.setattr(module, "SPAN", 32)
    for key, (tokens, reason) in samples(n=1, batch_size=6, page_size=16, max_tokens=3).items():
        whole, _ = plain_samples[key]
        assert tokens == whole[:3] and (reason == "stop") == (len(whole) < 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a GPU")
@pytest.mark.parametrize("batch_size", [3, 8])
def test_graphs_on_a_gpu_equal_decoding_without_a_cache(batch_size):
    requests = [Request(prompt, max_tokens=n) for n, prompt in enumerate(PROMPTS * 4, start=5)]
    # Steps of the rows that there are: of several sizes, which have a graph each.
    settings = SamplingConfig(temperature=0.0, batch_size=batch_size, dtype="float32", batch_invariant=False)
    sampler = Sampler(tiny.tiny_model(tied=True).to("cuda"), [], settings)
    assert len(list(sampler.run(requests))) == len(requests)
    assert len(sampler.graphs.captured) > 1
    for request in requests:
        assert request.tokens == greedy_without_cache(request.prompt, request.max_tokens)


class Watched(list):
    """A stream that records its tokens, and stops at one of them."""

    def __init__(self, stop=None):
        super().__init__()
        self.stop, self.stopped, self.finished = stop, False, False

    def __bool__(self):
        return True

    def push(self, token):
        self.append(token)
        self.stopped = token == self.stop

    def finish(self):
        self.finished = True


def test_a_row_can_be_watched_as_it_grows_stopped_by_its_stream_and_ended():
    free = greedy_without_cache(PROMPTS[0], 9)
    assert free[2] not in free[:2]
    streams = [Watched(), Watched(stop=free[2]), Watched(), None]
    requests = [Request(PROMPTS[0], stream=stream) for stream in streams]
    one = Sampler(tiny.tiny_model(tied=True), [], SamplingConfig(max_tokens=9, temperature=0.0, dtype="float32"))
    one.add(requests)
    seen, ended = [], []
    while one.num_held:
        ended += one.step()
        seen.append(len(streams[0]))
        if len(streams[2]) == 5 and requests[2].finish_reason is None:
            one.end(requests[2])
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [r.tokens for r in requests] == [free, free[:3], free[:5], free]
    assert streams[:3] == [free, free[:3], free[:5]] and all(stream.finished for stream in streams[:3])
    assert [r.finish_reason for r in requests] == ["length", "stop", "stop", "length"]
    assert list(map(id, ended)) == [id(requests[i]) for i in (1, 0, 3)]  # who ends a request knows it


def test_one_token_is_the_fewest_that_a_request_may_get():
    (request,) = complete([Request(PROMPTS[0], max_tokens=1)], temperature=0.0)
    assert (request.tokens, request.finish_reason) == (greedy_without_cache(PROMPTS[0], 1), "length")
    with pytest.raises(UserError, match="a prompt may get no tokens: give a max_tokens of at least 1"):
        complete([Request(PROMPTS[0], max_tokens=0)])


def test_a_token_above_the_vocabulary_is_named():
    with pytest.raises(UserError, match="the 2nd has the token 97, outside the model's vocabulary of 97"):
        complete([Request([1]), Request([3, 97, 2], name="the 2nd")])


def test_memory_is_the_users_or_measured():
    model = tiny.tiny_model(tied=True)
    assert (
        Sampler(model, [], SamplingConfig(batch_size=5, page_size=16)).cache.num_pages == 5 * 4
    )  # all that it can use
    assert (
        Sampler(model, [], SamplingConfig(batch_size=5, page_size=16, cache_gb=3 * 16 * 256 / 1e9)).cache.num_pages == 3
    )
    with pytest.raises(UserError, match="has no room for a page of 16 tokens"):
        Sampler(model, [], SamplingConfig(page_size=16, cache_gb=1e-9))
    small = Sampler(model, [], SamplingConfig(page_size=16, cache_gb=32 * 256 / 1e9, max_tokens=20))
    with pytest.raises(UserError, match="may become 49 long; the cache has room for 32"):
        small.add([Request(PROMPTS[0]), Request(PROMPTS[3])])
    assert not small.num_held


@pytest.mark.parametrize(
    "tokens, given, rows",
    [
        (256 * 64, 0, 256),
        (10**6, 0, 256),
        (255 * 64, 0, 128),
        (127 * 64, 0, 64),
        (1, 0, 1),
        (1, 7, 7),
        (10**6, 300, 300),
    ],
)
def test_a_gpu_takes_256_rows_or_as_many_as_its_memory_has_room_for(tokens, given, rows, monkeypatch):
    monkeypatch.setattr(sampler, "PagedCache", lambda *sizes: sizes)
    model = tiny.tiny_model(tied=True)  # rows have room for 64 tokens, of 256 bytes each
    config = SamplingConfig(batch_size=given, page_size=1, cache_gb=(tokens + 0.5) * 256 / 1e9)
    sizes, got = sampler._cache(model, config, torch.device("cuda"))
    assert got == rows and sizes[0][1] == min(tokens, rows * 64)
    assert sampler._cache(model, SamplingConfig(cache_gb=1.0), torch.device("cuda"))[0][0][3] == 256
    assert sampler._cache(model, config, torch.device("cpu"))[1] == (given or 64)


def test_a_step_s_columns_are_those_of_a_power_of_two_of_spans(monkeypatch):
    monkeypatch.setattr(graphs, "SPAN", 16)
    one, other = (Graphs(torch.zeros(2), None, sizes, False) for sizes in ((1, 16, 4), (1, 10, 7)))
    assert [one.columns(longest) for longest in range(1, 65)] == [4] * 16 + [8] * 16 + [16] * 32
    assert all(other.columns(longest) * 7 >= longest for longest in range(1, 65))


def test_sampling_on_a_cpu_imports_no_compiler(toy_data, forks, tmp_path):
    """They take 0.1 GB and a second of every start."""
    flags = ["--model", toy_data / "model", *"--prompt a=1 --n 3 --max_tokens 2 --page_size 4".split()]
    done = ended(forks.start(tmp_path, "tests/no_compiler.py", ROOT / "sample.py", *flags))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "groups, limits, gb",
    [
        ("0::/user.slice", {"memory.max": "max", "user.slice/memory.max": "max"}, 40),  # of a whole machine
        ("0::/", {"memory.max": "16000000000"}, 14),  # Docker
        ("0::/job_7/step_0", {"job_7/memory.max": "12000000000", "job_7/step_0/memory.max": "max"}, 10),  # Slurm
        ("0::/a/b", {"a/memory.max": "90000000000", "a/b/memory.max": "80000000000"}, 40),
        ("5:memory:/docker/5f\n0::/", {"memory/memory.limit_in_bytes": "16000000000"}, 14),  # as seen inside
        ("9:name=systemd:/\n5:memory:/s/job_7", {"memory/s/job_7/memory.limit_in_bytes": "12000000000"}, 10),
        ("5:memory:/", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 40),
        ("", {}, 40),
    ],
)
def test_the_cache_is_taken_from_what_a_container_may_use(groups, limits, gb, tmp_path, monkeypatch):
    """40 GB are available; the process uses 2 of them already."""
    files = {
        "proc/meminfo": "MemTotal:  64000000 kB\nMemAvailable:   39062500 kB\n",
        "proc/self/status": "Name:\tpython\nRssAnon:\t 1953125 kB\nRssFile:\t 7 kB\n",
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in limits.items()},
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sampler, "Path", lambda *parts: tmp_path.joinpath(*(part.lstrip("/") for part in parts)))
    assert sampler._free_memory(None, 1, torch.device("cpu")) == gb * 10**9 / 2
