"""The training loop of both stages.

An optimiser step takes its rows, gives every token its weight (objectives.py), deals the sequences to ranks and
micro-batches (batch.py), adds up gradients, clips, steps, and keeps its figures on the device; they are looked at only
on steps that log (log.py), by those who watch over the run (guards.py). A run that was broken off goes on from its newest
state (state.py).
"""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanoredi import objectives
from nanoredi.common.errors import Stopped, UserError
from nanoredi.config import RediConfig, SftConfig
from nanoredi.data.batch import WeightedSequence, divide, num_steps, pack, step_rows
from nanoredi.data.sequences import TokenData, load_pairs, load_sft
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.kernels.dispatch import after_step
from nanoredi.model.qwen2 import Qwen2
from nanoredi.pairs import pair_losses, wants_pairs
from nanoredi.trainer.distributed import World, compute_dtype, exchange_gradients, matrix_rate, shard
from nanoredi.trainer.guards import Guards, signals
from nanoredi.trainer.log import Log, Step
from nanoredi.trainer.optimizer import AdamW, gradient_square, schedule
from nanoredi.trainer.reference import reference_logps
from nanoredi.trainer.state import States, training_tensors


def train(config: SftConfig | RediConfig, world: World) -> None:
    """Run a stage from its data, or from where it was broken off, to out/final.

    Args:
        config: the stage, with model, data and out given; out is this run's own (runs.open_run).
        world: the ranks.

    Raises:
        UserError: for anything wrong with the model or the data, and when a guard ends the run.
        Stopped: when the run was asked to stop (SIGTERM); its state is saved.
    """
    stage, out = ("stage 1" if isinstance(config, SftConfig) else "stage 2"), Path(config.out)
    overrides = {
        name: getattr(config, name) for name in ("rope_theta", "max_position_embeddings") if getattr(config, name)
    }
    model = Qwen2.from_pretrained(config.model, **overrides)
    data = _load(config, model, world)
    # Measured, so one rank decides.
    dtype, rate = world.first(lambda: _dtype_and_rate(config.dtype, world.device))
    set_up(model, config, dtype, world)
    reference, began_with = None, {"data": data.digest}
    if isinstance(config, RediConfig) and config.objective == "dpo":
        reference, began_with["reference"] = reference_logps(config, model, data, dtype, world)
    optimizer = AdamW(model, config.lr, config.weight_decay)

    num_rows = len(data) if isinstance(config, SftConfig) else len(data) // 2
    total = num_steps(num_rows, config.batch_size, config.epochs, config.max_steps)
    parameters = sum(p.numel() for p in model.parameters())
    world.say(
        f"{stage}: {config.model} ({parameters:,} parameters, {str(dtype)[6:]}), {num_rows:,} rows of "
        f"{config.data}, {total:,} steps of {config.batch_size}, {world.size} rank{'s' if world.size > 1 else ''}; kill -USR1 {os.getpid()} asks where it is"
    )

    states = States(out / "state", world)
    guards = Guards(config, world)
    first = _resume(states, model, optimizer, guards, began_with, world)
    log = Log(config, first, total, rate, world, stage)
    world.first(lambda: _drop_unfinished(out))
    with signals(log.where, world) as asked_to_stop:
        for step in range(first, total):
            optimizer.lr = config.lr * schedule(step, total, config.warmup)
            rows = step_rows(step, num_rows, config.batch_size, config.seed)
            sequences = weighted_sequences(config, data, rows, reference)
            figures, tokens, flops = train_step(model, optimizer, sequences, config, world)
            number, epoch = step + 1, (step + 1) / num_steps(num_rows, config.batch_size, 1, 0)
            guards.look(log.add(Step(number, epoch, optimizer.lr, figures, tokens, flops, rows)))
            saves, stops = bool(config.save_every) and number % config.save_every == 0, asked_to_stop()
            if (saves or stops) and number < total:
                guards.look(log.flush())
                if saves:
                    save_model(model, out / f"step-{number:06d}", dtype, world)
                notes = {**guards.state(), "began_with": began_with}
                states.save(number, training_tensors(model, optimizer), notes)
            if stops and number < total:
                states.wait()
                raise Stopped(f"{stage} was asked to stop: step {number} is saved, the same command goes on from there")
        guards.look(log.flush())
    save_model(model, out / "final", dtype, world)
    states.drop()
    world.say(f"{stage}: saved {out / 'final'}")


def set_up(model: Qwen2, config: SftConfig | RediConfig, dtype: torch.dtype, world: World) -> None:
    """Make a model, in place, one that is trained in this compute dtype by these ranks."""
    for block in model.model.layers:
        block.activation_checkpointing = config.activation_checkpointing
    shard(model, world, dtype, config.reshard_after_forward, config.shard_size)


def train_step(
    model: Qwen2,
    optimizer: AdamW,
    sequences: list[WeightedSequence],
    config: SftConfig | RediConfig,
    world: World,
) -> tuple[Tensor, int, float]:
    """One optimiser step on the sequences of all ranks; it is skipped where its loss or gradient is not finite.

    Args:
        sequences: as weighted_sequences gives them.

    Returns:
        On the device: chosen and rejected log-prob, gradient norm, update norm and loss (5,), not all finite where the
        step was skipped; the tokens that went through; and their floating-point operations.
    """
    # A sequence of weight 0 teaches nothing; it stays out of the forward.
    sequences = [s for s in sequences if s.weight] or sequences[:1]
    pairwise, half = wants_pairs(config), len(sequences) // 2
    # What must share a micro-batch.
    units = list(zip(sequences[:half], sequences[half:])) if pairwise else [(s,) for s in sequences]
    lengths = [sum(len(s.tokens) - 1 for s in unit) for unit in units]
    costs = [sum(model.config.flops(len(s.tokens) - 1, s.num_learned) for s in unit) for unit in units]
    micro_batches = divide(lengths, costs, world.size, config.max_tokens_per_micro_batch)[world.rank]
    # A rank with nothing to do still takes part in every collective, with a short sequence of weight 0.
    idle = min(sequences, key=lambda s: len(s.tokens))._replace(weight=0.0)
    totals = torch.zeros(3, device=world.device)
    for i, indices in enumerate(micro_batches):
        mine = [s for j in indices for s in units[j]]
        batch = pack(mine or [idle], model.config.vocab_size).to(world.device)
        # Gradients add up on each rank; ranks exchange them once a step.
        exchange_gradients(model, i == len(micro_batches) - 1)
        if pairwise and mine:
            token_logps = model.logprobs(batch.targets, batch.rows, *batch.forward_arguments)
            loss = pair_losses(config, mine, token_logps).sum() / len(units)
        else:
            loss, token_logps = model.loss(*batch)
        loss.backward()
        totals += torch.stack((*mean_logps(token_logps.detach(), batch.weights), loss.detach()))
    # With several copies of the weights, every shard is there as often as there are copies.
    copies = world.size // (config.shard_size or world.size)
    sums = torch.stack((*totals, gradient_square(model) / copies))
    dist.all_reduce(sums)
    chosen, rejected, loss, norm = sums[0], sums[1] / (_rejected_weight(config) or 1.0), sums[2], sums[3].sqrt()
    skip = (~sums.isfinite().all()).float()
    optimizer.step(norm, config.clip, skip)
    num_parameters = sum(p.numel() for p in optimizer.parameters)
    after_step(optimizer.num_steps[0], len(micro_batches), num_parameters, model.compute_dtype)
    update = optimizer.update_square() / copies
    dist.all_reduce(update)
    update = torch.where(skip.bool(), 0.0, update.sqrt())
    return torch.stack((chosen, rejected, norm, update, loss)), sum(lengths), sum(costs)


def weighted_sequences(
    config: SftConfig | RediConfig, data: TokenData, rows: np.ndarray, reference: np.ndarray | None = None
) -> list[WeightedSequence]:
    """The sequences of an optimiser step, each with its objective's weight; of pairs first all chosen ones, then the
    rejected ones in the same order. Where the objective wants pairs, the weights only say which is which, and serve the
    mean log-probs.

    Args:
        reference: (all rows, 2), DPO's (reference_logps).
    """

    def with_weights(indices: list[int], weights: list[float], kind: str = "") -> list[WeightedSequence]:
        per_row = 1 if isinstance(config, SftConfig) else 2
        logps = [0.0] * len(indices) if reference is None else reference.reshape(-1)[indices].tolist()
        return [
            WeightedSequence(*data.sequence(i), w, f"row {i // per_row + 1} of {config.data}{kind}", logp)
            for i, w, logp in zip(indices, weights, logps)
        ]

    def num_learned(indices: list[int]) -> list[int]:
        return [data.num_learned(i) for i in indices]

    if isinstance(config, SftConfig):
        indices = rows.tolist()
        return with_weights(indices, objectives.sft(num_learned(indices)))
    chosen, rejected = (2 * rows).tolist(), (2 * rows + 1).tolist()
    if config.objective == "sft":
        return with_weights(chosen, objectives.sft(num_learned(chosen)))
    lengths = num_learned(chosen), num_learned(rejected)
    chosen_weights, rejected_weights = objectives.redi(*lengths, _rejected_weight(config))
    return with_weights(chosen, chosen_weights, ", chosen") + with_weights(rejected, rejected_weights, ", rejected")


def mean_logps(logps: Tensor, weights: Tensor) -> Tensor:
    """A batch's part of the step's mean log-prob a token of the chosen and, times alpha, of the rejected traces: (2,).

    The weights are the means' own: -1/(P |y_w|) on a chosen token, alpha/(P |y_l|) on a rejected one.
    """
    return torch.stack(((-weights.clamp(max=0) * logps).sum(), (weights.clamp(min=0) * logps).sum()))


def save_model(model: Qwen2, folder: Path, dtype: torch.dtype, world: World) -> None:
    """Save the model, unless this run has done so before it was broken off."""
    if not world.first(folder.exists):
        model.save_pretrained(folder, dtype)
        dist.barrier()


def _dtype_and_rate(name: str, device: torch.device) -> tuple[torch.dtype, float]:
    dtype = compute_dtype(name, device)
    return dtype, matrix_rate(dtype, device)


def _rejected_weight(config: SftConfig | RediConfig) -> float:
    """What the rejected traces' mean log-prob is multiplied by in their tokens' weights."""
    linear = getattr(config, "objective", "sft") == "redi" and not wants_pairs(config)
    return config.alpha if linear else 1.0


def _resume(
    states: States,
    model: Qwen2,
    optimizer: AdamW,
    guards: Guards,
    began_with: dict[str, str],
    world: World,
) -> int:
    """Put the run where its newest state left it: the number of steps that are done.

    Raises:
        UserError: when the digests of what the run began with are not those of now.
    """
    tensors = training_tensors(model, optimizer)
    notes = states.load(tensors)
    if notes is None:
        return 0
    for what, digest in began_with.items():
        if notes["began_with"].get(what) != digest:
            other = {"data": "other data, or another tokenizer", "reference": "another model as DPO's reference"}[what]
            raise UserError(f"the run in {states.folder.parent} began with {other}: give another --out")
    guards.restore(notes)
    for count in optimizer.num_steps:
        count.fill_(notes["step"] - notes["skipped"])
    world.say(f"going on after step {notes['step']}")
    return notes["step"]


def _drop_unfinished(out: Path) -> None:
    """Remove the models that a killed run was writing."""
    for folder in (*out.glob("step-*.writing"), *out.glob("final.*.writing")):
        shutil.rmtree(folder)


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
