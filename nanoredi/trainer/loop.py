"""The training loop of both stages.

An optimiser step takes its rows, gives every token its weight (objectives.py), deals the sequences to ranks and
micro-batches (batch.py), adds up gradients, clips, steps, and keeps its figures on the device; they are looked at only
on steps that log (log.py), by those who watch over the run (guards.py). A run that was broken off goes on from its newest
state (state.py).
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoredi import objectives
from nanoredi.common.errors import Stopped, UserError
from nanoredi.common.runs import holds_model
from nanoredi.config import RediConfig, SftConfig
from nanoredi.data.batch import num_steps, step_rows
from nanoredi.data.sequences import TokenData, load_pairs, load_sft
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.attention import flash_attention
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.distributed import World, shard
from nanoredi.trainer.dtype import compute_dtype, matrix_rate
from nanoredi.trainer.guards import Guards, signals
from nanoredi.trainer.log import Log, Step
from nanoredi.trainer.optimizer import AdamW, schedule
from nanoredi.trainer.reference import reference_logps
from nanoredi.trainer.scoring import means_a_token
from nanoredi.trainer.state import States, resume, training_tensors
from nanoredi.trainer.step import train_step


def train(config: SftConfig | RediConfig, world: World) -> None:
    """Run a stage from its data, or from where it was broken off, to out/final.

    Args:
        config: the stage, with model, data and out given; out is this run's own (runs.open_run).

    Raises:
        UserError: for anything wrong with the model or the data, and when a guard ends the run.
        Stopped: when the run was asked to stop (SIGTERM); its state is saved.
    """
    run, out = _Run(config, world), Path(config.out)
    steps_an_epoch = num_steps(len(run.data), config.batch_size, 1, 0)
    with signals(run.log.where, world) as asked_to_stop:
        for step in range(run.first, run.total):
            run.optimizer.lr = config.lr * schedule(step, run.total, config.warmup)
            rows = step_rows(step, len(run.data), config.batch_size, config.seed)
            units = objectives.units(config, [run.data.row(i) for i in rows])
            watched = {"start": run.look()} if run.look and step == 0 else {}
            figures, tokens, flops = train_step(run.model, run.optimizer, units, config, world)
            number = step + 1
            if run.look and (number % config.watch_every == 0 or number == run.total):
                watched["watch"] = run.look()
            done = Step(number, number / steps_an_epoch, run.optimizer.lr, figures, tokens, flops, rows, watched)
            run.guards.look(run.log.add(done))
            saves, stops = bool(config.save_every) and number % config.save_every == 0, asked_to_stop()
            if number == run.total or not (saves or stops):
                continue
            run.guards.look(run.log.flush())
            if saves:
                run.save_model(out / f"step-{number:06d}", number)
            run.save_state(number)
            if stops:
                run.states.wait()
                what = f"{run.log.label} was asked to stop: step {number} is saved"
                raise Stopped(f"{what}, the same command goes on from there")
    run.save_model(out / "final", run.total)
    run.states.drop()
    world.say(f"{run.log.label}: saved {out / 'final'}")


class _Run:
    """All that a stage's loop works with."""

    def __init__(self, config: SftConfig | RediConfig, world: World):
        """Read the data and the model, share it among the ranks, and put the run where its newest state left it."""
        self.world = world
        overrides = {name: x for name in ("rope_theta", "max_position_embeddings") if (x := getattr(config, name))}
        self.model = model = Qwen2.from_pretrained(config.model, **overrides)
        self.data = data = _load(config, config.data, model, world)
        # Works out the watched pairs' log-probs and entropies of now, if there are any.
        self.look: Callable[[], Tensor] | None = None
        if isinstance(config, RediConfig) and config.watch:
            watched = _load(config, config.watch, model, world)  # for what is wrong with it, before hours of training
            if config.watch_every:
                self.look = partial(means_a_token, model, watched, config.max_tokens_per_micro_batch, world)
        # The dtype of the compute, and of the saved models.
        self.dtype = dtype = world.first(lambda: compute_dtype(config.dtype, world.device))
        rate = world.first(lambda: matrix_rate(dtype, world.device))  # measured, so one rank decides
        shard(model, world, dtype, config)
        # What the run depends on beside its config: digests, and the dtype where that says auto.
        self.began_with = {"data": data.digest, "dtype": str(dtype)[6:]}
        if isinstance(config, RediConfig) and config.objective == "dpo":
            data.reference, self.began_with["reference"] = reference_logps(config, model, data, dtype, world)
        self.optimizer = AdamW(model, config.lr, config.weight_decay)
        self.total = num_steps(len(data), config.batch_size, config.epochs, config.max_steps)
        stage = "stage 1" if isinstance(config, SftConfig) else "stage 2"
        parameters, how = sum(p.numel() for p in model.parameters()), str(dtype)[6:]
        if world.device.type == "cuda" and dtype == torch.bfloat16:
            how += f", {flash_attention()}"
        world.say(
            f"{stage}: {config.model} ({parameters:,} parameters, {how})\n"
            f"  {len(data):,} rows of {config.data}, {self.total:,} steps of {config.batch_size}, "
            f"{world.size} rank{'s' if world.size > 1 else ''}\n  kill -USR1 {os.getpid()} asks where it is"
        )
        self.states, self.guards = States(Path(config.out) / "state", world), Guards(config, world)
        self.first = resume(self.states, model, self.optimizer, self.guards, self.began_with)  # steps that are done
        has_negatives = bool((data.row_weights < 0).any())
        self.log = Log(config, self.first, self.total, rate, world, stage, has_negatives)

    def save_state(self, step: int) -> None:
        notes = {**self.guards.state(), "began_with": self.began_with}
        self.states.save(step, training_tensors(self.model, self.optimizer), notes)

    def save_model(self, folder: Path, step: int) -> None:
        """Save the model of a step, unless this run has done so before it was broken off.

        Raises:
            UserError: when it cannot be saved; then the step's state is, and the same command tries again from there.
        """
        failure = None
        try:
            if not self.world.first(lambda: holds_model(folder)):
                self.model.save_pretrained(folder, self.dtype)
        except UserError as error:
            failure = str(error)
        if failure := self.world.first(lambda: failure):
            self.save_state(step)
            self.states.wait()
            raise UserError(f"{failure}; the state of step {step} is saved, the same command goes on from there")


def _load(config: SftConfig | RediConfig, path: str, model: Qwen2, world: World) -> TokenData:
    """The rows of a file as the stage takes them, tokenised on rank 0 where the cache lacks it, and checked against the model."""
    if not path:
        raise UserError("training needs rows: give --data FILE.jsonl")
    tokenizer = Tokenizer(config.model)
    if isinstance(config, SftConfig):
        load = partial(load_sft, path, tokenizer, config.max_tokens, config.cache)
    else:
        load = partial(load_pairs, path, tokenizer, config.max_prompt_tokens, config.max_response_tokens, config.cache)
    for note in world.first(lambda: load().notes):  # fills the cache
        world.say(note)
    data = load()
    longest, context = int(np.diff(data.offsets).max()), model.config.max_position_embeddings
    if longest > context:
        raise UserError(
            f"{path}: the longest sequence has {longest:,} tokens, the model's context {context:,}; "
            "raise max_position_embeddings or lower the limits on tokens"
        )
    weighted = (data.row_weights != 1) & (path == config.data)
    if isinstance(config, RediConfig) and config.objective in ("dpo", "simpo") and weighted.any():
        name = data.row(int(weighted.argmax()) // 2)[0].name
        raise UserError(f"{name}: {config.objective} knows no chosen_weight; take it out, or use redi or sft")
    if path == config.data and not data.row_weights[:: len(data.sides)].any() and not getattr(config, "alpha", 0):
        raise UserError(f"{path}: every row's weight is 0, so nothing would be learned")
    if (largest := int(data.tokens.max())) >= model.config.vocab_size:
        raise UserError(
            f"{path}: token {largest} is outside the model's vocabulary of {model.config.vocab_size}; "
            f"the tokenizer of {config.model} is not this model's"
        )
    return data
