"""How memory, traffic and step time grow from 1 to 64 GPUs: docs/scaling.md, by arithmetic alone.

    python bench/scaling.py > docs/scaling.md              the page in the repository: H100s
    python bench/scaling.py --memory 40 --flops 312        the same page for other devices, on the screen

Nothing is run and nothing is timed here. What the sums follow is distributed.shard (FSDP2's units), trainer.train_step
(gradients add up whole on each GPU until the step's last micro-batch), model.Block (what backward keeps) and
kernels/cross_entropy.py (the loss); tests/test_scaling.py holds them against the program.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoredi.architecture import Qwen2Config  # noqa: E402
from nanoredi.kernels.chunks import MAX_GPU_ELEMENTS  # noqa: E402


def rate(value: float, unit: str, source: str) -> Any:
    """A device's figure, and where it is from."""
    return dataclasses.field(default=value, metadata={"unit": unit, "source": source})


DATASHEET = "NVIDIA's datasheet of the H100 SXM"


@dataclass(frozen=True)
class Device:
    """A GPU, its links, and the shares of their rates that a program is taken to reach. Each field is also a flag."""

    flops: float = rate(989, "Tflop/s", f"bf16 matrix products, dense: {DATASHEET}")
    memory: float = rate(80, "GB", DATASHEET)
    bandwidth: float = rate(3350, "GB/s", f"of that memory: {DATASHEET}")
    nvlink: float = rate(450, "GB/s", f"a direction, within a machine: {DATASHEET} (900 both ways)")
    network: float = rate(400, "Gb/s", "a GPU's adapter, between machines: assumed, one 400 Gb/s adapter a GPU")
    matrix_share: float = rate(0.5, "", "of flops in the linear layers and the loss: assumed")
    attention_share: float = rate(
        0.35, "", "of flops in attention: FlashAttention-2 on an H100, as arXiv 2407.08608 has it"
    )
    link_share: float = rate(0.7, "", "of the memory's and the links' rates: assumed")
    memory_share: float = rate(
        0.9, "", "of the memory that tensors may fill; CUDA, NCCL and gaps take the rest: assumed"
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
SLOW = (25, 10, 3.1)  # networks to compare, in Gb/s a GPU


@dataclass(frozen=True)
class Layout:
    """A step's work on some GPUs.

    Attributes:
        gpus: all of them.
        shard: so many share one copy of the model; gpus of them is FSDP, fewer HSDP.
        together: sequences of a micro-batch, where a GPU has as many.
    """

    gpus: int
    shard: int
    together: int = 2

    @property
    def micro_batches(self) -> int:
        """Of a GPU and step."""
        return -(-SEQUENCES // (self.gpus * self.together))

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return min(self.together, SEQUENCES // self.gpus) * LENGTH

    @property
    def name(self) -> str:
        return str(self.gpus) if self.shard == self.gpus else f"{self.gpus}, HSDP"


LAYOUTS = [Layout(n, s) for n in GPUS for s in ([n] if n <= MACHINE else [n, MACHINE])]


def block_parameters(c: Qwen2Config) -> int:
    d, kv, f = c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size
    return (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * f + 2 * d  # q; k and v; o; MLP; norms


def root_parameters(c: Qwen2Config) -> int:
    """Of the unit of embedding, final norm and, where it is not the embedding, head."""
    return c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) + c.hidden_size


def parameters(c: Qwen2Config) -> int:
    return c.num_hidden_layers * block_parameters(c) + root_parameters(c)


def memory(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """Bytes of a GPU's tensors at the peak of a step: in the backward of the last blocks, in the last micro-batch."""
    n, d, f = layout.tokens, c.hidden_size, c.intermediate_size
    kv = c.num_key_value_heads * c.head_dim
    block, root, head = block_parameters(c), root_parameters(c), 4 * c.vocab_size * d
    accumulates = layout.micro_batches > 1
    # What a block's backward holds, in bf16: the norms' outputs, q, the stream between attention and MLP and the
    # gradient of the stream after it (5 D); k and v; in the MLP gate, silu(gate) and up, and the gradients of the last
    # two and of their product (6 F).
    working = 2 * n * (5 * d + 2 * kv + 6 * f)
    # The loss comes before, when no block is at work: hidden, its gradient, a chunk of logits; and the gradient of the
    # head, which it makes in fp32. That one lives on to the end of backward, where the embedding adds its own to it;
    # an untied head's is added to the earlier micro-batches' sum at once.
    loss = 2 * (2 * n * d + MAX_GPU_ELEMENTS)
    stays = c.tie_word_embeddings or not accumulates
    return {
        "weights, Adam": 12 * parameters(c) / layout.shard,
        # The sums of earlier micro-batches; a block's own in bf16, and in fp32 on its way to the other GPUs.
        "gradients": (4 * parameters(c) if accumulates else 0) + (2 + 4) * block + (head if stays else 0),
        # The root unit, the block at work, the next one, and the buffer that one arrives in.
        "gathered": 2 * root + 2 * block * (3 if layout.shard > 1 else 1),
        # A block's input, attention's output, and fp32's log-sum-exp of each head.
        "checkpoints": n * (2 * 2 * d + 4 * c.num_attention_heads) * c.num_hidden_layers,
        "a block": max(working, loss + (0 if stays else head)),
    }


def traffic(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """Bytes that each GPU sends, and receives, in the parts of a step: keys forward and backward (a micro-batch's
    gathers), reduce (once a step, among those that share a copy), copies (once a step, among copies)."""
    s, copies = layout.shard, layout.gpus // layout.shard
    blocks, root = c.num_hidden_layers * block_parameters(c), root_parameters(c)
    others = (s - 1) / s
    return {
        "forward": 2 * (blocks + root) * others,
        "backward": 2 * blocks * others,  # the root unit has stayed
        "reduce": 4 * (blocks + root) * others,
        "copies": 2 * (copies - 1) / copies * 4 * (blocks + root) / s,
    }


def network_share(layout: Layout) -> float:
    """The part of a gather or reduce-scatter that goes through a GPU's own adapter. Across machines NCCL lays as many
    rings as there are adapters, each of which enters a machine once, with its part of the data."""
    return 1 / MACHINE if layout.shard > MACHINE else 0.0


def flops(c: Qwen2Config, layout: Layout) -> dict[str, float]:
    """Of a GPU's micro-batch: forward and backward (activation checkpointing's second forward of the linear layers
    in it), of the linear layers and of attention."""
    n, d = layout.tokens, c.hidden_size
    linear = 2 * n * block_parameters(c) * c.num_hidden_layers
    attention = n / LENGTH * 2 * LENGTH**2 * d * c.num_hidden_layers  # two products, each over half of the square
    head = 2 * n * c.vocab_size * d  # one product; the loss makes its gradients, two more, in forward
    return {
        "forward": linear + 3 * head,
        "backward": 3 * linear,
        "forward attention": attention,
        "backward attention": 2.5 * attention,  # flash's backward has five products for forward's two
    }


def times(c: Qwen2Config, layout: Layout, device: Device) -> dict[str, float]:
    """Seconds of a step, and the slowest network (Gb/s a GPU) that would not prolong it.

    The next block's weights are gathered, and the last block's gradients reduced, while a block computes; so each
    forward and each backward takes the longer of computing and communicating. Nothing hides the gather of root unit
    and first block, the reduction of the root unit, and the optimiser.
    """
    nvlink = device.nvlink * 1e9 * device.link_share
    adapter = device.network / 8 * 1e9 * device.link_share
    share = network_share(layout)

    def link(shared: float, copies: float = 0.0) -> float:
        """Seconds of bytes exchanged within a copy, and among copies."""
        return max(shared / nvlink, shared * share / adapter) + copies / adapter

    work, sent = flops(c, layout), traffic(c, layout)
    computing = {
        phase: work[phase] / (device.flops * 1e12 * device.matrix_share)
        + work[f"{phase} attention"] / (device.flops * 1e12 * device.attention_share)
        for phase in ("forward", "backward")
    }
    forward = max(computing["forward"], link(sent["forward"]))
    backward = max(computing["backward"], link(sent["backward"]))
    last = max(computing["backward"], link(sent["backward"] + sent["reduce"], sent["copies"]))
    root = root_parameters(c) / parameters(c)
    first_units = (root_parameters(c) + block_parameters(c)) / parameters(c)
    # AdamW reads four fp32 numbers a parameter and writes three, clipping reads twice and writes once, the size of the
    # update takes ten passes of two or three: 124 bytes.
    optimizer = 124 * parameters(c) / layout.shard / (device.bandwidth * 1e9 * device.link_share)
    micro = layout.micro_batches
    compute = micro * sum(computing.values())
    step = (
        micro * (forward + link(sent["forward"] * first_units))
        + (micro - 1) * backward
        + last
        + link(sent["reduce"] * root, sent["copies"] * root)
        + optimizer
    )
    through_network = [
        (sent["forward"] * share, computing["forward"]),
        (sent["backward"] * share, computing["backward"]),
        ((sent["backward"] + sent["reduce"]) * share + sent["copies"], computing["backward"]),
    ]
    needed = max(number / seconds for number, seconds in through_network) * 8 / 1e9 / device.link_share
    return {"computing": compute, "step": step, "network needed": needed}


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def memory_table(c: Qwen2Config) -> str:
    gb = [(layout, memory(c, layout), memory(c, dataclasses.replace(layout, together=1))) for layout in LAYOUTS]
    head = ["GPUs", "micro-batches", *gb[0][1], "**all**", "all, one sequence at a time"]
    rows = [
        [x.name, str(x.micro_batches), *(f"{v / 1e9:.1f}" for v in parts.values())]
        + [f"**{sum(parts.values()) / 1e9:.1f}**", f"{sum(one.values()) / 1e9:.1f}"]
        for x, parts, one in gb
    ]
    return markdown([head, *rows])


def time_table(c: Qwen2Config, device: Device) -> str:
    alone = times(c, LAYOUTS[0], device)["step"]
    rows = [["GPUs", "NVLink, GB", "network, GB", "computing, s", "step, s", "of linear", "network to keep up, Gb/s"]]
    for x in LAYOUTS:
        inside, outside = step_traffic(c, x)
        t = times(c, x, device)
        rows.append(
            [x.name, f"{inside / 1e9:.1f}", f"{outside / 1e9:.2f}", f"{t['computing']:.2f}", f"{t['step']:.2f}"]
            + [f"{alone / t['step'] / x.gpus:.1%}", f"{t['network needed']:.0f}" if x.gpus > MACHINE else "-"]
        )
    return markdown(rows)


def step_traffic(c: Qwen2Config, layout: Layout) -> tuple[float, float]:
    """Bytes a GPU sends in a step: over NVLink, and through its network adapter."""
    sent = traffic(c, layout)
    shared = layout.micro_batches * (sent["forward"] + sent["backward"]) + sent["reduce"]
    return shared, shared * network_share(layout) + sent["copies"]


def slow_table(device: Device) -> str:
    """Seconds of a step where the network between machines is slow: one copy over all GPUs / HSDP."""
    rates = [device.network, *SLOW]
    rows = [["", *(f"{rate:g} Gb/s" for rate in rates)]]
    for name, c in MODELS.items():
        for n in GPUS:
            if n > MACHINE:
                slow = [dataclasses.replace(device, network=rate) for rate in rates]
                seconds = [(times(c, Layout(n, n), d)["step"], times(c, Layout(n, MACHINE), d)["step"]) for d in slow]
                rows.append([f"{name} on {n} GPUs", *(f"{one:.1f} / {hsdp:.1f}" for one, hsdp in seconds)])
    return markdown(rows)


def fewest(c: Qwen2Config, device: Device, together: int) -> str:
    """The fewest GPUs whose memory is enough, in words."""
    for layout in (Layout(n, n, together) for n in GPUS):
        need = sum(memory(c, layout).values()) / 1e9
        if need <= device.memory * device.memory_share:
            return f"{layout.gpus} GPU{'s' if layout.gpus > 1 else ''} ({need:.0f} GB)"
    return f"more than {GPUS[-1]} GPUs"


def page(device: Device) -> str:
    """docs/scaling.md."""
    across = [(c, n) for c in MODELS.values() for n in GPUS if n > MACHINE]
    step = {(c, n): times(c, Layout(n, n), device)["step"] for c in MODELS.values() for n in GPUS}
    saved = max(1 - times(c, Layout(n, MACHINE), device)["step"] / step[c, n] for c, n in across)
    fits = (
        f"- **{name}** ({parameters(c) / 1e9:.2f} billion parameters) fits on {fewest(c, device, 2)} with a pair in a "
        f"micro-batch,\n  on {fewest(c, device, 1)} with one sequence in it (`--max_tokens_per_micro_batch {LENGTH}`)."
        for name, c in MODELS.items()
    )
    sections = (
        f"## {name}\n\nGB on a GPU at the peak of a step:\n\n{memory_table(c)}\n\n"
        f"What a GPU sends in a step (and receives as much), and the step's time:\n\n{time_table(c, device)}"
        for name, c in MODELS.items()
    )
    rates = (
        f"- `{f.name}`, {f'{getattr(device, f.name):g} ' + f.metadata['unit']}".rstrip() + f": {f.metadata['source']}"
        for f in dataclasses.fields(device)
    )
    return PAGE.format(
        fits="\n".join(fits),
        usable=f"{device.memory * device.memory_share:.0f}",
        sums=" and ".join(f"{4 * parameters(c) / 1e9:.0f}" for c in MODELS.values()),
        on_8=" and ".join(f"{step[c, 8]:.1f}" for c in MODELS.values()),
        on_64=" and ".join(f"{step[c, 64]:.2f}" for c in MODELS.values()),
        linear=f"{100 * min(step[c, 1] / (64 * step[c, 64]) for c in MODELS.values()):.0f}",
        network=f"{device.network:g}",
        saving=f"up to {100 * saved:.0f} % of a step" if saved >= 0.005 else "no time",
        needed=f"{max(times(c, Layout(n, n), device)['network needed'] for c, n in across):.0f}",
        slow=slow_table(device),
        sections="\n\n".join(sections),
        rates="\n".join(rates),
    )


PAGE = """\
# From 1 to 64 GPUs

Computed, not measured: `python bench/scaling.py` works this page out from the rates at its end.

1.5B is Qwen2.5-Math-1.5B, 7B has the shape of Qwen2.5-7B. A step of REDI is 32 pairs of 2 x 19,000 tokens, as long as
the paper's get; the default `--max_tokens_per_micro_batch` makes a pair a micro-batch. Forward and backward are in
bf16, weights and Adam's moments in fp32; activation checkpointing and `--reshard_after_forward` are on. A machine has
8 GPUs. HSDP is `--shard_size 8`: each machine has a copy of the model, shared among its GPUs, and gradients are added
up across machines once a step. In all other rows the GPUs share a single copy (FSDP).

## What to take from it

{fits}
- Up to a step's last micro-batch each GPU holds the sum of the whole gradient in fp32, {sums} GB, however many GPUs
  there are. From 32 GPUs on a step is one micro-batch of each GPU, and that falls away.
- A step takes {on_8} s on 8 GPUs and {on_64} s on 64: {linear} % of linear or better. The longer a micro-batch
  computes, the more of its exchange is hidden.
- HSDP needs more memory, and at {network} Gb/s a GPU it saves {saving}. It is for slow networks: below {needed} Gb/s
  a GPU the exchange of a single copy no longer hides behind computing. HSDP then helps most where a GPU has several
  micro-batches a step, as its traffic between machines does not grow with them. Seconds of a step, single copy / HSDP
  (3.1 Gb/s a GPU is one line of 25 Gb/s a machine):

{slow}

- All this is for long traces. What is sent does not depend on their length: with a tenth of the tokens in a micro-batch
  the network must be ten times as fast or more, and the latency of messages, which is not counted here, begins to tell.

"Fits" means in {usable} GB; times are given for fewer GPUs too. The memory is the busiest moment's.

{sections}

## What was measured

Nothing: no accelerator has run these sizes yet. `tests/test_scaling.py` holds the sums against the program: the
parameters against the model's own, and the peak of memory, for four blocks of each model on one GPU, against the
tensors that a step keeps, which it counts without a GPU.

## How it is computed

**Memory.** *weights, Adam*: three fp32 numbers a parameter, divided among the GPUs that share a copy. *gradients*: the
whole sum of the earlier micro-batches; a block's own on its way to the others; the head's, which the loss makes in
forward. *gathered*: whole bf16 weights of the root unit (embedding, norm and head: gathered once a forward, kept to the
end of backward) and of up to three blocks (at work, next, arriving). *checkpoints*: the input of each block, and its
attention's output. *a block*: what a block's backward makes again and keeps. The loss holds a chunk of logits at
another moment, when no block is at work. Not counted: CUDA, NCCL, gaps of the allocator.

**Traffic.** A micro-batch gathers each block twice, for forward and for backward, and the root unit once, in bf16. Once
a step gradients are reduced in fp32. To gather or reduce S bytes over n GPUs each sends S (n - 1) / n; across machines
an eighth of that goes through each GPU's adapter, as the 8 adapters of a machine carry a ring each. HSDP's all-reduce
among m machines sends 2 (m - 1) / m of an eighth of the gradient through each.

**Time.** Linear layers take 8 operations a parameter and token (forward 2, its repetition 2, backward 4), the loss 6.
Causal attention takes 2 n^2 D a sequence and block, and 2.5 times that in backward; its forward is not repeated. Each
forward and each backward takes the longer of computing and sending; the last backward also sends the gradients. To
that is added what nothing hides: the gather of root unit and first block in each micro-batch, the root unit's reduction
at the end, the optimiser. All GPUs have equal work. *network to keep up*: the rate below which sending takes longer
than computing in some forward or backward.

**Rates.**

{rates}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Device):
        text = f"{f.metadata['unit']} {f.metadata['source']} [{f.default:g}]".strip()
        parser.add_argument(f"--{f.name}", type=float, default=f.default, metavar="X", help=text)
    print(page(Device(**vars(parser.parse_args()))), end="")


if __name__ == "__main__":
    main()
