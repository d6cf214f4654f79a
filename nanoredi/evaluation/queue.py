"""A work queue shared by all ranks: each takes the next item when it is free."""

import os

import torch.distributed as dist

from nanoredi.trainer.distributed import PATIENCE, World


class Queue:
    """The numbers from 0 to length - 1, each given to one rank only. All ranks must create it together."""

    def __init__(self, world: World, length: int):
        self.world, self.length = world, length
        self._store: dist.Store = dist.HashStore()
        if world.size > 1:
            # A separate store: in the process group's, a queue would continue the count of the one before.
            host = os.environ["MASTER_ADDR"]
            own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
            port = world.first(lambda: own.port if own else 0)
            self._store = own or dist.TCPStore(host, port, is_master=False)

    def next(self) -> int | None:
        """The next number; None when all have been given."""
        number = self._store.add("given", 1) - 1
        return number if number < self.length else None

    def wait(self) -> None:
        """Wait for all ranks, however long the slowest one's last item takes. If another rank fails, a collective would
        add a traceback to that rank's own message."""
        self._store.set(f"done {self.world.rank}", "")
        self._store.wait([f"done {rank}" for rank in range(self.world.size)], PATIENCE)
        dist.barrier()  # no rank uses the store any more, so rank 0 may close it
