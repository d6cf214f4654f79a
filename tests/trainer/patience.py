"""Ranks that wait for rank 0's work longer than a collective may take: half a second here.

torchrun --nproc_per_node 2 tests/trainer/patience.py
"""

import datetime
import time

from torch.distributed import distributed_c10d

from nanoredi.trainer.distributed import world

distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=0.5)
with world() as ranks:
    assert ranks.first(lambda: time.sleep(1.5) or "done") == "done"
