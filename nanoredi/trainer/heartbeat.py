"""Notice a rank that has stopped answering; without this, the others would wait for it in a collective for a long time.
A rank that fails ends at once.

Beside its work every rank increments a counter in a store that rank 0 holds, and reads the others' counters. The first
to see one unchanged for too long names that rank and ends its own process; the launcher then ends the rest.
"""

import contextlib
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from nanoredi.common.errors import Stopped, report, say


class Heartbeat(contextlib.AbstractContextManager):
    """Made by all ranks together; beats inside a `with` block, and ends the process where that ends with an error."""

    def __init__(self, rank: int, size: int, timeout_minutes: float):
        self.rank, self.size, self.timeout = rank, size, 60 * timeout_minutes
        host = os.environ["MASTER_ADDR"]
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        port = [own.port if own else 0]
        dist.broadcast_object_list(port, src=0)
        self._store = own or dist.TCPStore(host, port[0], is_master=False)
        self._changed = [time.monotonic()] * size
        self._stopped = threading.Event()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self._stopped.set()
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            # Leaving the process group, NCCL would wait for the other ranks, which may have no error.
            os._exit(report(error))

    def _beat(self) -> None:
        counts = [0] * self.size
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            try:
                self._store.add(str(self.rank), 1)
                for rank in range(self.size):
                    count = self._store.add(str(rank), 0)
                    if count != counts[rank]:
                        counts[rank], self._changed[rank] = count, time.monotonic()
            except RuntimeError:  # rank 0 has exited, and the store with it: its launcher ends the others
                return self._stopped.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            now = time.monotonic()
            if now - before > self.timeout / 2:  # this process itself was suspended: the counts it has are stale
                self._changed = [now] * self.size
            before = now
            # While rank 0 is silent, the store returns no counts at all.
            if now - max(self._changed) > self.timeout:
                self._end(0)
            for rank, changed in enumerate(self._changed):
                if now - changed > self.timeout and rank != self.rank:
                    self._end(rank)

    def _end(self, rank: int) -> None:
        say(f"error: rank {rank} has not answered for {self.timeout / 60:g} minutes (--timeout_minutes)", sys.stderr)
        os._exit(2)
