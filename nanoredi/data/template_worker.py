"""The program that runs a chat template, in a process of its own.

A template is a program that came with somebody's checkpoint. Jinja's sandbox keeps it from reading anything but the
messages; nothing in Jinja keeps it from running for ever or filling the memory, so the limits are the process's.

The first line of the input is the template's source. Every further line is a list of variables, one for each text that
is wanted; the answer to each line is a line with the texts or with what went wrong. All lines are JSON.
"""

import contextlib
import functools
import json
import resource
import signal
import sys
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS, _BYTES = 3, 1 << 30  # the processor's time for an answer, and memory


class _Generation(Extension):
    """{% generation %} marks what the assistant wrote, for trainers that mask by it; its text is shown as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives its templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _raise(message: str):
    raise TemplateError(message)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the input
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES if hard < 0 else min(_BYTES, hard), hard))  # < 0: there is none
    template = None
    for line in sys.stdin.buffer:
        # Whoever takes longer is ended by the signal, which needs nobody to listen.
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            request = json.loads(line)
            if template is None:
                template, texts = _environment().from_string(request), []
            else:
                texts = [template.render(variables) for variables in request]
            answer = json.dumps(texts)
        except MemoryError:
            answer = json.dumps("it needs too much memory")
        except TemplateError as error:
            answer = json.dumps(error.message)
        except Exception as error:  # whatever an expression of the template's may raise
            answer = json.dumps(f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
