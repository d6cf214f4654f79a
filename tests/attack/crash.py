"""Runs a script undisturbed, then again and again, killed at each of its writes and renames and started once more.

    python tests/attack/crash.py SCRIPT OUT STRIDE FLAG ...

The first run is in OUT/whole, those that were killed at place n in OUT/n, for every STRIDE-th n until a run has no n-th
place; prints how many that were. Runs are forks of this process, which has everything imported: they begin at once.
"""

import contextlib
import importlib
import os
import signal
import sys

from nanoredi.cpu import native
from nanoredi.trainer import loop

script, out, stride, *flags = sys.argv[1:]
main = importlib.import_module(script).main
# What takes its time in every process, and writes nothing.
native._COMPILER = "no-compiler"
loop.matrix_rate = lambda *_: 1e9


def ended(folder: str, place: int = 0) -> int:
    """The exit status of a fork that runs the script in OUT/folder; a signal's number is negative."""
    pid = os.fork()
    if not pid:
        if place:
            os.environ["NANOREDI_CRASH_AT"] = str(place)
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                main([word.replace("OUT", f"{out}/{folder}") for word in flags])
        except BaseException as error:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
            os.write(1, f"killed at place {place}: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if ended("whole"):
    sys.exit("the undisturbed run failed")
place = 1
while (status := ended(str(place), place)) == -signal.SIGKILL:
    if ended(str(place)):
        sys.exit(f"killed at place {place}, the same command failed")
    place += int(stride)
if status:
    sys.exit(f"to be killed at place {place}, the run failed")
print(place)
