"""How memory, traffic and step time scale from 1 to 64 GPUs: writes docs/scaling.md, computed by step_costs.py.

    python bench/scaling.py > docs/scaling.md              the page in the repository: H100s
    python bench/scaling.py --memory 40 --flops 312        the same page for other devices

Nothing is run and nothing is timed.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.step_costs import (  # noqa: E402
    GPUS,
    LAYOUTS,
    LENGTH,
    MACHINE,
    MODELS,
    Device,
    Layout,
    bus_traffic,
    host_memory,
    memory,
    parameters,
    step_traffic,
    times,
)
from nanoredi.model.config import Qwen2Config  # noqa: E402

SLOW = (25, 10, 3.1)  # networks to compare, in Gb/s a GPU
# NVIDIA's whitepaper of Ada: the RTX 4090, bf16 accumulated in fp32.
CARD = {"flops": 165.2, "memory": 24, "bandwidth": 1008}


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def memory_table(c: Qwen2Config) -> str:
    def total(layout: Layout, **changes: int) -> str:
        return f"{sum(memory(c, dataclasses.replace(layout, **changes)).values()) / 1e9:.1f}"

    head = ["GPUs", "micro-batches", *memory(c, LAYOUTS[0]), "**all**", "one sequence at a time", "products kept"]
    rows = [
        [x.name, str(x.micro_batches), *(f"{v / 1e9:.1f}" for v in memory(c, x).values())]
        + [f"**{total(x)}**", total(x, together=1), total(x, together=1, products=True)]
        for x in LAYOUTS
    ]
    return markdown([head, *rows])


def time_table(c: Qwen2Config, device: Device) -> str:
    alone = times(c, LAYOUTS[0], device)["step"]
    head = ["GPUs", "NVLink, GB", "network, GB", "computing, s", "step, s", "products kept, s", "of linear scaling"]
    rows = [[*head, "network to keep up, Gb/s"]]
    for x in LAYOUTS:
        inside, outside = step_traffic(c, x)
        t, kept = times(c, x, device), times(c, dataclasses.replace(x, together=1, products=True), device)
        rows.append(
            [
                x.name,
                f"{inside / 1e9:.1f}",
                f"{outside / 1e9:.2f}",
                f"{t['computing']:.2f}",
                f"{t['step']:.2f}",
                f"{kept['step']:.2f}",
            ]
            + [f"{alone / t['step'] / x.gpus:.1%}", f"{t['network needed']:.0f}" if x.gpus > MACHINE else "-"]
        )
    return markdown(rows)


def slow_table(device: Device) -> str:
    """Seconds of a step with a slow network between machines: FSDP over all GPUs / HSDP."""
    rates = [device.network, *SLOW]
    rows = [["", *(f"{rate:g} Gb/s" for rate in rates)]]
    for name, c in MODELS.items():
        for n in GPUS:
            if n > MACHINE:
                slow = [dataclasses.replace(device, network=rate) for rate in rates]
                seconds = [(times(c, Layout(n, n), d)["step"], times(c, Layout(n, MACHINE), d)["step"]) for d in slow]
                rows.append([f"{name} on {n} GPUs", *(f"{one:.1f} / {hsdp:.1f}" for one, hsdp in seconds)])
    return markdown(rows)


def offload_table(device: Device) -> str:
    """One GPU with --offload, a pair in a micro-batch: a card of 24 GB, and the page's device."""
    rows = [
        ["", "GPU, GB", "one sequence at a time", "host, GB", "bus, GB", "optimiser, s", "step, s", "without it, s"]
    ]
    card, layout = dataclasses.replace(device, **CARD), Layout(1, 1, offload=True)
    for name, c, d in (("1.5B", MODELS["1.5B"], card), *((name, c, device) for name, c in MODELS.items())):
        two, one = (sum(memory(c, Layout(1, 1, n, offload=True)).values()) / 1e9 for n in (2, 1))
        bus, t = bus_traffic(c, layout), times(c, layout, d)
        moved = layout.micro_batches * (bus["forward"] + bus["backward"]) + bus["gradients"]
        seconds = (t["optimizer"], t["step"], times(c, Layout(1, 1), d)["step"])
        rows.append(
            [f"{name}, {d.memory:g} GB"]
            + [f"{x:.1f}" for x in (two, one, host_memory(c)["training"] / 1e9)]
            + [f"{moved / 1e9:.0f}", *(f"{x:.1f}" for x in seconds)]
        )
    return markdown(rows)


def offloaded_card(device: Device) -> str:
    """What 1.5B takes of a card of 24 GB and of its host, as text."""
    c, card, layout = MODELS["1.5B"], dataclasses.replace(device, **CARD), Layout(1, 1, offload=True)
    need, usable = sum(memory(c, layout).values()) / 1e9, card.memory * card.memory_share
    more = times(c, layout, card)["step"] / times(c, Layout(1, 1), card)["step"] - 1
    return (
        f"{need:.1f} of {usable:.1f} usable GB with a pair in a micro-batch,\n  {host_memory(c)['training'] / 1e9:.0f} GB "
        f"of host memory, and a step {100 * more:.0f} % longer than it would be without `--offload`"
    )


def fewest(c: Qwen2Config, device: Device, together: int, products: bool = False) -> str:
    """The fewest GPUs whose memory suffices, as text."""
    for layout in (Layout(n, n, together, products) for n in GPUS):
        need = sum(memory(c, layout).values()) / 1e9
        if need <= device.memory * device.memory_share:
            return f"{layout.gpus} GPU{'s' if layout.gpus > 1 else ''} ({need:.0f} GB)"
    return f"more than {GPUS[-1]} GPUs"


def page(device: Device) -> str:
    """docs/scaling.md."""
    across = [(c, n) for c in MODELS.values() for n in GPUS if n > MACHINE]
    step = {(c, n): times(c, Layout(n, n), device)["step"] for c in MODELS.values() for n in GPUS}
    kept_on_8 = [times(c, Layout(8, 8, together=1, products=True), device)["step"] for c in MODELS.values()]
    needed = [times(c, Layout(n, n), device)["network needed"] for c, n in across]
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
        products_small=fewest(MODELS["1.5B"], device, 1, products=True),
        products_large=fewest(MODELS["7B"], device, 1, products=True),
        kept_needed=f"{max(times(c, Layout(n, n, 1, True), device)['network needed'] for c, n in across):.0f}",
        kept_on_8=" and ".join(f"{t:.1f}" for t in kept_on_8),
        kept_saves=" and ".join(f"{100 * (1 - t / step[c, 8]):.0f}" for c, t in zip(MODELS.values(), kept_on_8)),
        on_64=" and ".join(f"{step[c, 64]:.2f}" for c in MODELS.values()),
        linear=f"{100 * min(step[c, 1] / (64 * step[c, 64]) for c in MODELS.values()):.0f}",
        network=f"{device.network:g}",
        hsdp_saves=f"up to {100 * saved:.0f} % of a step" if saved >= 0.005 else "no time",
        needed=f"{min(needed):.0f} to {max(needed):.0f}",
        slow=slow_table(device),
        offload=offload_table(device),
        card=offloaded_card(device),
        saving=" and ".join(f"{host_memory(c)['saving'] / 1e9:.0f}" for c in MODELS.values()),
        sections="\n\n".join(sections),
        rates="\n".join(rates),
    )


PAGE = """\
# From 1 to 64 GPUs

Computed, not measured: `python bench/scaling.py` computes this page from the rates at its end, several of them assumed.

1.5B is Qwen2.5-Math-1.5B, 7B has the shape of Qwen2.5-7B. A step of REDI is 32 pairs of 2 x 19,000 tokens, the
longest that the paper allows; with the default `--max_tokens_per_micro_batch` a micro-batch is a pair. Forward and
backward are in bf16, weights and Adam's moments in fp32; `--activation_checkpointing` and `--reshard_after_forward`
have their defaults unless stated. A machine has 8 GPUs. HSDP is `--shard_size 8`: each machine has a copy of the
model, sharded over its GPUs, and gradients are all-reduced across machines once a step. In all other rows a single
copy is sharded over all GPUs (FSDP). *products kept* is `--activation_checkpointing products` with one sequence in a
micro-batch.

## Conclusions

{fits}
- **One card of 24 GB** holds 1.5B with `--offload`: {card}.
- Until a step's last micro-batch each GPU accumulates the unsharded gradient in fp32, {sums} GB, however many GPUs
  there are. With 32 GPUs or more a step has one micro-batch a GPU, and nothing is accumulated.
- A step takes {on_8} s on 8 GPUs and {on_64} s on 64: at least {linear} % of linear scaling. The longer a
  micro-batch computes, the more of its communication is hidden.
- `--activation_checkpointing products` keeps the linear layers' outputs instead of recomputing them: {kept_on_8} s a
  step on 8 GPUs with one sequence in a micro-batch, {kept_saves} % less. 1.5B then fits on {products_small}, 7B on
  {products_large}. A micro-batch of half the tokens needs a faster network: up to {kept_needed} Gb/s a GPU.
- HSDP needs more memory, and at {network} Gb/s a GPU it saves {hsdp_saves}. It is for slow networks: below {needed} Gb/s
  a GPU, depending on the layout, FSDP's communication no longer hides behind computing. HSDP then helps if a GPU has
  several micro-batches a step, because its traffic between machines does not grow with them; with one it may be slower.
  Seconds of a step, FSDP / HSDP (3.1 Gb/s a GPU is one link of 25 Gb/s a machine):

{slow}

- All this is for long traces. Traffic does not depend on their length: with a tenth of the tokens in a micro-batch the
  network must be ten times as fast or more, and the latency of messages, which is not counted here, begins to matter.

"Fits" means that the peak of memory is within {usable} GB. The tables also have layouts that do not fit.

{sections}

## One GPU with --offload

Master weights and Adam's moments are on the host, which also runs the optimiser. The GPU keeps the rest of the first
row of each table above, including the accumulated gradient, which therefore crosses the bus once a step. The card of 24
GB is an RTX 4090; *without it* is the step without `--offload`, if the GPU had enough memory:

{offload}

While a state is saved the host needs {saving} GB more. Each micro-batch copies the weights to the GPU twice, so fewer
and larger micro-batches are faster.

## What was measured

Nothing: no accelerator has run these sizes yet. `tests/test_scaling.py` compares two of the formulas with the program,
without a GPU: the number of parameters with the model's, and the peak memory, for four blocks of each model on one GPU,
with the size of the tensors that a step keeps. Time and network traffic are not compared with a run.

## How it is computed

**Memory.** *weights, Adam*: three fp32 numbers a parameter, sharded over the GPUs that share a copy. *gradients*: the
unsharded sum of the earlier micro-batches; a block's gradient while it is reduced; the head's, which the loss computes
in forward. *gathered*: the unsharded bf16 weights of the root unit (embedding, norm and head: gathered once a forward,
kept to the end of backward) and of up to three blocks (running, next, being gathered). *checkpoints*: the input of each
block and its attention's output; if products are kept, also the outputs of all linear layers but the last. *a block*:
what a block's backward recomputes and keeps. The loss needs its chunk of logits at another time, before any block's
backward. Not counted: CUDA, NCCL, fragmentation.

**Traffic.** A micro-batch gathers each block twice, for forward and for backward, and the root unit once, in bf16. Once
a step gradients are reduced in fp32. To gather or reduce S bytes over n GPUs each sends S (n - 1) / n; across machines
an eighth of that goes through each GPU's adapter, because the 8 adapters of a machine carry one ring each. HSDP's
all-reduce among m machines sends 2 (m - 1) / m of an eighth of the gradient through each.

**Time.** Linear layers take 2 FLOPs a parameter and token in forward and 4 in backward; if products are not kept, 2
more for all but the MLP's last layer, which is not recomputed. The loss takes 6. Causal attention takes 2 n^2 D a
sequence and block, and 2.5 times that in backward; its forward is not recomputed. What blocks do between products
(norms, residuals, rotation, SwiGLU) takes as long as its memory traffic, 254 kB a token and block of 1.5B. Each forward
and each backward takes the longer of computing and communicating; the last backward also sends the gradients. What
overlaps with nothing is added: the gather of the root unit and the first block in each micro-batch, the root unit's
reduction at the end, the optimiser. With `--offload` a micro-batch copies the fp32 weights over the bus, those of the
blocks again in backward, which on one GPU overlaps with nothing; gradients are copied back during the last backward.
The host's optimiser step reads and writes 52 bytes a parameter. Its memory is 8 bytes a parameter for the moments, and
weights and gradients in pinned memory, where torch rounds each tensor up to a power of two. All GPUs are taken to have
equal work. *network to keep up*: the rate below which communicating takes longer than computing in some forward or
backward.

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
