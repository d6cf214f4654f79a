"""One process or many: the process group, the device mesh, and the model sharded over it by FSDP2.

A single process runs the same code on a mesh of one. On a CPU or in fp32 it does without FSDP2, and the model casts its
fp32 master weights where it uses them.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from nanoredi.common.errors import UserError, say, sentence
from nanoredi.config import TrainConfig
from nanoredi.kernels.dispatch import prepare_for_training
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.heartbeat import Heartbeat

Result = TypeVar("Result")
# How long a rank waits for another one's work on the host, such as tokenising, where gloo would give up after half an
# hour; a rank that has died is noticed by the heartbeat.
PATIENCE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class World:
    """The number of ranks, and which of them this process is."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # in which ranks wait for rank 0's work; None: the default group

    def first(self, work: Callable[[], Result]) -> Result:
        """Do some work on rank 0 and return its result on every rank. Where it fails for the user's input or the disk,
        every rank raises a UserError."""
        outcome: list = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                if (text := sentence(error)) is None:
                    raise
                outcome[1] = text
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. This waits for the other ranks, but not for the device."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            say(text, sys.stdout)


@contextlib.contextmanager
def world(timeout_minutes: float = 10.0) -> Iterator[World]:
    """Join the process group that torchrun describes, or make one of a single process; leave it at the end. The job
    ends when a rank has not answered for timeout_minutes.

    Raises:
        UserError: when ranks would share a GPU.
    """
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    size = int(os.environ.get("WORLD_SIZE", 1))
    store = next(dist.rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = _gpu(store, rank, size, local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    bound = device if device.type == "cuda" and size > 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=bound)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        with Heartbeat(rank, size, timeout_minutes) if size > 1 else contextlib.nullcontext():
            yield World(rank, size, device, group)
    finally:
        dist.destroy_process_group()
        # Gloo's threads need the GIL to free their last tensors; one that still waits for it when the interpreter exits
        # aborts the process. While this thread sleeps they can have it.
        time.sleep(0.2)


def _gpu(store: dist.Store, rank: int, size: int, local_rank: int) -> torch.device:
    """This rank's GPU. Some launchers show each rank only its own, which is then number 0 on all of them."""
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    store.set(f"gpu {rank}", str(torch.cuda.get_device_properties(device).uuid))
    num_gpus = len({store.get(f"gpu {other}") for other in range(size)})
    if num_gpus < size:
        raise UserError(
            f"there are {size} ranks for {num_gpus} GPU{'s' if num_gpus > 1 else ''}: start one a GPU, as torchrun's "
            "--nproc_per_node counts them on each machine, or all without: CUDA_VISIBLE_DEVICES= torchrun ..."
        )
    return device


def shard_mesh(world: World, shard_size: int) -> DeviceMesh:
    """The ranks that share a copy of the weights: all of them, or groups of shard_size neighbours (HSDP)."""
    if shard_size in (0, world.size):
        return init_device_mesh(world.device.type, (world.size,))
    shape = world.size // shard_size, shard_size
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Qwen2, world: World, dtype: torch.dtype, config: TrainConfig) -> Qwen2:
    """Prepare a model for training, in place: fp32 master weights, sharded in one FSDP2 unit per block and one for
    embedding, norm and head.

    Args:
        model: its parameters are moved to this rank's device. They may still be the mapped file's, in another dtype: a
            rank never holds more fp32 weights than its shards and one unit.
        dtype: of forward and backward; gradients are accumulated, and reduced over ranks, in fp32.
        config: says what a block keeps for backward, and how weights are sharded. With a shard_size, gradients are
            all-reduced over the groups, too; with offload the shards and their gradients stay on the host, and a unit's
            shards are copied to the GPU when it is gathered.

    Raises:
        UserError: when shard_size does not divide the number of ranks.
    """
    if world.size % (config.shard_size or 1):
        raise UserError(f"--shard_size {config.shard_size} must divide the number of ranks, which is {world.size}")
    for block in model.model.layers:
        block.activation_checkpointing = config.activation_checkpointing
    offload = config.offload and world.device.type != "cpu"
    if world.size == 1 and not offload and (world.device.type == "cpu" or dtype == torch.float32):
        # There is nothing to shard, and on a CPU FSDP2's copies would cost time and memory. The weights are copied
        # because they are the file's mapped memory.
        for p in model.parameters():
            p.data = p.data.to(world.device, torch.float32, copy=True)
            prepare_for_training(p)
        model.compute_dtype = dtype
        return model
    # Inputs are not cast: the loss's weights must stay fp32.
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = fsdp.CPUOffloadPolicy() if offload else fsdp.OffloadPolicy()
    mesh = shard_mesh(world, config.shard_size)
    fully_shard = partial(fsdp.fully_shard, mesh=mesh, mp_policy=policy, offload_policy=place)
    for block in model.model.layers:
        fully_shard(block.float(), reshard_after_forward=config.reshard_after_forward)
    fully_shard(model.float())
    for method in ("loss", "logprobs"):
        fsdp.register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            # The loss's weights are divided by the whole step's counts already, so gradients are summed over ranks, not
            # averaged; by the plain sum, since Gloo has no scaled one.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # The loss kernel computes the head's gradient in fp32; autograd would cast it to the weight's dtype.
    model.unshard()
    for p in (model.lm_head_weight, model.model.embed_tokens.weight, model.model.norm.weight):
        p.grad_dtype = torch.float32  # in the whole unit, which is reduced as one
    model.reshard()
    return model


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter, of its gradient or of its moments."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
