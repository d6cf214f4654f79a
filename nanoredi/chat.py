"""A conversation in the terminal: one line a turn, answers streamed, with their thinking dimmed."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from nanoredi.common.errors import UserError
from nanoredi.data.benchmarks import frame
from nanoredi.data.messages import with_system
from nanoredi.data.tokenizer import Tokenizer, may_begin
from nanoredi.sampler.sampler import Sampler
from nanoredi.sampler.scheduler import Request, requests_for

_MARKS = {"<think>": "\033[2m<think>", "</think>": "</think>\033[0m"}  # dim, and normal again


def chat(sampler: Sampler, tokenizer: Tokenizer, stops: list[str], template: str, system: str) -> None:
    """Take turns until the input ends. Ctrl-C ends an answer early; the conversation continues from there."""
    with contextlib.suppress(ImportError):  # a Python may have been built without it
        if sys.stdin.isatty():
            import readline  # noqa: F401  (gives input() line editing and history)
    history: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
            continue
        if line == "/reset":
            history = []
            print("(a new conversation)")
        if line in ("", "/reset"):
            continue
        messages = [*history, *frame(line, template)]
        try:
            prompt = tokenizer.prompt(with_system(messages, system))
            (request,) = requests_for([tokenizer.encode(prompt)], 1, sampler.config.seed, ["the conversation"])
            request.stream = tokenizer.stream(stops)
            sampler.add([request])
        except UserError as error:
            print(f"({error}; /reset starts a new conversation)")
            continue
        thinking = prompt.rstrip().endswith("<think>")
        _answer(sampler, request, thinking)
        # The history has the model's answers without their thinking.
        _, end, answer = request.stream.text.rpartition("</think>")
        if not end and (thinking or answer.lstrip().startswith("<think>")):
            answer = ""
        history = [*messages, {"role": "assistant", "content": answer.strip()}]


def _answer(sampler: Sampler, request: Request, thinking: bool) -> None:
    """Stream an answer, then print its length and speed."""
    start, shown, text = time.perf_counter(), 0, request.stream
    dims = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    print("\033[2m" * (thinking and dims), end="")
    with _interrupts() as asked:
        while not request.finish_reason:
            sampler.step()
            if asked and not request.finish_reason:
                sampler.end(request)
            end = len(text.text) - (0 if request.finish_reason else may_begin(text.text[-16:], [*_MARKS]))
            piece, shown = text.text[shown:end], max(shown, end)
            for mark, styled in _MARKS.items() if dims else ():
                piece = piece.replace(mark, styled)
            print(piece, end="", flush=True)
        speed = len(request.tokens) / (time.perf_counter() - start)
        print("\033[0m" * dims + f"\n{ending(request, bool(asked), f', {speed:,.1f} tokens/s')}", flush=True)


def ending(request: Request, interrupted: bool = False, more: str = "") -> str:
    """A completion's length and how it ended, for the line below it."""
    num = len(request.tokens)
    how = ", stopped" if interrupted else ", cut off" if request.finish_reason == "length" else ""
    return f"({num:,} token{'' if num == 1 else 's'}{how}{more})"


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Inside, Ctrl-C only adds to a list: interrupting a step would leave the sampler in an inconsistent state."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
