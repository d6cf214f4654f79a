"""docs/scaling.md: its parameters against the model's, its memory against the tensors that a step keeps, its formulas
against sums written out here."""

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import scaling, step_costs
from bench.step_costs import MACHINE, MODELS, Device, Layout
from nanoredi.config import SftConfig
from nanoredi.kernels import cross_entropy, logits
from nanoredi.model import qwen2 as model_module
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer import distributed
from nanoredi.trainer.distributed import shard

SMALL, LARGE = MODELS.values()


@pytest.mark.parametrize("config", MODELS.values())
def test_parameters_are_the_models(config):
    with torch.device("meta"):
        model = Qwen2(config)
    assert step_costs.parameters(config) == sum(p.numel() for p in model.parameters())
    assert step_costs.block_parameters(config) == sum(p.numel() for p in model.model.layers[0].parameters())


def test_parameters_are_the_checkpoints():
    assert (step_costs.parameters(SMALL), step_costs.parameters(LARGE)) == (1_543_714_304, 7_615_616_512)


def test_memory_formula():
    """1.5B on 8 GPUs: 4 micro-batches of 38,000 tokens."""
    block, root, everything = 46_797_824, 233_375_232, 1_543_714_304
    parts = step_costs.memory(SMALL, Layout(8, 8))
    assert parts == {
        "weights, Adam": everything * 12 / 8,
        "gradients": everything * 4 + block * 6 + 151_936 * 1536 * 4,
        "gathered": root * 2 + block * 6,
        "checkpoints": 28 * 38_000 * (2 * 1536 * 2 + 12 * 4),
        "a block": 38_000 * (5 * 1536 + 2 * 256 + 6 * 8960) * 2,
    }
    assert sum(parts.values()) == pytest.approx(21.7e9, rel=0.005)
    # From 32 GPUs on there is one micro-batch, and no sum of earlier ones.
    one = step_costs.memory(SMALL, Layout(32, 32))
    assert parts["gradients"] - one["gradients"] == everything * 4


def test_offload_formulas():
    """1.5B on one GPU: 32 micro-batches, each of which copies all weights in fp32 and those of the blocks twice."""
    block, root, everything = 46_797_824, 233_375_232, 1_543_714_304
    layout, device = Layout(1, 1, offload=True), Device(pcie=20, host_bandwidth=50, link_share=0.5)
    plain, offloaded = (step_costs.memory(SMALL, x) for x in (Layout(1, 1), layout))
    assert offloaded == {**plain, "weights, Adam": 0}
    a, b = (step_costs.times(SMALL, x, device) for x in (Layout(1, 1), layout))
    on_the_gpu = 124 * everything / (3350e9 / 2)
    bus = (32 * (everything + 28 * block) + root) * 4 / 10e9
    assert b["step"] == pytest.approx(a["step"] - on_the_gpu + bus + 52 * everything / 25e9)
    # The embedding takes 2^30 bytes of pinned memory, and so does its gradient.
    assert (
        16 * everything + 2 * (2**30 - 4 * 151_936 * 1536) < step_costs.host_memory(SMALL)["training"] < 19 * everything
    )


def test_traffic_formula():
    """7B on 16 GPUs: 2 micro-batches, each with two gathers of the blocks and one of the root unit in bf16."""
    blocks, root, everything = 28 * 233_057_792, 1_089_998_336, 7_615_616_512
    inside, outside = step_costs.step_traffic(LARGE, Layout(16, 16))
    assert inside == pytest.approx((2 * (2 * blocks * 2 + root * 2) + everything * 4) * 15 / 16)
    assert outside == pytest.approx(inside / 8)
    # HSDP: 8 GPUs gather and reduce; then each all-reduces its eighth of the gradient with one GPU of the other machine.
    inside, outside = step_costs.step_traffic(LARGE, Layout(16, MACHINE))
    assert inside == pytest.approx((2 * (2 * blocks * 2 + root * 2) + everything * 4) * 7 / 8)
    assert outside == pytest.approx(everything * 4 / 8)


def test_time_formula():
    """1.5B on one GPU: 1,216,000 tokens in 64 sequences; nothing is sent."""
    repeated = 28 * (46_797_824 - 1536 * 8960)  # down_proj is not recomputed
    linear = 1_216_000 * (6 * 28 * 46_797_824 + 2 * repeated + 6 * 151_936 * 1536)
    attention = 64 * 28 * 3.5 * 2 * 19_000**2 * 1536
    t = step_costs.times(SMALL, Layout(1, 1), Device())
    # Norms and sums, rotation and gate; forward, recomputation and backward: 29 D, 8 K E and 9 F numbers of bf16.
    pointwise = 1_216_000 * 28 * 2 * (29 * 1536 + 8 * 256 + 9 * 8960) / (0.7 * 3350e9)
    assert t["computing"] == pytest.approx(linear / (0.5 * 989e12) + attention / (0.35 * 989e12) + pointwise)
    assert t["step"] == pytest.approx(t["computing"] + 124 * 1_543_714_304 / (0.7 * 3350e9))
    kept = step_costs.times(SMALL, Layout(1, 1, products=True), Device())
    assert t["computing"] - kept["computing"] == pytest.approx(1_216_000 * 2 * repeated / (0.5 * 989e12))


def test_a_slow_network_prolongs_a_step():
    """On a very slow network the time of 7B's step on 16 GPUs is its traffic over the network's rate."""
    layout, slow = Layout(16, 16), Device(network=0.1)
    _, outside = step_costs.step_traffic(LARGE, layout)
    assert step_costs.times(LARGE, layout, slow)["step"] == pytest.approx(outside / (0.7 * 0.1e9 / 8), rel=0.2)
    needed = step_costs.times(LARGE, layout, Device())["network needed"]
    hidden, above, below = (
        step_costs.times(LARGE, layout, Device(network=x))["step"] for x in (400, needed, needed / 2)
    )
    assert below - above > 2 * (above - hidden)


def test_the_page_is_what_the_script_writes():
    page = Path(scaling.__file__).parent.parent / "docs" / "scaling.md"
    assert page.read_text() == scaling.page(Device()), "python bench/scaling.py > docs/scaling.md"


@torch.library.custom_op("nanoredi_tests::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns and saves tensors as flash attention does, and computes nothing."""
    return torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)


attention.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)))
attention.register_autograd(
    lambda ctx, *_: tuple(torch.zeros_like(x) for x in ctx.saved_tensors[:3]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


class Norm(torch.autograd.Function):
    """Saves what a GPU's RMSNorm saves, its input and a number a row; the CPU's saves more."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_zeros(len(x), dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None) -> tuple:
    stream = x if added is None else x + added
    return stream, Norm.apply(stream, weight)


class Peak(TorchDispatchMode):
    """Records the peak of the bytes held by tensors that are created under it or given to it."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.bytes = 0
        self.watch(tensors)

    def watch(self, tree) -> None:
        for storage in (t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)):
            self.storages[storage._cdata] = weakref.ref(storage)
        # FSDP frees storages by resizing them to 0, which no operation shows.
        alive = [storage for storage in (ref() for ref in self.storages.values()) if storage is not None]
        self.storages = {storage._cdata: weakref.ref(storage) for storage in alive}
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in alive))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.watch(out)
        return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="fake tensors: CUDA_VISIBLE_DEVICES= pytest")
@pytest.mark.parametrize("kept", ["attention", "products"])
def test_memory_is_what_a_step_keeps(kept, one_rank, plain, monkeypatch):
    """Four blocks of the two models, two micro-batches of 38,000 tokens, in fake tensors."""
    monkeypatch.setattr(model_module, "PackedAttention", lambda *_: lambda layer, q, k, v: attention(q, k, v)[0])
    monkeypatch.setattr(model_module, "ATTENTION", {"nanoredi_tests::attention"})
    monkeypatch.setattr(model_module, "rms_norm", norm)
    # Triton's version allocates no chunk beside the logits.
    monkeypatch.setattr(cross_entropy, "logprobs_", lambda logits, *_: torch.zeros(2, len(logits)).unbind())
    monkeypatch.setattr(nn.Module, "float", lambda self: self)  # it is fp32 already, and fake tensors cannot be swapped
    monkeypatch.setattr(logits, "MAX_CPU_ELEMENTS", logits.MAX_GPU_ELEMENTS)
    monkeypatch.setattr(step_costs, "SEQUENCES", 4)
    mesh = distributed.shard_mesh(one_rank, 0)
    monkeypatch.setattr(distributed, "shard_mesh", lambda *_: mesh)  # a mesh cannot be made under FakeTensorMode
    n = 2 * step_costs.LENGTH
    for config in (dataclasses.replace(c, num_hidden_layers=4) for c in MODELS.values()):
        with FakeTensorMode(allow_non_fake_inputs=True):
            # With FSDP2, as on a GPU; a single rank on a CPU does without.
            on_gpu = dataclasses.replace(one_rank, device=torch.device("cuda"))
            model = shard(Qwen2(config), on_gpu, torch.bfloat16, SftConfig(activation_checkpointing=kept))
            ids, rows, ends = (torch.zeros(k, dtype=torch.int64) for k in (n, n, 2))
            with Peak(*(p.to_local() for p in model.parameters())) as peak:
                for last in (False, True):
                    model.set_requires_gradient_sync(last)
                    loss, _ = model.loss(ids, ids, ends, ids, torch.zeros(n), rows, n)
                    loss.backward()
        moments = 8 * step_costs.parameters(config)
        computed = sum(step_costs.memory(config, Layout(1, 1, products=kept == "products")).values())
        assert 0.96 < (peak.bytes + moments) / computed < 1.01


def test_memory_peaks_where_it_is_computed():
    """Backward frees a block's checkpoint, which is larger than what it then adds to the gradients."""
    for config in MODELS.values():
        for x in step_costs.LAYOUTS:
            if x.micro_batches == 1:
                assert 4 * step_costs.block_parameters(config) / x.shard < 2 * x.tokens * config.hidden_size
