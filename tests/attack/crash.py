"""Runs a script undisturbed, then again and again, killed at each of its writes and renames and started once more.

    python tests/attack/crash.py SCRIPT OUT FIRST STRIDE FLAG ...

The first run is in OUT/whole, those that were killed at place n in OUT/n, for every STRIDE-th n from FIRST until a run has no n-th
place; prints how many places that were. Runs are forks of this process, which has everything imported: they begin at once.

A place is wherever the program calls may_crash, and wherever Python is about to open a file of the run for writing, to
make, rename, cut or remove one, whoever's code that is.
"""

import contextlib
import importlib
import os
import re
import signal
import sys

from nanoredi.common import disk
from nanoredi.common.errors import UserError
from nanoredi.cpu import native
from nanoredi.trainer import loop

script, out, first, stride, *flags = sys.argv[1:]
out = os.path.abspath(out)
main = importlib.import_module(script).main
# What takes its time in every process, and writes nothing.
native._COMPILER = "no-compiler"
loop.matrix_rate = lambda *_: 1e9
disk._sync_entry = lambda path: None
_CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def hook(event: str, words: tuple) -> None:
    writes = event == "open" and words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in _CHANGES) and os.path.abspath(str(words[0])).startswith(out):
        disk.may_crash()


def ended(folder: str, place: int = 0) -> int:
    """The exit status of a fork that runs the script in OUT/folder; a signal's number is negative."""
    pid = os.fork()
    if not pid:
        if place:
            os.environ["NANOREDI_CRASH_AT"] = str(place)
            sys.addaudithook(hook)
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                main([word.replace("OUT", f"{out}/{folder}") for word in flags])
        except BaseException as error:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
            if isinstance(error, UserError) and re.search(
                "is there already|is not empty|is not an empty folder", str(error)
            ):
                os._exit(0)  # what does not go on was killed when all was done
            os.write(1, f"killed at place {place}: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if ended("whole"):
    sys.exit("the undisturbed run failed")
place = int(first)
while (status := ended(str(place), place)) == -signal.SIGKILL:
    if ended(str(place)):
        sys.exit(f"killed at place {place}, the same command failed")
    place += int(stride)
if status:
    sys.exit(f"to be killed at place {place}, the run failed")
print(place)
