"""What a step of REDI costs a GPU in memory, traffic and time, by arithmetic alone; scaling.py writes a page of it.

Nothing is run or timed here. The formulas follow distributed.shard (FSDP2's units), trainer.train_step (unsharded
gradients accumulate on each GPU until the step's last micro-batch), model.Block (what is kept for backward) and
kernels/cross_entropy.py (the loss); tests/test_scaling.py compares them with the program.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from nanoredi.kernels.logits import MAX_GPU_ELEMENTS
from nanoredi.model.config import Qwen2Config
from nanoredi.model.qwen2 import Qwen2


def rate(value: float, unit: str, source: str) -> Any:
    """A field of Device: a rate with its unit and source."""
    return dataclasses.field(default=value, metadata={"unit": unit, "source": source})


DATASHEET = "NVIDIA's datasheet of the H100 SXM"


@dataclass(frozen=True)
class Device:
    """A GPU, its links, and the shares of their rates that a program is assumed to reach. Each field is also a flag."""

    flops: float = rate(989, "Tflop/s", f"bf16 matrix products, dense: {DATASHEET}")
    memory: float = rate(80, "GB", DATASHEET)
    bandwidth: float = rate(3350, "GB/s", f"of the GPU's memory: {DATASHEET}")
    nvlink: float = rate(450, "GB/s", f"a direction, within a machine: {DATASHEET} (900 both ways)")
    network: float = rate(400, "Gb/s", "a GPU's adapter, between machines: assumed, one 400 Gb/s adapter a GPU")
    pcie: float = rate(31.5, "GB/s", "a direction, to the host: PCIe 4.0 x16 by the standard")
    host_bandwidth: float = rate(76.8, "GB/s", "of the host's memory: assumed, two channels of DDR5-4800")
    matrix_share: float = rate(0.5, "", "share of flops reached in the linear layers and the loss: assumed")
    attention_share: float = rate(
        0.35, "", "share of flops reached in attention: FlashAttention-2 on an H100 in arXiv 2407.08608"
    )
    link_share: float = rate(0.7, "", "share reached of the memory's and the links' rates: assumed")
    memory_share: float = rate(
        0.9, "", "share of the memory that tensors may fill, beside CUDA, NCCL and fragmentation: assumed"
    )


QWEN = {"num_hidden_layers": 28, "max_position_embeddings": 32_768}
MODELS = {
    "1.5B": Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **QWEN,
    ),
    "7B": Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_attention_heads=28,
        num_key_value_heads=4,
        **QWEN,
    ),
}
GPUS = (1, 2, 4, 8, 16, 32, 64)
MACHINE = 8
SEQUENCES = 64  # a step's 32 pairs
LENGTH = 19_000


@dataclass(frozen=True)
class Layout:
    """A step's work on some GPUs.

    Attributes:
        gpus: number of GPUs.
        shard: number of GPUs that share a copy of the model: all (FSDP), or fewer (HSDP).
        together: sequences in a micro-batch, or fewer if a GPU has fewer in a step.
        products: whether the linear layers' outputs are kept for backward (--activation_checkpointing products).
        offload: whether master weights and moments are on the host (--offload); for one GPU only.
    """

    gpus: int
    shard: int
    together: int = 2
    products: bool = False
    offload: bool = False

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a GPU in a step."""
        return -(-SEQUENCES // (self.gpus * self.together))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return min(self.together, SEQUENCES // self.gpus) * LENGTH

    @property
    def name(self) -> str:
        return str(self.gpus) if self.shard == self.gpus else f"{self.gpus}, HSDP"


LAYOUTS = [Layout(n, s) for n in GPUS for s in ([n] if n <= MACHINE else [n, MACHINE])]


def block_parameters(c: Qwen2Config) -> int:
    d, kv, f = c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size
    return (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * f + 2 * d  # q; k and v; o; MLP; norms


def root_parameters(c: Qwen2Config) -> int:
    """Parameters of the root unit: embedding, final norm and, unless it is tied, head."""
    return c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) + c.hidden_size


def parameters(c: Qwen2Config) -> int:
    return c.num_hidden_layers * block_parameters(c) + root_parameters(c)


def memory(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """Bytes of a GPU's tensors at the peak of a step: in the backward of the last blocks, in the last micro-batch."""
    n, d, f = layout.tokens, c.hidden_size, c.intermediate_size
    kv = c.num_key_value_heads * c.head_dim
    block, root, head = block_parameters(c), root_parameters(c), 4 * c.vocab_size * d
    accumulates = layout.micro_batches > 1
    # What a block's backward holds, in bf16: the norms' outputs, q, the residual stream between attention and MLP, and
    # the gradient of the stream after it (5 D); k and v; in the MLP gate, silu(gate) and up, and the gradients of the
    # last two and of their product (6 F). If products are kept, v, gate and up are counted there.
    kept = layout.products
    working = 2 * n * (5 * d + (1 if kept else 2) * kv + (4 if kept else 6) * f)
    products = 2 * n * (2 * d + 2 * kv + 2 * f) if kept else 0  # of q, o, k, v, gate and up
    # The loss comes before, when no block is running: hidden, its gradient, a chunk of logits; and the gradient of the
    # head, in fp32. That one is kept to the end of backward, where the embedding's gradient is added to it; an untied
    # head's is added to the earlier micro-batches' sum at once.
    loss = 2 * (2 * n * d + MAX_GPU_ELEMENTS)
    stays = c.tie_word_embeddings or not accumulates
    return {
        "weights, Adam": 0 if layout.offload else 12 * parameters(c) / layout.shard,
        # The sums of earlier micro-batches; a block's gradient in bf16, and in fp32 while it is reduced.
        "gradients": (4 * parameters(c) if accumulates else 0) + (2 + 4) * block + (head if stays else 0),
        # The root unit, the running block, the next one, and the buffer that it is gathered into.
        "gathered": 2 * root + 2 * block * (3 if layout.shard > 1 else 1),
        # A block's input, attention's output, and fp32's log-sum-exp of each head.
        "checkpoints": (n * (2 * 2 * d + 4 * c.num_attention_heads) + products) * c.num_hidden_layers,
        "a block": max(working, loss + (0 if stays else head)),
    }


def host_memory(c: Qwen2Config) -> dict[str, float]:
    """Bytes of host memory that --offload takes for one GPU: in training, and in addition while a state is saved. torch
    rounds each pinned tensor, here weights and gradients, up to a power of two. A state is copied, and the largest of
    its 16 files once more, which has the embedding."""
    with torch.device("meta"):
        pinned = sum(2 * 2 ** math.ceil(math.log2(4 * p.numel())) for p in Qwen2(c).parameters())
    saving = 12 * parameters(c) * (1 + 1 / 16) + 4 * c.vocab_size * c.hidden_size
    return {"training": pinned + 8 * parameters(c), "saving": saving}


def bus_traffic(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """Bytes between host and GPU in the parts of a step, in fp32: forward and backward to the GPU (a micro-batch's
    gathers), the accumulated gradients back (once a step)."""
    blocks, root = c.num_hidden_layers * block_parameters(c), root_parameters(c)
    there = 4 if layout.offload else 0
    return {"forward": there * (blocks + root), "backward": there * blocks, "gradients": there * (blocks + root)}


def traffic(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """Bytes that each GPU sends, and receives, in the parts of a step: keys forward and backward (a micro-batch's
    gathers), reduce (once a step, among those that share a copy), copies (once a step, among copies)."""
    s, copies = layout.shard, layout.gpus // layout.shard
    blocks, root = c.num_hidden_layers * block_parameters(c), root_parameters(c)
    others = (s - 1) / s
    return {
        "forward": 2 * (blocks + root) * others,
        "backward": 2 * blocks * others,  # the root unit is still gathered
        "reduce": 4 * (blocks + root) * others,
        "copies": 2 * (copies - 1) / copies * 4 * (blocks + root) / s,
    }


def network_share(layout: Layout) -> float:
    """The part of a gather or reduce-scatter that goes through a GPU's adapter. Across machines NCCL makes as many
    rings as there are adapters, and each ring enters a machine once, with its part of the data."""
    return 1 / MACHINE if layout.shard > MACHINE else 0.0


def flops(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """FLOPs of a GPU's micro-batch, forward and backward, of the linear layers and of attention. Unless the linear
    layers' outputs are kept, backward recomputes all of them but the MLP's last."""
    n, d = layout.tokens, c.hidden_size
    linear = 2 * n * block_parameters(c) * c.num_hidden_layers
    repeated = 0 if layout.products else linear - 2 * n * d * c.intermediate_size * c.num_hidden_layers
    attention = n / LENGTH * 2 * LENGTH**2 * d * c.num_hidden_layers  # two products, each over half of the matrix
    head = 2 * n * c.vocab_size * d  # one product; the loss computes its gradients, two more, in forward
    return {
        "forward": linear + 3 * head,
        "backward": 2 * linear + repeated,
        "forward attention": attention,
        "backward attention": 2.5 * attention,  # flash's backward has five products for forward's two
    }


def pointwise(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """Bytes that a GPU's micro-batch reads and writes between the matrix products of its blocks (cuda/pointwise.py):
    forward, and backward with its recomputation. tests/device counts them."""
    d, kv, f = c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size
    norms, rotation = (2 + 4) * d, 2 * (d + kv)  # the second norm also adds its two inputs
    forward = norms + rotation + 3 * f + 3 * d
    backward = norms + rotation + 6 * f + (4 + 4) * d + 2 * (d + 2 * kv)
    in_bf16 = 2 * layout.tokens * c.num_hidden_layers
    return {"forward": in_bf16 * forward, "backward": in_bf16 * backward}


def times(c: Qwen2Config, layout: Layout, device: Device) -> dict[str, float]:
    """Seconds of a step, and the slowest network (Gb/s a GPU) that would not make it longer.

    The next block's weights are gathered, and the last block's gradients reduced, while a block computes; so each
    forward and each backward takes the longer of computing and communicating. The gather of the root unit and the
    first block, the reduction of the root unit, and the optimiser overlap with nothing. On a single GPU offloaded
    weights are copied in the compute stream, so they overlap with nothing either; gradients go back in another stream.
    """
    nvlink = device.nvlink * 1e9 * device.link_share
    adapter = device.network / 8 * 1e9 * device.link_share
    share = network_share(layout)

    def link(shared: float, copies: float = 0.0) -> float:
        """Seconds of bytes exchanged within a copy, and among copies."""
        return max(shared / nvlink, shared * share / adapter) + copies / adapter

    work, moved, sent = flops(c, layout), pointwise(c, layout), traffic(c, layout)
    computing = {
        phase: work[phase] / (device.flops * 1e12 * device.matrix_share)
        + work[f"{phase} attention"] / (device.flops * 1e12 * device.attention_share)
        + moved[phase] / (device.bandwidth * 1e9 * device.link_share)
        for phase in ("forward", "backward")
    }
    bus = {part: number / (device.pcie * 1e9 * device.link_share) for part, number in bus_traffic(c, layout).items()}
    root = root_parameters(c) / parameters(c)
    forward = max(computing["forward"] + bus["forward"], link(sent["forward"]))
    backward = max(computing["backward"] + bus["backward"], link(sent["backward"]))
    last = max(
        computing["backward"] + bus["backward"],
        link(sent["backward"] + sent["reduce"], sent["copies"]),
        bus["gradients"] * (1 - root),
    )
    first_units = (root_parameters(c) + block_parameters(c)) / parameters(c)
    # AdamW reads four fp32 numbers a parameter and writes three, clipping reads two and writes one, the update norm
    # takes ten passes of two or three: 124 bytes.
    optimizer = 124 * parameters(c) / layout.shard / (device.bandwidth * 1e9 * device.link_share)
    if layout.offload:
        # On a CPU the update norm takes one pass of three numbers: 52 bytes.
        optimizer = 52 * parameters(c) / (device.host_bandwidth * 1e9 * device.link_share)
    micro = layout.micro_batches
    compute = micro * sum(computing.values())
    step = (
        micro * (forward + link(sent["forward"] * first_units))
        + (micro - 1) * backward
        + last
        + link(sent["reduce"] * root, sent["copies"] * root)
        + bus["gradients"] * root
        + optimizer
    )
    through_network = [
        (sent["forward"] * share, computing["forward"]),
        (sent["backward"] * share, computing["backward"]),
        ((sent["backward"] + sent["reduce"]) * share + sent["copies"], computing["backward"]),
    ]
    needed = max(number / seconds for number, seconds in through_network) * 8 / 1e9 / device.link_share
    return {"computing": compute, "step": step, "network needed": needed, "optimizer": optimizer}


def step_traffic(c: Qwen2Config, layout: Layout) -> tuple[float, float]:
    """Bytes a GPU sends in a step: over NVLink, and through its network adapter."""
    sent = traffic(c, layout)
    shared = layout.micro_batches * (sent["forward"] + sent["backward"]) + sent["reduce"]
    return shared, shared * network_share(layout) + sent["copies"]
