"""Runs a script alone, then again and again twice at once.

    python tests/attack/twice.py SCRIPT FOLDER TIMES FLAG ...

In flags OUT stands for a run's folder and CACHE for that of its cache. The first run is in FOLDER/whole. Of the others, every
other time both are in one folder, FOLDER/n/a, and else in two, a and b, with one cache. Runs are forks of this process, which
has everything imported. The second begins a random moment after the first. Prints how often it was refused, or who failed.
"""

import contextlib
import importlib
import os
import random
import sys
import time

from nanoredi.common import disk
from nanoredi.common.errors import sentence
from nanoredi.cpu import native
from nanoredi.trainer import loop

script, folder, times, *flags = sys.argv[1:]
main = importlib.import_module(script).main
native._COMPILER = "no-compiler"
loop.matrix_rate = lambda *_: 1e9
disk._sync_entry = lambda path: None


def start(out: str, cache: str, wait: float = 0.0) -> int:
    """The process id of a fork that runs the script."""
    pid = os.fork()
    if pid:
        return pid
    time.sleep(wait)
    status = 0
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            main([word.replace("OUT", out).replace("CACHE", cache) for word in flags])
    except BaseException as error:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
        status = 1 if sentence(error) is None else 2
        os.write(1, f"{out}: {sentence(error) or repr(error)}\n".encode())
    os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


begin = time.monotonic()
if ended(start(f"{folder}/whole", f"{folder}/whole-cache")):
    sys.exit("the run alone failed")
whole = time.monotonic() - begin
rng, refused = random.Random(0), 0
for number in range(int(times)):
    place, same = f"{folder}/{number}", number % 2 == 0
    os.mkdir(place)
    wait = 0.0 if rng.random() < 0.5 else rng.uniform(0.0, whole)
    pids = [start(f"{place}/a", f"{place}/cache"), start(f"{place}/{'a' if same else 'b'}", f"{place}/cache", wait)]
    ends = [ended(pid) for pid in pids]
    if sorted(ends) != [0, 0] and not (same and sorted(ends) == [0, 2]):
        sys.exit(f"{place}: they ended with {ends}")
    refused += 2 in ends
print(f"{times} times, {refused} refused")
