"""A rank that fails alone, where leaving the process group would wait for the other ranks, as NCCL does.

torchrun --nproc_per_node 2 tests/trainer/fails.py oom|bug
"""

import time

import torch
import torch.distributed as dist

from nanoredi.common.errors import run_script
from nanoredi.trainer.distributed import world

dist.destroy_process_group = lambda: time.sleep(300)


def main(argv: list[str]) -> None:
    with world() as ranks:
        if ranks.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory") if argv == ["oom"] else ValueError("a bug")
        time.sleep(300)


run_script(main)
