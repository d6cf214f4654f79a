"""A checkpoint's own tokenizer and chat template: messages to text to token ids, and back.

The template is a Jinja program that ships with the checkpoint; it runs in Jinja's sandbox, where it can read the
messages and nothing else.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_json

# Stands where the last assistant message goes, to find out what a template puts before and after it.
_MARK = "\ue000answer\ue001"
# Of a batch of long traces the encodings take some 100 bytes a token, and three batches are in memory at once.
_ROWS_AT_ONCE = 64
T = TypeVar("T")


class Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Attributes:
        eos_id, pad_id: ids of the end-of-text and the padding token (equal in Qwen2.5's base models).
        stop_ids: the tokens that end a completion: eos, and what the template puts after an answer (Qwen2.5:
            <|im_end|>).
        files: the paths of the tokenizer's files, for copying beside new weights.

    Raises:
        UserError: from the constructor, for a missing or broken file, and for a template that shows no answer.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        names = (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "chat_template.jinja",
        )
        self.files = [self.folder / name for name in names if (self.folder / name).exists()]
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception for every fault of the file
            raise UserError(f"cannot read the tokenizer {self.folder / 'tokenizer.json'}: {error}") from None
        # A tokenizer.json may ask for cutting and padding; here every token counts, and nothing is padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        config = read_json(self.folder / "tokenizer_config.json")
        self._special = {
            name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.eos_id = self._id_of("eos_token")
        self.pad_id = self._id_of("pad_token") if self._special["pad_token"] else self.eos_id
        self.template = self._compile(config)
        turn_end = self.encode(
            self.split([{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}])[1].removeprefix("1")
        )
        self.stop_ids = sorted({self.eos_id, *turn_end[:1]})

    def encode(self, text: str) -> list[int]:
        """Token ids of text; special tokens written in it count as themselves, and none is added."""
        return self.encode_batch([text])[0].ids

    def encode_batch(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """One encoding a text, on all cores, without the character offsets, which would take a quarter of the time.

        Raises:
            UserError: when the vocabulary has no token for something in a text.
        """
        try:
            return self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            if len(texts) > 1:
                for text in texts:
                    self.encode_batch([text])
            raise UserError(f"the tokenizer of {self.folder} cannot write {texts[0][:80]!r}: {error}") from None

    def num_before(self, text: str, num_chars: int) -> int:
        """How many of a text's tokens start before a character."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return sum(start < num_chars for start, _ in encoding.offsets)

    def encode_rows(self, rows: Iterable[tuple[str, list[str], T]]) -> Iterator[tuple[T, list[tokenizers.Encoding]]]:
        """Encode the texts of many rows, on all cores and ahead of whoever takes them, in order.

        Args:
            rows: (where it stands, for messages; texts; whatever the taker wants back beside their encodings).

        Raises:
            UserError: naming the row that the vocabulary has no tokens for.
        """

        # The last long text of a batch keeps one core busy; the next batch is at work on the others meanwhile.
        rows, ahead = iter(rows), deque()
        with ThreadPoolExecutor(2) as pool:
            while batch := list(islice(rows, _ROWS_AT_ONCE)):
                ahead.append((batch, pool.submit(self._encode_batch_of_rows, batch)))
                if len(ahead) > 2:
                    yield from _taken(*ahead.popleft())
            while ahead:
                yield from _taken(*ahead.popleft())

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def stream(self, stops: Sequence[str] = ()) -> "Stream":
        """Decodes a completion as its tokens come, up to where one of these texts begins."""
        return Stream(self.backend, stops)

    def prompt(self, messages: list[dict[str, str]], think: bool = False) -> str:
        """The conversation as text, up to where the model is to answer.

        Args:
            messages: [{"role", "content"}], the user's the last.
            think: open <think> for the model as the paper's evaluation does: right after the role, with no newline
                between.
        """
        text = self.render(messages, add_generation_prompt=True)
        if think and not text.rstrip().endswith("<think>"):
            text = text.rstrip("\n") + "<think>\n"
        return text

    def split(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """The conversation as text, cut before the last message, which is the assistant's: (prompt, completion).

        The prompt ends with what the template puts before an answer, the completion holds all that it puts after. The
        template sees a mark in the answer's place, so one that drops <think>...</think> from earlier turns cannot drop
        it here.

        Raises:
            UserError: when the template does not show the answer once.
        """
        parts = self.render([*messages[:-1], {**messages[-1], "content": _MARK}]).split(_MARK)
        if len(parts) != 2:
            raise UserError(
                f"the chat template of {self.folder} shows the last answer {len(parts) - 1} times; it must show it once"
            )
        return parts[0], messages[-1]["content"] + parts[1]

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it.

        Raises:
            UserError: when the template refuses the messages.
        """
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._special)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template of {self.folder} refuses the messages: {error}") from None

    def _encode_batch_of_rows(self, batch: list[tuple[str, list[str], Any]]) -> list[tokenizers.Encoding]:
        try:
            return self.encode_batch([text for _, texts, _ in batch for text in texts])
        except UserError:
            for where, texts, _ in batch:
                try:
                    self.encode_batch(texts)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
            raise

    def _compile(self, config: dict[str, Any]):
        path = self.folder / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
        if isinstance(source, list):  # several templates by name
            source = {t["name"]: t["template"] for t in source}.get("default")
        if not isinstance(source, str):
            raise UserError(
                f"{self.folder} has no chat template, neither in tokenizer_config.json nor as chat_template.jinja"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template of {self.folder} is broken: {error}") from None

    def _id_of(self, name: str) -> int:
        token = self._special[name]
        token_id = None if token is None else self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"{self.folder / 'tokenizer_config.json'}: {name} is {token!r}, which the vocabulary does not hold"
            )
        return token_id


class Stream:
    """Text as its tokens come.

    Attributes:
        text: what can be shown so far: half a character waits for its other half, and what may begin a stop text for more.
        stopped: whether a stop text has come. It is not in the text, nor is what followed it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, stops: Sequence[str] = ()):
        self.backend, self.stops = backend, stops
        self.decoder = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self.text, self.stopped, self._waiting = "", False, ""

    def push(self, token: int) -> None:
        text = self._waiting + (self.decoder.step(self.backend, token) or "")
        first = min((text.find(stop) for stop in self.stops if stop in text), default=-1)
        self.stopped = self.stopped or first >= 0
        end = first if first >= 0 else len(text) - may_begin(text, self.stops)
        self.text, self._waiting = self.text + text[:end], text[end:]

    def finish(self) -> None:
        """The completion has ended: nothing waits any more."""
        self.text, self._waiting = self.text + self._waiting * (not self.stopped), ""


def may_begin(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    return max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)


def _taken(batch: list[tuple[str, list[str], T]], job: Future) -> Iterator[tuple[T, list[tokenizers.Encoding]]]:
    encodings = iter(job.result())
    for _, texts, kept in batch:
        yield kept, list(islice(encodings, len(texts)))


def user_message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def check_messages(where: str, value: Any) -> list[dict[str, str]]:
    """A row's message list as it is, or its string as the user's one message.

    Raises:
        UserError: when it is neither, naming `where`.
    """
    if isinstance(value, str) and value.strip():
        return user_message(value)
    well_formed = (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )
    if not well_formed:
        raise UserError(f"{where} must be text, or a list of messages with role and content, and not empty")
    return value


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which writes it as text or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _raise(message: str):
    raise TemplateError(message)
