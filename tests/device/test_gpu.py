"""What runs only on a GPU. Without one these tests are skipped, and test_steps.py and test_varlen.py must do."""

import pytest
import tiny
import torch
from dense import qkv
from safetensors.torch import load_file

from nanoredi.config import RediConfig, SamplingConfig
from nanoredi.cuda.graphs import Graphs
from nanoredi.sampler import kv_cache, sampler
from nanoredi.sampler.sampler import Sampler
from nanoredi.sampler.scheduler import Request
from nanoredi.trainer.loop import train

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPTS = [ids.tolist() for ids in tiny.sequences()]


def gradients(kept: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    model = tiny.tiny_model(tied=True).to(device, dtype)
    for block in model.model.layers:
        block.activation_checkpointing = kept
    ids, positions, ends = (x.to(device) for x in tiny.packed(tiny.sequences()))
    weights = torch.linspace(-1, 1, len(ids), device=device)
    model.loss(ids, positions, ends, ids, weights)[0].backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def test_recomputation_gives_the_gradients_of_the_variable_length_kernel():
    whole = gradients("off", torch.bfloat16, DEVICE)
    for kept in ("attention", "products"):
        for name, gradient in gradients(kept, torch.bfloat16, DEVICE).items():
            # The kernel's backward adds up in no fixed order.
            assert (gradient - whole[name]).norm() <= 0.01 * whole[name].norm(), name
    for name, gradient in gradients("off", torch.float32, "cpu").items():
        assert (gradient - whole[name]).norm() <= 0.1 * gradient.norm(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offloaded_training_comes_to_the_same(dtype, toy_data, one_rank, tmp_path):
    data = {"model": str(toy_data / "model"), "data": str(toy_data / "pairs.jsonl"), "cache": str(tmp_path / "cache")}
    size = {"batch_size": 16, "max_steps": 3, "max_tokens_per_micro_batch": 300, "save_every": 2}
    start, weights = load_file(toy_data / "model" / "model.safetensors"), []
    for offload in (False, True):
        out = tmp_path / str(offload)
        out.mkdir()
        train(RediConfig(**data, **size, out=str(out), lr=1e-3, dtype=dtype, offload=offload), one_rank)
        saved = load_file(out / "final" / "model.safetensors")
        weights.append(torch.cat([(saved[name].double() - start[name].double()).flatten() for name in start]))
    moved, offloaded = weights
    assert 0 < moved.norm() and (offloaded - moved).norm() <= 0.05 * moved.norm()


def complete(dtype: torch.dtype, device: str, **settings) -> tuple[list[list[int]], Sampler]:
    requests = [Request(prompt, max_tokens=n) for n, prompt in enumerate(PROMPTS * 2, start=5)]
    config = SamplingConfig(**{"temperature": 0.0, "batch_size": 4, "page_size": 8, "cache_gb": 0.001, **settings})
    sampling = Sampler(tiny.tiny_model(tied=True).to(device, dtype).pack(), [], config)
    assert len(list(sampling.run(requests))) == len(requests)
    return [request.tokens for request in requests], sampling


@pytest.mark.parametrize("page_size", [8, 32, 256])
def test_prompts_prefilled_in_chunks_give_what_a_cpu_does(page_size, monkeypatch):
    wanted, _ = complete(torch.float32, "cpu", page_size=page_size)
    monkeypatch.setattr(sampler, "_PREFILL_TOKENS", 7)
    assert complete(torch.float32, DEVICE, page_size=page_size)[0] == wanted


def prefilled(chunks: list[list[tuple[int, int, int]]], page_size: int) -> dict[tuple[int, int], torch.Tensor]:
    """Attention of the tokens of two rows in passes of chunks (row, start, end): (row, position) -> (H, E)."""
    num_pages = -(-700 // page_size)
    cache = kv_cache.PagedCache((1, 2 * num_pages, 2, page_size, 128), torch.bfloat16, torch.device(DEVICE))
    pages = torch.randperm(2 * num_pages, generator=torch.Generator().manual_seed(0)).view(2, -1).tolist()
    rows = [[x.detach().to(DEVICE, torch.bfloat16) for x in qkv(700, 12, 2, 128, seed=row)] for row in range(2)]
    found = {}
    for some in chunks:
        attend, _ = cache.prefill([(pages[row], start, end) for row, start, end in some])
        out = attend(0, *(torch.cat([rows[row][i][start:end] for row, start, end in some]) for i in range(3)))
        found |= dict(zip([(row, p) for row, start, end in some for p in range(start, end)], out))
    return found


def test_flash_attention_reads_pages_the_same_bit_for_bit_in_any_chunks():
    whole = prefilled([[(0, 0, 700), (1, 0, 300)]], 256)
    for place, out in prefilled([[(1, 0, 300), (0, 0, 700)]], 16).items():  # token by token
        torch.testing.assert_close(out, whole[place], atol=0.02, rtol=0)
    for chunks in (
        [[(0, 0, 700)], [(1, 0, 300)]],
        [[(0, 0, 1), (1, 0, 299)], [(0, 1, 257)], [(0, 257, 700), (1, 299, 300)]],
    ):
        got = prefilled(chunks, 256)
        assert got.keys() == whole.keys() and all(torch.equal(out, whole[place]) for place, out in got.items())


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 5}])
def test_graphs_in_bfloat16_draw_what_the_same_kernels_draw_without(settings, monkeypatch):
    by_graphs, sampling = complete(torch.bfloat16, DEVICE, **settings)
    assert sampling.graphs or DEVICE == "cpu"

    def replay(self, slots, uniforms, longest):
        slots, num = torch.from_numpy(self.padded(slots)).to(self.device), len(slots)
        uniforms = torch.nn.functional.pad(torch.from_numpy(uniforms), (0, len(slots) - num)).to(self.device)
        return self.advance(slots, uniforms, self.num_columns)

    monkeypatch.setattr(Graphs, "__call__", replay)
    assert complete(torch.bfloat16, DEVICE, **settings)[0] == by_graphs
