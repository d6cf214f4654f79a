"""The training loop of both stages.

An optimiser step takes its rows, gives every token its weight (objectives.py), deals the sequences to ranks and
micro-batches (batch.py), adds up gradients, clips, steps, and keeps its figures on the device; they are looked at only
on steps that log.
"""

import json
import math
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanoredi import objectives
from nanoredi.batch import WeightedSequence, divide, num_steps, pack, step_rows
from nanoredi.config import RediConfig, SftConfig, TrainConfig
from nanoredi.data import TokenData, load_pairs, load_sft
from nanoredi.distributed import World, compute_dtype, shard
from nanoredi.errors import UserError
from nanoredi.model import Qwen2
from nanoredi.tokenizer import Tokenizer


def train(config: SftConfig | RediConfig, world: World) -> None:
    """Run a stage from its data to out/final.

    Args:
        config: the stage, with model, data and out given; out is this run's own (runs.open_run).
        world: the ranks.

    Raises:
        UserError: for anything wrong with the model or the data.
    """
    stage, out = ("stage 1" if isinstance(config, SftConfig) else "stage 2"), Path(config.out)
    overrides = {
        name: getattr(config, name) for name in ("rope_theta", "max_position_embeddings") if getattr(config, name)
    }
    model = Qwen2.from_pretrained(config.model, **overrides)
    data = _load(config, model, world)
    for block in model.model.layers:
        block.activation_checkpointing = config.activation_checkpointing
    dtype = world.first(lambda: compute_dtype(config.dtype, world.device))  # measured, so one rank decides
    shard(model, world, dtype, config.reshard_after_forward)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True
    )

    num_rows = len(data) if isinstance(config, SftConfig) else len(data) // 2
    total = num_steps(num_rows, config.batch_size, config.epochs, config.max_steps)
    parameters = sum(p.numel() for p in model.parameters())
    world.say(
        f"{stage}: {config.model} ({parameters:,} parameters, {str(dtype)[6:]}), {num_rows:,} rows of "
        f"{config.data}, {total:,} steps of {config.batch_size}, {world.size} rank{'s' if world.size > 1 else ''}"
    )
    log = Log(out / "metrics.jsonl", config, total, world)
    for step in range(total):
        lr = config.lr * schedule(step, total, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = step_rows(step, num_rows, config.batch_size, config.seed)
        figures, tokens = train_step(model, optimizer, step + 1, weighted_sequences(config, data, rows), config, world)
        log.add(step + 1, (step + 1) / num_steps(num_rows, config.batch_size, 1, 0), lr, figures, tokens)
        if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < total:
            model.save_pretrained(out / f"step-{step + 1:06d}", dtype)
    model.save_pretrained(out / "final", dtype)
    dist.barrier()
    world.say(f"{stage}: saved {out / 'final'}")


def train_step(
    model: Qwen2,
    optimizer: torch.optim.Optimizer,
    step: int,
    sequences: list[WeightedSequence],
    config: TrainConfig,
    world: World,
) -> tuple[Tensor, int]:
    """Optimiser step number `step`, counted from 1, on the sequences of all ranks.

    Returns:
        On the device: chosen and rejected log-prob, gradient norm and update norm (4,); and the tokens that went
        through.
    """
    # A sequence of weight 0 teaches nothing; it stays out of the forward.
    sequences = [s for s in sequences if s.weight] or sequences[:1]
    lengths = [len(s.tokens) - 1 for s in sequences]
    micro_batches = divide(lengths, world.size, config.max_tokens_per_micro_batch)[world.rank]
    # A rank with nothing to do still takes part in every collective, with a short sequence of weight 0.
    idle = min(sequences, key=lambda s: len(s.tokens))._replace(weight=0.0)
    logps = torch.zeros(2, device=world.device)
    for i, indices in enumerate(micro_batches):
        batch = pack([sequences[j] for j in indices] or [idle], model.config.vocab_size).to(world.device)
        # Gradients add up on each rank; ranks exchange them once a step.
        model.set_requires_gradient_sync(i == len(micro_batches) - 1)
        loss, token_logps = model.loss(*batch)
        loss.backward()
        logps += mean_logps(token_logps, batch.weights)
    grad_norm = clip_gradients(model, config.clip)
    optimizer.step()
    optimizer.zero_grad()
    sums = torch.stack((*logps, update_square(optimizer, step)))
    dist.all_reduce(sums)
    chosen, rejected = sums[0], sums[1] / (getattr(config, "alpha", 0) or 1.0)
    return torch.stack((chosen, rejected, grad_norm, sums[2].sqrt())), sum(lengths)


def weighted_sequences(config: SftConfig | RediConfig, data: TokenData, rows: np.ndarray) -> list[WeightedSequence]:
    """The sequences of an optimiser step, each with its objective's weight."""

    def with_weights(indices: list[int], weights: list[float], kind: str = "") -> list[WeightedSequence]:
        per_row = 1 if isinstance(config, SftConfig) else 2
        return [
            WeightedSequence(*data.sequence(i), w, f"row {i // per_row + 1} of {config.data}{kind}")
            for i, w in zip(indices, weights)
        ]

    def num_learned(indices: list[int]) -> list[int]:
        return [data.num_learned(i) for i in indices]

    if isinstance(config, SftConfig):
        indices = rows.tolist()
        return with_weights(indices, objectives.sft(num_learned(indices)))
    chosen, rejected = (2 * rows).tolist(), (2 * rows + 1).tolist()
    if config.objective == "sft":
        return with_weights(chosen, objectives.sft(num_learned(chosen)))
    chosen_weights, rejected_weights = objectives.redi(num_learned(chosen), num_learned(rejected), config.alpha)
    return with_weights(chosen, chosen_weights, ", chosen") + with_weights(rejected, rejected_weights, ", rejected")


def mean_logps(logps: Tensor, weights: Tensor) -> Tensor:
    """A batch's part of the step's mean log-prob a token of the chosen and, times alpha, of the rejected traces: (2,).

    The weights are the means' own: -1/(P |y_w|) on a chosen token, alpha/(P |y_l|) on a rejected one.
    """
    return torch.stack(((-weights.clamp(max=0) * logps).sum(), (weights.clamp(min=0) * logps).sum()))


@torch.no_grad()
def clip_gradients(model: Qwen2, longest: float) -> Tensor:
    """Scale the gradient of all parameters down to a length of `longest` if it is longer; the length it had: () fp32.

    On the ranks' own shards, with one exchange, and with no wait: where nothing is to be clipped the scale is 1.
    """
    parts = [p.grad.to_local() for p in model.parameters()]
    square = torch.nn.utils.get_total_norm(parts).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    scale = (longest / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(scale)
    return norm


def schedule(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate at a step, counted from 0: linear up over warmup * total steps, linear down
    to 0."""
    # differs from the original: no step has the rate 0; its first one has.
    rising = math.ceil(warmup * total)
    return min((step + 1) / rising if rising else 1.0, (total - step) / max(1, total - rising))


@torch.no_grad()
def update_square(optimizer: torch.optim.Optimizer, t: int) -> Tensor:
    """The squared length of the step that AdamW has just made, its t-th, over this rank's shards: () fp32.

    Worked out again from the optimizer's state, so that no copy of the weights is kept:
    old - new = lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * old).
    """
    squares = []
    for group in optimizer.param_groups:
        lr, eps, decay, (b1, b2) = group["lr"], group["eps"], group["weight_decay"], group["betas"]
        for p in group["params"]:
            new, m, v = (x.to_local() for x in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]))
            step = (v / (1 - b2**t)).sqrt_().add_(eps).reciprocal_().mul_(m).mul_(lr / (1 - b1**t))
            # new = (1 - lr * decay) * old - step, hence old - new = (step + lr * decay * new) / (1 - lr * decay).
            step.add_(new, alpha=lr * decay)
            squares.append((step / (1 - lr * decay)).square_().sum())
    return torch.stack(squares).sum()


def _load(config: SftConfig | RediConfig, model: Qwen2, world: World) -> TokenData:
    """The stage's data, tokenised on rank 0 where the cache lacks it, and checked against the model."""
    if not config.data:
        raise UserError("training needs rows: give --data FILE.jsonl")
    tokenizer = Tokenizer(config.model)
    if isinstance(config, SftConfig):
        load = partial(load_sft, config.data, tokenizer, config.max_tokens, config.cache)
    else:
        load = partial(
            load_pairs, config.data, tokenizer, config.max_prompt_tokens, config.max_response_tokens, config.cache
        )
    for note in world.first(lambda: load().notes):  # fills the cache
        world.say(note)
    data = load()
    longest = int(np.diff(data.offsets).max())
    context = model.config.max_position_embeddings
    if longest > context:
        raise UserError(
            f"{config.data}: the longest sequence has {longest:,} tokens, the model's context {context:,}; "
            "raise max_position_embeddings or lower the limits on tokens"
        )
    largest = int(data.tokens.max())
    if largest >= model.config.vocab_size:
        raise UserError(
            f"{config.data}: token {largest} is outside the model's vocabulary of {model.config.vocab_size}; "
            f"the tokenizer of {config.model} is not this model's"
        )
    return data


class Log:
    """metrics.jsonl, a row a step, and a line on the screen every few steps. Figures wait on the device until a line
    is due."""

    def __init__(self, path: Path, config: SftConfig | RediConfig, total: int, world: World):
        self.path, self.config, self.total, self.world = path, config, total, world
        self.alpha = config.alpha if getattr(config, "objective", "sft") == "redi" else 0.0
        self.waiting: list[tuple[int, float, float, Tensor, int]] = []
        self.start = self.last = time.perf_counter()

    def add(self, step: int, epoch: float, lr: float, figures: Tensor, tokens: int) -> None:
        """Keep a step's figures (train_step has them); show what waits when a line is due."""
        self.waiting.append((step, epoch, lr, figures, tokens))
        if step == 1 or step % self.config.log_every == 0 or step == self.total:
            self._flush()

    def _flush(self) -> None:
        values = torch.stack([figures for _, _, _, figures, _ in self.waiting]).tolist()  # the one wait for the device
        now = time.perf_counter()
        tokens_per_s = sum(tokens for *_, tokens in self.waiting) / (now - self.last)
        rows = [self._row(w, v, tokens_per_s) for w, v in zip(self.waiting, values)]
        self.waiting, self.last = [], now
        if self.world.rank == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(self._line(rows[-1], now), flush=True)

    def _row(
        self, waiting: tuple[int, float, float, Tensor, int], values: list[float], tokens_per_s: float
    ) -> dict[str, Any]:
        step, epoch, lr, _, _ = waiting
        chosen, rejected, grad_norm, update = values
        return {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": -chosen + self.alpha * rejected,
            "chosen_logp": chosen,
            "rejected_logp": rejected if self.alpha else None,
            "margin": chosen - rejected if self.alpha else None,
            "grad_norm": grad_norm,
            "update_norm": update,
            "lr": lr,
            "tokens_per_s": round(tokens_per_s, 1),
            "peak_memory_gb": round(peak_memory_gb(self.world.device), 3),
        }

    def _line(self, row: dict[str, Any], now: float) -> str:
        pair = f"  rejected {row['rejected_logp']:8.4f}  margin {row['margin']:7.4f}" if self.alpha else ""
        left = (now - self.start) / row["step"] * (self.total - row["step"])
        return (
            f"step {row['step']:>{len(str(self.total))}}/{self.total}  loss {row['loss']:8.4f}  "
            f"chosen {row['chosen_logp']:8.4f}{pair}  grad {row['grad_norm']:.2e}  update {row['update_norm']:.2e}  "
            f"lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tok/s  left {clock(left)}"
        )


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far: of the GPU by tensors, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
