"""One process or many: the process group, the device mesh, and the model sharded over it by FSDP2.

A single process is the same code on a mesh of one; on a CPU or in fp32 it goes without FSDP2, and the model casts its
masters where it uses them.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from nanoredi.common.errors import UserError, sentence
from nanoredi.config import TrainConfig
from nanoredi.kernels.dispatch import prepare_for_training
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.heartbeat import Heartbeat

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The ranks of this run, and this rank's place among them."""

    rank: int
    size: int
    device: torch.device

    def first(self, work: Callable[[], Result]) -> Result:
        """Do some work on rank 0 and give its result to every rank; a UserError of it, or a disk's error, is raised on
        every rank."""
        outcome: list = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                if (text := sentence(error)) is None:
                    raise
                outcome[1] = text
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. It waits for the other ranks, but not for the device."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


@contextlib.contextmanager
def world(timeout_minutes: float = 10.0) -> Iterator[World]:
    """Join the process group that torchrun describes, or be one process alone; leave it at the end. A rank that does not
    answer for timeout_minutes ends the job.

    Raises:
        UserError: when ranks would share a GPU.
    """
    rank, size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    store = next(dist.rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = _gpu(store, rank, size, local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    bound = device if device.type == "cuda" and size > 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=bound)
    heartbeat = Heartbeat(rank, size, timeout_minutes) if size > 1 else None
    try:
        yield World(rank, size, device)
    finally:
        if heartbeat:
            heartbeat.stop()
        dist.destroy_process_group()
        # Gloo's threads need the interpreter's lock to let go of their last tensors; one that still waits for it when the
        # interpreter ends aborts the process. Asleep, this thread leaves the lock to them.
        time.sleep(0.2)


def _gpu(store: dist.Store, rank: int, size: int, local_rank: int) -> torch.device:
    """The rank's own GPU. Some launchers show each rank its own alone, which is then number 0 to all of them."""
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
    """The ranks that share one copy of the weights: all of them, or groups of shard_size neighbours (HSDP).

    Raises:
        UserError: when the ranks do not divide into such groups.
    """
    if shard_size in (0, world.size):
        return init_device_mesh(world.device.type, (world.size,))
    if world.size % shard_size:
        raise UserError(f"--shard_size {shard_size} does not divide the {world.size} ranks into equal groups")
    shape = world.size // shard_size, shard_size
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Qwen2, world: World, dtype: torch.dtype, config: TrainConfig) -> Qwen2:
    """Make a model, in place, one to train: its weights fp32 masters, sharded, a unit a block, and one for embedding,
    norm and head.

    Args:
        model: its parameters are moved to the rank's device. They may still be the file's, in another dtype: a rank never
            holds more fp32 weights than its shards and one unit.
        dtype: of the forward and backward; gradients are summed over ranks, and accumulated, in fp32.
        config: says what a block keeps for backward, and how weights are shared and where they lie. With a shard_size,
            gradients are summed over the groups of ranks, too; with offload they come to the host, and a GPU is sent a
            unit's shards when it gathers them.
    """
    for block in model.model.layers:
        block.activation_checkpointing = config.activation_checkpointing
    offload = config.offload and world.device.type != "cpu"
    if world.size == 1 and not offload and (world.device.type == "cpu" or dtype == torch.float32):
        # Nothing to share, and on a CPU FSDP2's own copies would cost much time and memory. A copy of the weights, because
        # they are the file's own memory.
        for p in model.parameters():
            p.data = p.data.to(world.device, torch.float32, copy=True)
            prepare_for_training(p)
        model.compute_dtype = dtype
        return model
    mesh = shard_mesh(world, config.shard_size)
    # Inputs are not cast: the loss's weights must stay fp32.
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place: dict[str, Any] = {"offload_policy": fsdp.CPUOffloadPolicy()} if offload else {}
    for block in model.model.layers:
        reshard = config.reshard_after_forward
        fsdp.fully_shard(block.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, **place)
    fsdp.fully_shard(model.float(), mesh=mesh, mp_policy=policy, **place)
    for method in ("loss", "logprobs"):
        fsdp.register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            # The loss's weights are divided by the whole step already: gradients are summed, not averaged. Gloo knows
            # no scaled sum, hence the plain one for all.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # The kernel makes the head's gradient in fp32. It stays so; autograd would round it to the weight's dtype.
    model.unshard()
    for p in (model.lm_head_weight, model.model.embed_tokens.weight, model.model.norm.weight):
        p.grad_dtype = torch.float32  # the whole unit's: it is reduced as one
    model.reshard()
    return model


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, its gradient or AdamW's state."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
