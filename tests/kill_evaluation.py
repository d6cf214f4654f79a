"""Evaluates undisturbed into OUT/whole; then into OUT/broken with two ranks that are killed (SIGKILL) after 3 samples,
and again with one rank, which finds half a line, too.

    python tests/kill_evaluation.py OUT FLAG ...

Runs are forks of this process, which has everything imported: they begin at once.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

# A process that has asked for a GPU cannot have it in its forks, and importing asks: they run on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import evaluate  # noqa: E402

out, *flags = sys.argv[1:]


def start(folder: str, *more: str, **environment: str) -> int:
    """The process id of a fork that evaluates into OUT/folder."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    try:
        evaluate.main([*flags, "--out", f"{out}/{folder}", *more])
    except BaseException as error:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def wait_for(pid: int) -> None:
    if os.waitpid(pid, 0)[1]:
        sys.exit("a run failed")


wait_for(start("whole"))
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
pids = [start("broken", RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)]
path, deadline = Path(out, "broken", "samples.jsonl"), time.monotonic() + 60
while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 3):
    time.sleep(0.01)
for pid in pids:
    os.kill(pid, signal.SIGKILL)
for pid in pids:
    os.waitpid(pid, 0)
before = path.read_text()
Path(out, "before").write_text(before)
path.write_text(before + '{"model": "half a li')
wait_for(start("broken", "--batch_size", "7"))
