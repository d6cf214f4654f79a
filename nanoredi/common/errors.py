"""How nanoredi says that something given to it is wrong: one sentence for a person, and exit code 2."""

import contextlib
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what would be right."""


class Stopped(Exception):
    """The run was asked to stop, and all it needs to go on is saved. The message says so."""

    code = 0  # what the process exits with


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Inside, what is wrong is said with the place of the row that it is wrong in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on its flags; what the user or the machine brought about ends with one sentence and exit code
    2, Ctrl-C with 130. Control characters in what is printed, whoever wrote them, are shown escaped."""
    write = sys.stdout.write
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout.write = lambda text: write(visible(text))  # type: ignore[method-assign]
    try:
        main(sys.argv[1:])
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, flush=True)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Who read the output has seen enough (`| head`); nothing is left to be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        _say(visible(f"error: {text}"))
        sys.exit(2)


def sentence(error: BaseException) -> str | None:
    """What an error says to the user, in a line, or None for one that only a fault in the program explains."""
    text = None
    if isinstance(error, UserError):
        text = str(error)
    # torch has a RuntimeError for memory on a CPU, and an OutOfMemoryError on a GPU.
    elif isinstance(error, (MemoryError, OSError, RuntimeError)) and re.search(_NO_MEMORY, repr(error)):
        text = f"there is not enough memory ({(str(error) or 'it is all in use').splitlines()[0]}); {_LESS_MEMORY}"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'the disk'}: {error.strerror or error}"
    elif isinstance(error, (RecursionError, OverflowError, UnicodeError)):
        text = f"something given is nested too deep, too large, or no text: {error}"
    return text and text.strip().replace("\n", "\\n")


_NO_MEMORY = "MemoryError|out of memory|an(no|')t allocate memory|not enough memory"
_LESS_MEMORY = (
    "training takes less with a smaller --max_tokens_per_micro_batch, --activation_checkpointing attention, --offload or more "
    "GPUs, sampling with a smaller --cache_gb or --batch_size"
)
_CONTROLS = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {ord("\n"), ord("\t")}
_ESCAPED = {c: ascii(chr(c))[1:-1] for c in _CONTROLS}


def visible(text: str) -> str:
    """The text with the characters escaped that a terminal would obey, and not show; all but what dims text and what ends
    that, which chat uses and which do no harm."""
    return re.sub(r"\\x1b\[([02])m", "\x1b[\\1m", text.translate(_ESCAPED))


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
