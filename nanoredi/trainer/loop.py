"""The training loop of both stages.

A step takes its rows of the data, gives every token its weight in the loss (objectives.py), divides the sequences among
ranks and micro-batches (batch.py), accumulates gradients, clips and updates. Its metrics stay on the device until the
log is due (log.py); then the guards see them, too (guards.py). A run resumes from its newest state (state.py).
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanoredi import objectives
from nanoredi.common.errors import Stopped, UserError
from nanoredi.common.runs import holds_model, saved_steps
from nanoredi.config import RediConfig, SftConfig, StageConfig
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


def train(config: StageConfig, world: World) -> None:
    """Run a stage, from its first step or from its newest state, to out/final.

    Args:
        config: the stage, with model, data and out given; out is this run's own folder (runs.open_run).

    Raises:
        UserError: for anything wrong with the model or the data, and when a guard ends the run.
        Stopped: when a signal asked the run to stop; its state is saved.
    """
    run = _Run(config, world)
    steps_an_epoch = num_steps(len(run.data), config.batch_size, 1, 0)
    saves = range(config.save_every, run.total, config.save_every) if config.save_every else ()
    with signals(run.log.status, world) as asked_to_stop, run.states:
        world.say(f"  kill -USR1 {os.getpid()} prints its status")
        # There may have been no room for the model beside the state. A folder without weights is as the user wants it.
        if run.first in saves and not world.first(lambda: run.first in saved_steps(Path(config.out))):
            run.save_model(run.first)
        for step in range(run.first, run.total):
            run.optimizer.lr = config.lr * schedule(step, run.total, config.warmup)
            rows = step_rows(step, len(run.data), config.batch_size, config.seed)
            units = objectives.units(config, [run.data.row(i) for i in rows])
            watched = {"start": run.score_watched()} if run.score_watched and step == 0 else {}
            metrics, tokens, flops = train_step(run.model, run.optimizer, units, config, world)
            number = step + 1
            if run.score_watched and (number % config.watch_every == 0 or number == run.total):
                watched["watch"] = run.score_watched()
            done = Step(number, number / steps_an_epoch, run.optimizer.lr, metrics, tokens, flops, rows, watched)
            run.guards.observe(run.log.add(done))
            stops = asked_to_stop()
            if number == run.total or not (number in saves or stops):
                continue
            run.guards.observe(run.log.flush())
            if number in saves:
                run.save_model(number)
            run.save_state(number)
            if stops:
                run.states.wait()
                raise Stopped(f"{config.label} was asked to stop: step {number} is saved, the same command resumes")
        run.save_model(run.total)
        run.states.drop()
        world.say(f"{config.label}: saved {Path(config.out, 'final')}")
        if asked_to_stop():
            raise Stopped(f"{config.label} was asked to stop, and is finished")


class _Run:
    """All that a stage's loop works with."""

    def __init__(self, config: StageConfig, world: World):
        """Load the data and the model, shard it over the ranks, and load the run's newest state, if there is one."""
        self.config, self.world = config, world
        overrides = {name: x for name in ("rope_theta", "max_position_embeddings") if (x := getattr(config, name))}
        self.model = model = Qwen2.from_pretrained(config.model, **overrides)
        self.data = data = _load(config, config.data, model, world)
        self.score_watched = None  # gives the watched pairs' current log-probs and entropies, if there are any
        if isinstance(config, RediConfig) and config.watch:
            watched = _load(config, config.watch, model, world)  # so that a fault in it is found before training
            if config.watch_every:
                self.score_watched = partial(means_a_token, model, watched, config.max_tokens_per_micro_batch, world)
        self.dtype = dtype = world.first(lambda: compute_dtype(config.dtype, world.device))  # also of the saved models
        rate = world.first(lambda: matrix_rate(dtype, world.device))  # the same on every rank
        shard(model, world, dtype, config)
        # What a resume must find unchanged, beside the config.
        self.began_with = {"sequences": data.digest, "dtype": str(dtype)[6:]}
        if config.objective == "dpo":
            data.reference, self.began_with["reference"] = reference_logps(config, model, data, dtype, world)
        self.optimizer = AdamW(model, config.lr, config.weight_decay)
        self.total = num_steps(len(data), config.batch_size, config.epochs, config.max_steps)
        parameters, how = sum(p.numel() for p in model.parameters()), str(dtype)[6:]
        if world.device.type == "cuda" and dtype == torch.bfloat16:
            how += f", {flash_attention()}"
        world.say(
            f"{config.label}: {config.model} ({parameters:,} parameters, {how})\n"
            f"  {len(data):,} rows of {config.data}, {self.total:,} steps of {config.batch_size}, "
            f"{world.size} rank{'s' if world.size > 1 else ''}"
        )
        self.states, self.guards = States(Path(config.out) / "state", world), Guards(config, world)
        self.first = resume(self.states, model, self.optimizer, self.guards, self.began_with, config.cache)
        self.log = Log(config, self.first, self.total, rate, world, bool((data.row_weights < 0).any()))

    def save_state(self, step: int) -> None:
        notes = {**self.guards.state(), "began_with": self.began_with}
        self.states.save(step, training_tensors(self.model, self.optimizer), notes)

    def save_model(self, step: int) -> None:
        """Save the model of a step, unless this run had saved it before it was interrupted.

        Raises:
            UserError: when it cannot be saved. The step's state is saved then, and the same command tries again.
        """
        folder, failure = Path(self.config.out, "final" if step == self.total else f"step-{step:06d}"), None
        try:
            if not self.world.first(lambda: holds_model(folder)):
                self.model.save_pretrained(folder, self.dtype)
        except UserError as error:
            failure = str(error)
        if failure := self.world.first(lambda: failure):  # only rank 0 writes
            self.save_state(step)
            self.states.wait()
            raise UserError(f"{failure}; the state of step {step} is saved, the same command resumes")


def _load(config: StageConfig, path: str, model: Qwen2, world: World) -> TokenData:
    """A file's rows for this stage, tokenised by rank 0 unless they are cached, and checked against the model."""
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
    if (largest := int(data.tokens.max())) >= model.config.vocab_size:
        raise UserError(
            f"{path}: token {largest} is outside the model's vocabulary of {model.config.vocab_size}; "
            f"the tokenizer of {config.model} is not this model's"
        )
    if path != config.data:  # the watched pairs' weights are not used
        return data
    weighted = data.row_weights != 1
    if config.objective in ("dpo", "simpo") and weighted.any():
        where = f"row {int(weighted.argmax()) // 2 + 1} of those kept of {path}"
        raise UserError(f"{where}: {config.objective} has no chosen_weight; take it out, or use redi or sft")
    if not config.alpha and not data.row_weights[:: len(data.sides)].any():
        raise UserError(f"{path}: every row's weight is 0, so nothing would be learned")
    return data
