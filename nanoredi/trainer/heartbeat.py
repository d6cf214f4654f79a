"""Ranks that stop answering: without a word, the others would wait for one in a collective for a long time.

Every rank counts up in a store that rank 0 holds, beside its work, and looks at the others' counts. Who sees one stand
still for too long names it and ends its process; the launcher then ends the rest.
"""

import os
import sys
import threading
import time

import torch.distributed as dist


class Heartbeat:
    """Made by all ranks together; beats until stop()."""

    def __init__(self, rank: int, size: int, timeout_minutes: float):
        self.rank, self.size, self.timeout = rank, size, 60 * timeout_minutes
        host = os.environ["MASTER_ADDR"]
        port = [0]
        if rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = [self._store.port]
        dist.broadcast_object_list(port, src=0)
        if rank > 0:
            self._store = dist.TCPStore(host, port[0], is_master=False)
        self._changed = [time.monotonic()] * size
        self._stopped = threading.Event()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        counts = [0] * self.size
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            try:
                self._store.add(str(self.rank), 1)
                for rank in range(self.size):
                    count = self._store.add(str(rank), 0)
                    if count != counts[rank]:
                        counts[rank], self._changed[rank] = count, time.monotonic()
            except RuntimeError:  # rank 0 has ended, and with it the store: its launcher sees to that
                return self._stopped.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(min(1.0, self.timeout / 10)):
            now = time.monotonic()
            if now - before > self.timeout / 2:  # this process itself was stopped: the others' counts are old news
                self._changed = [now] * self.size
            before = now
            # Where rank 0 is silent, no count comes from the store any more.
            if now - max(self._changed) > self.timeout:
                self._end(0)
            for rank, changed in enumerate(self._changed):
                if now - changed > self.timeout and rank != self.rank:
                    self._end(rank)

    def _end(self, rank: int) -> None:
        minutes = f"{self.timeout / 60:g} minutes"
        print(f"error: rank {rank} has not answered for {minutes} (--timeout_minutes)", file=sys.stderr, flush=True)
        os._exit(2)
