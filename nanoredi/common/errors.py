"""Errors for the user: one sentence that says what is wrong, and exit code 2."""

import contextlib
import difflib
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what would be right."""


class Stopped(Exception):
    """The run was asked to stop, and has saved everything it needs to resume. The message says so."""

    code = 0  # the process's exit code


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Inside, a UserError gets the place of the row (file and line) in front of its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on its flags. Errors of the user or the machine end with one sentence and exit code 2, Ctrl-C
    with 130. Control characters in printed text are shown escaped, since the text may come from a file or a model."""
    # If a stream is closed (`>&-`), its number is taken here, lest a file of the run gets it and what libraries print.
    sys.stdin, sys.stdout, sys.stderr = (s or open(os.devnull, "r+") for s in (sys.stdin, sys.stdout, sys.stderr))
    write = sys.stdout.write
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout.write = lambda text: write(visible(text))  # type: ignore[method-assign]
    try:
        main(sys.argv[1:])
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            say(str(stopped), sys.stdout)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _discard(sys.stdout)  # its reader has closed it (`| head`)
        sys.exit(141)
    except Exception as error:
        sys.exit(report(error))


def report(error: Exception) -> int:
    """Print an error, and return the exit code: 2, or 1 for a bug, which is printed with its traceback.

    Under torchrun an error usually occurs on every rank, and only rank 0 should print it: the others wait, and are
    ended by torchrun. An error on one rank alone is printed by that rank after the wait.
    """
    if (text := sentence(error)) is None:
        traceback.print_exception(error)
        return 1
    text, rank = visible(f"error: {text}"), os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)
        text = f"rank {rank}: {text}"
    say(text, sys.stderr)
    return 2


def sentence(error: BaseException) -> str | None:
    """An error as one line for the user; None for an error that only a bug in the program explains."""
    text = None
    if isinstance(error, UserError):
        text = str(error)
    # Out of memory is a RuntimeError in torch, on a GPU its subclass OutOfMemoryError.
    elif isinstance(error, (MemoryError, OSError, RuntimeError)) and re.search(_NO_MEMORY, repr(error)):
        text = f"there is not enough memory ({(str(error) or 'it is all in use').splitlines()[0]}); {_LESS_MEMORY}"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'the disk'}: {error.strerror or error}"
    elif isinstance(error, (RecursionError, OverflowError, UnicodeError)):
        text = f"some input is nested too deep, too large, or not text: {error}"
    return text and text.strip().replace("\n", "\\n")


_NO_MEMORY = "MemoryError|out of memory|an(no|')t allocate memory|not enough memory"
_LESS_MEMORY = (
    "training takes less with a smaller --max_tokens_per_micro_batch, --activation_checkpointing attention, --offload "
    "or more GPUs, sampling with a smaller --cache_gb or --batch_size"
)
_CONTROLS = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {ord("\n"), ord("\t")}
_ESCAPED = {c: ascii(chr(c))[1:-1] for c in _CONTROLS}


def visible(text: str) -> str:
    """The text with a terminal's control characters escaped, except for the two harmless sequences that chat uses: dim,
    and reset."""
    return re.sub(r"\\x1b\[([02])m", "\x1b[\\1m", text.translate(_ESCAPED))


def say(text: str, stream: TextIO) -> None:
    """Print. A terminal or pipe that is gone, as after a closed ssh, is no error: it must not end a run."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that Python's flush at exit does not fail either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that does not exist: ' (did you mean X?)', or nothing when no known name is close."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
