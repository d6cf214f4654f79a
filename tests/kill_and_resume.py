"""Trains one run undisturbed, then others that are killed with SIGKILL at random moments and started again.

    python tests/kill_and_resume.py KILLS OUT FLAG ...

The first run is in OUT/0, the others are in OUT/1, OUT/2, ... until KILLS have struck. Runs are forks of this process,
which has everything imported: they begin at once.
"""

import contextlib
import os
import random
import signal
import sys
import time

# A process that has asked for a GPU cannot have it in its forks, and importing asks: they run on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import train_redi  # noqa: E402

kills, out, *flags = sys.argv[1:]
rng = random.Random(0)


def start(number: int) -> int:
    """The process id of a fork that trains OUT/number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        with contextlib.redirect_stdout(None):
            train_redi.main([*flags, "--out", f"{out}/{number}"])
    except BaseException as error:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


begin = time.monotonic()
os.waitpid(start(0), 0)
whole = time.monotonic() - begin
struck, number = 0, 1
while struck < int(kills):
    pid = start(number)
    time.sleep(rng.uniform(0.0, 0.8 * whole))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    struck += os.WIFSIGNALED(status)
    if os.path.exists(f"{out}/{number}/final"):
        # It may have been struck after that, with its states still there.
        if os.waitpid(start(number), 0)[1]:
            sys.exit("a finished run failed")
        number += 1
    elif os.WIFEXITED(status):
        sys.exit("a run failed")
os.waitpid(start(number), 0)  # the last one may end
