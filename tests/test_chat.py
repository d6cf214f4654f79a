"""Turns in the terminal: what the model sees of them, what the reader sees, and what Ctrl-C ends."""

import builtins
import os
import signal
import sys

import pytest

from nanoredi.chat import _answer, chat
from nanoredi.config import SamplingConfig
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.sampler.scheduler import Request


class Scripted:
    """A sampler that answers with given texts, a token a step; on_step is called before each."""

    def __init__(self, tokenizer, answers, on_step=lambda: None):
        self.tokenizer, self.answers, self.on_step = tokenizer, iter(answers), on_step
        self.config, self.prompts = SamplingConfig(), []

    def add(self, requests):
        (self.request,) = requests
        self.prompts.append(self.tokenizer.backend.decode(self.request.prompt, skip_special_tokens=False))
        self.coming = self.tokenizer.encode(next(self.answers))

    def step(self):
        self.on_step()
        self.request.tokens.append(self.coming.pop(0))
        self.request.stream.push(self.request.tokens[-1])
        if not self.coming or self.request.stream.stopped:
            self.end(self.request)

    def end(self, request):
        request.stream.finish()
        request.finish_reason = "stop"


@pytest.fixture
def tokenizer(toy_data):
    return Tokenizer(toy_data / "tokenizer")


def talk(monkeypatch, lines, *chat_arguments):
    lines = iter(lines)

    def say(prompt):
        line = next(lines, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", say)
    chat(*chat_arguments)


def test_a_conversation_keeps_its_turns_without_their_thinking(monkeypatch, tokenizer, capsys):
    answers = ["<think>b+2=3;</think>3", "<think>b+2", "7", "8"]
    sampler = Scripted(tokenizer, answers)
    lines = ["a=1", "", "b=2", KeyboardInterrupt, "c=3", "xyz", "/reset", "d=4"]
    talk(monkeypatch, lines, sampler, tokenizer, [], "{problem}:", "")
    assert sampler.prompts == [
        "<user>a=1:<assistant>",
        "<user>a=1:<assistant>3<user>b=2:<assistant>",
        "<user>a=1:<assistant>3<user>b=2:<assistant><user>c=3:<assistant>",  # its thinking had not ended
        "<user>d=4:<assistant>",
    ]
    said = capsys.readouterr().out
    assert "<think>b+2=3;</think>3\n(9 tokens, " in said and "\033" not in said and "7\n(1 token, " in said
    assert "cannot encode" in said and "(a new conversation)" in said and "Ctrl-D ends" in said


def test_a_conversation_without_readline(monkeypatch, tokenizer, capsys):
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    talk(monkeypatch, ["a=1"], Scripted(tokenizer, ["7"]), tokenizer, [], "", "")
    assert "7\n(1 token, " in capsys.readouterr().out


def test_ctrl_c_ends_only_the_answer(monkeypatch, tokenizer, capsys):
    steps = []

    def interrupt():
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    sampler = Scripted(tokenizer, ["1234567", "8"], interrupt)
    before = signal.getsignal(signal.SIGINT)
    talk(monkeypatch, ["a=1", "b=2"], sampler, tokenizer, [], "", "")
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr().out
    assert "123\n(3 tokens, stopped, " in said and "8\n(1 token, " in said
    assert sampler.prompts[1] == "<user>a=1<assistant>123<user>b=2<assistant>"


def test_ctrl_c_while_the_last_line_of_an_answer_is_printed_ends_nothing(monkeypatch, tokenizer):
    monkeypatch.setattr("nanoredi.chat.ending", lambda *_: str(os.kill(os.getpid(), signal.SIGINT)))
    sampler = Scripted(tokenizer, ["7", "8"])
    talk(monkeypatch, ["a=1", "b=2"], sampler, tokenizer, [], "", "")
    assert sampler.prompts[1] == "<user>a=1<assistant>7<user>b=2<assistant>"


@pytest.mark.parametrize(
    "answer, opened, environment, shown",
    [
        ("<think>1</think>2", False, {}, "\033[2m<think>1</think>\033[0m2\033[0m\n("),
        ("1</think>2", True, {}, "\033[2m1</think>\033[0m2\033[0m\n("),
        ("1=2", False, {}, "1=2\033[0m\n("),
        ("1</think>2", True, {"NO_COLOR": "1"}, "1</think>2\n("),
        ("1</think>2", True, {"TERM": "dumb"}, "1</think>2\n("),
    ],
)
def test_thinking_is_dimmed_on_a_terminal(monkeypatch, tokenizer, capsys, answer, opened, environment, shown):
    sampler = Scripted(tokenizer, [answer])
    request = Request([1], stream=tokenizer.stream())
    sampler.add([request])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.setenv(name, environment.get(name, ""))
    _answer(sampler, request, opened)
    assert capsys.readouterr().out.startswith(shown)


def test_think_tags_of_several_tokens_are_found(monkeypatch, tokenizer, capsys):
    sampler = Scripted(tokenizer, [""])
    sampler.answers = iter(["1"])
    request = Request([1], stream=tokenizer.stream())
    sampler.add([request])
    pieces = iter(["<", "<th", "<think>ab", "<think>ab</", "<think>ab</think>c"])

    def step():
        request.stream.text = next(pieces)
        if request.stream.text.endswith("c"):
            request.finish_reason = "stop"

    sampler.step = step
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    _answer(sampler, request, False)
    assert capsys.readouterr().out.startswith("\033[2m<think>ab</think>\033[0mc\033[0m\n(")
