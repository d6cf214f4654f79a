"""Work that ranks take one piece after the other, each when it is free."""

import datetime
import os

import torch.distributed as dist

from nanoredi.trainer.distributed import World


class Queue:
    """Numbers from 0 up, each for the one rank that asks next; made by all ranks together."""

    def __init__(self, world: World, length: int):
        self.world, self.length = world, length
        self._store: dist.Store = dist.HashStore()
        if world.size > 1:
            # A store of its own: the process group's would mix up one queue's count with the next one's.
            host = os.environ["MASTER_ADDR"]
            own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
            port = world.first(lambda: own.port if own else 0)
            self._store = own or dist.TCPStore(host, port, is_master=False)

    def next(self) -> int | None:
        """The next number; None when all have been given."""
        number = self._store.add("given", 1) - 1
        return number if number < self.length else None

    def wait(self) -> None:
        """Until every rank has come here, however long the slowest one's last work takes: a collective gives up."""
        self._store.set(f"done {self.world.rank}", "")
        self._store.wait([f"done {rank}" for rank in range(self.world.size)], datetime.timedelta(days=30))
        dist.barrier()  # no rank asks any more, so rank 0 may let the store go
