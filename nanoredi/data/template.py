"""A checkpoint's chat template, run by template_worker.py under limits of time and memory."""

import contextlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError


class Template:
    """A Jinja template. Only one thread may use templates: a worker answers one request after the other.

    Args:
        source: the template's text.
        name: its checkpoint's name, for error messages.

    Raises:
        UserError: when it is not a template, or needs too much time or memory to be parsed.
    """

    def __init__(self, source: str, name: str):
        self.source, self.name = source, name
        _, answer = _worker(source, os.getpid())
        if isinstance(answer, str):
            raise UserError(f"the chat template of {name} is broken: {answer}")

    def render(self, *jobs: dict[str, Any]) -> list[str]:
        """The rendered texts, one for each dict of variables.

        Raises:
            UserError: when the template refuses them, fails, or needs too much time or memory.
        """
        process, _ = _worker(self.source, os.getpid())
        answer = _ask(process, jobs)
        if isinstance(answer, str):
            raise UserError(f"the chat template of {self.name} refuses the messages: {answer}")
        return answer


# Starting a worker takes a tenth of a second, so those of recent templates are kept; a forked process needs its own.
@lru_cache(maxsize=4)
def _worker(source: str, _pid: int) -> tuple[subprocess.Popen, Any]:
    """A worker that has parsed the template, and its answer to that."""
    # -P: the modules next to the program must not shadow those of the standard library.
    command = [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return process, _ask(process, source)


def _ask(process: subprocess.Popen, request: Any) -> Any:
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:  # it ended before it had read everything
        answer = b""
    if not answer.endswith(b"\n"):
        _worker.cache_clear()
        process.kill()
        with contextlib.suppress(OSError):  # raised if there is unread input
            process.stdin.close()
        return "it took too long, or ended the process that ran it"
    answer = json.loads(answer)
    return " ".join(answer.split())[:300] if isinstance(answer, str) else answer
