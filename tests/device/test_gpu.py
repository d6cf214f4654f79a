"""What runs on a GPU alone. Without one these tests are skipped, and test_steps.py and test_varlen.py are what there is."""

import pytest
import tiny
import torch

from nanoredi.config import SamplingConfig
from nanoredi.sampler import sampler
from nanoredi.sampler.sampler import Sampler
from nanoredi.sampler.scheduler import Request

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


def complete(dtype: torch.dtype, device: str, **settings) -> tuple[list[list[int]], Sampler]:
    requests = [Request(prompt, max_tokens=n) for n, prompt in enumerate(PROMPTS * 2, start=5)]
    config = SamplingConfig(**{"temperature": 0.0, "batch_size": 4, "page_size": 8, "cache_gb": 0.001, **settings})
    sampling = Sampler(tiny.tiny_model(tied=True).to(device, dtype), [], config)
    assert len(list(sampling.run(requests))) == len(requests)
    return [request.tokens for request in requests], sampling


@pytest.mark.parametrize("page_size", [8, 32])
def test_prompts_that_enter_in_pieces_give_what_a_cpu_does(page_size, monkeypatch):
    wanted, _ = complete(torch.float32, "cpu", page_size=page_size)
    monkeypatch.setattr(sampler, "_PREFILL_TOKENS", 7)
    assert complete(torch.float32, DEVICE, page_size=page_size)[0] == wanted


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 5}])
def test_graphs_in_bfloat16_draw_what_the_same_kernels_draw_without(settings, monkeypatch):
    by_graphs, sampling = complete(torch.bfloat16, DEVICE, **settings)
    assert sampling.graphs or DEVICE == "cpu"

    def replay(self, places, uniforms):
        places, num = torch.from_numpy(self._filled_up(places)).to(self.device), len(places)
        uniforms = torch.nn.functional.pad(torch.from_numpy(uniforms), (0, len(places) - num)).to(self.device)
        return self._advance(places, uniforms)

    monkeypatch.setattr(Sampler, "_replay", replay)
    assert complete(torch.bfloat16, DEVICE, **settings)[0] == by_graphs
