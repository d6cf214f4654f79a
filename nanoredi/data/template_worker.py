"""The program that runs a chat template, in a separate process.

A template is a program from somebody else's checkpoint. Jinja's sandbox lets it read nothing but the messages, but does
not keep it from looping forever or filling the memory; limits on the process do.

The first line of the input is the template's source. Every further line is a list of dicts of variables, one for each
text to render; the answer to each line is a line with the list of texts, or with an error message. All lines are JSON.
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

_SECONDS, _BYTES = 3, 1 << 30  # limits: processor time per answer, and memory


class _Generation(Extension):
    """{% generation %} marks the assistant's text for trainers that use it as a mask; here it is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to templates."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and closes the input
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES if hard < 0 else min(_BYTES, hard), hard))  # < 0: no limit
    template = None
    for line in sys.stdin.buffer:
        # The signal's default action ends the process, whatever the template is doing.
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
        except Exception as error:  # an expression in a template may raise anything
            answer = json.dumps(f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
