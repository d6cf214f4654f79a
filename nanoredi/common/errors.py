"""How nanoredi says that something given to it is wrong: one sentence for a person, and exit code 2."""

import difflib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what would be right."""


class Stopped(Exception):
    """The run was asked to stop, and all it needs to go on is saved. The message says so."""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on its flags; bad input and a full disk end with one sentence and exit code 2, Ctrl-C with
    130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Who read the output has seen enough (`| head`); nothing is left to be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _say(f"error: cannot write {error.filename or 'to the disk'}: {error.strerror}")
        sys.exit(2)


def _say(text: str) -> None:
    """Under torchrun every rank finds the same fault, and one of them says it. Where it is one rank's own, rank 0 is still
    alive after a while: torchrun has ended nobody."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)
        text = f"rank {rank}: {text}"
    print(text, file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that does not exist: ' (did you mean X?)', or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
