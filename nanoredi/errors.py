"""How nanoredi says that something given to it is wrong: one sentence for a person, and exit code 2."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what would be right."""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on its flags; bad input ends with one sentence and exit code 2, Ctrl-C with 130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        # Under torchrun every rank finds the same fault; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Who read the output has seen enough (`| head`); nothing is left to be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that does not exist: ' (did you mean X?)', or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
