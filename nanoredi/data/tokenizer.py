"""A checkpoint's own tokenizer: text to token ids and back."""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from nanoredi.common.disk import regular
from nanoredi.common.errors import UserError, naming
from nanoredi.common.files import check, read_json, read_text
from nanoredi.common.runs import check_model
from nanoredi.data.chat import Chat
from nanoredi.data.messages import Messages

# Encodings take some 100 bytes per token, and three batches of rows are in memory at once.
_ROWS_AT_ONCE = 64
_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.jinja"
).split()
_SPECIAL = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_TOKEN = (str, {"content": str}, None)  # the shapes of a token in tokenizer_config.json
T = TypeVar("T")


class Tokenizer(Chat):
    """The tokenizer of a Hugging Face folder, with its chat template.

    Attributes:
        eos_id, pad_id: ids of the end-of-text and the padding token (equal in Qwen2.5's base models).
        stop_ids: ids of the tokens that end a completion: eos, and the one that the template writes after an answer
            (Qwen2.5: <|im_end|>).
        files: the paths of the tokenizer's files, to be copied next to new weights.

    Raises:
        UserError: from the constructor, for a missing or broken file, and as Chat does.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(check_model(str(folder), "tokenizer.json"))
        self.files = [regular(self.folder / name) for name in _FILES if (self.folder / name).exists()]
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception for every fault of the file
            raise UserError(f"cannot read the tokenizer {self.folder / 'tokenizer.json'}: {error}") from None
        # A tokenizer.json may switch on truncation and padding, which would falsify lengths and labels.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._config_file = self.folder / "tokenizer_config.json"
        older = self.folder / "special_tokens_map.json"  # written by older versions of transformers
        special: dict[str, str] = {}
        for path in [older] * older.exists() + [self._config_file]:
            config = check(str(path), read_json(path), {f"{name}?": _TOKEN for name in _SPECIAL})
            # A token that is null is left out, so a template that uses it writes nothing.
            tokens = {name: config[name] for name in _SPECIAL if config.get(name) is not None}
            special |= {name: one["content"] if isinstance(one, dict) else one for name, one in tokens.items()}
        self.eos_id = self._id_of("eos_token", special)
        self.pad_id = self._id_of("pad_token", special) if special.get("pad_token") else self.eos_id
        marks = {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}
        super().__init__(self._template_source(config), str(folder), special, list(marks.values()))
        end = self.encode(self.end.strip())
        self.stop_ids = sorted({self.eos_id, *[i for i in end if i in marks][:1]})
        self._end_tokens = max(1, len(self.encode(self.end)))

    def ended(self, ids: list[int]) -> list[int]:
        """A completion's ids, with eos appended unless the template's end contains it."""
        return ids if self.eos_id in ids[-self._end_tokens :] else [*ids, self.eos_id]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Special tokens in the text are recognised; none is added."""
        return self.encode_batch([text])[0].ids

    def encode_batch(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """The encodings of the texts, made on all cores; without character offsets, which would take a third longer.

        Raises:
            UserError: when the vocabulary has no token for something in a text.
        """
        try:
            return self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            if len(texts) > 1:
                return [self.encode_batch([text])[0] for text in texts]  # raises the error of the text at fault
            if half := half_pair(texts[0]):
                place = f"...{texts[0][max(0, half.start() - 20) : half.end()]}"
                raise UserError(f"half a surrogate pair, which is not a character, ends this text: {place!r}") from None
            raise UserError(f"the tokenizer of {self.folder} cannot encode {texts[0][:80]!r}: {error}") from None

    def num_before(self, text: str, num_chars: int) -> int:
        """The number of a text's tokens that start before the character num_chars."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return sum(start < num_chars for start, _ in encoding.offsets)

    def encode_rows(self, rows: Iterable[tuple[str, list[str], T]]) -> Iterator[tuple[T, list[tokenizers.Encoding]]]:
        """Encode the texts of many rows in order, on all cores, up to two batches ahead of the consumer.

        Args:
            rows: (place for error messages; texts; anything, which is yielded with their encodings).

        Raises:
            UserError: naming the row that the vocabulary has no tokens for.
        """
        # While the last long text of a batch keeps one core busy, the others work on the next batch.
        rows, ahead = iter(rows), deque[Future]()
        with ThreadPoolExecutor(2) as pool:
            while (batch := list(islice(rows, _ROWS_AT_ONCE))) or ahead:
                if batch:
                    ahead.append(pool.submit(self._encode_batch_of_rows, batch))
                if len(ahead) > 2 or not batch:
                    yield from ahead.popleft().result()

    def _encode_batch_of_rows(self, rows: list[tuple[str, list[str], T]]) -> list[tuple[T, list[tokenizers.Encoding]]]:
        try:
            encodings = iter(self.encode_batch([text for _, texts, _ in rows for text in texts]))
        except UserError:
            for where, texts, _ in rows:
                with naming(where):
                    self.encode_batch(texts)
            raise
        return [(kept, list(islice(encodings, len(texts)))) for _, texts, kept in rows]

    def lengths_of_rows(self, rows: Iterable[tuple[str, Messages, Messages, T]]) -> Iterator[tuple[T, list[int]]]:
        """The numbers of tokens of each row's prompt and answers, in order.

        Args:
            rows: (place for error messages; prompt; answers to it; anything, which is yielded with the lengths).

        Raises:
            UserError: naming the row that the template refuses or the vocabulary has no tokens for.
        """

        def texts_of_rows() -> Iterator[tuple[str, list[str], tuple[T, bool]]]:
            for where, prompt, answers, kept in rows:
                with naming(where):
                    texts, as_trained = self.measured(prompt, answers)
                yield where, texts, (kept, as_trained)

        for (kept, as_trained), encodings in self.encode_rows(texts_of_rows()):
            if as_trained:
                prompt, *answers = encodings
                yield kept, [len(prompt), *(len(self.ended(answer.ids)) for answer in answers)]
            else:
                yield kept, [len(encoding) + 1 for encoding in encodings]  # plus 1 as in the original

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def stream(self, stops: Sequence[str] = (), shown: bool = True) -> "Stream | None":
        """A decoder of a completion, token by token, up to the first of these stop strings or the template's own. None
        if there are none and the completion is not shown while it is sampled."""
        stops = [*stops, *filter(None, [self.stop_text])]
        return Stream(self.backend, stops) if stops or shown else None

    def _template_source(self, config: dict[str, Any]) -> str:
        path = self.folder / "chat_template.jinja"
        source = read_text(path) if path.exists() else config.get("chat_template")
        if isinstance(source, list):
            source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        names = ""
        if isinstance(source, dict):  # {name: template}
            source, names = source.get("default"), f" named default, only {', '.join(map(str, source))}"
        if not isinstance(source, str):
            raise UserError(f"{self.folder} has no chat template{names}, in {self._config_file.name} or as {path.name}")
        return source

    def _id_of(self, name: str, special: dict[str, str]) -> int:
        token = special.get(name, "")
        if (token_id := self.backend.token_to_id(token)) is None:
            fault = f"is {token!r}, which is not in the vocabulary" if token else "is missing"
            raise UserError(f"{self._config_file}: {name} {fault}")
        return token_id


class Stream:
    """Decodes a completion token by token.

    Attributes:
        text: the text that can be shown so far. An incomplete character, and what may be the start of a stop string, is
            held back until more tokens arrive.
        stopped: whether a stop string has appeared. The text ends before it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, stops: Sequence[str] = ()):
        self.backend, self.stops = backend, stops
        self.decoder = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self.text, self.stopped, self._waiting, self._tokens = "", False, "", []

    def push(self, token: int) -> None:
        self._tokens.append(token)
        try:
            text = self.decoder.step(self.backend, token)
        except Exception:  # tokenizers raises bare Exception where bytes that began as text turn out not to be any
            return
        self._add(self._waiting + (text or ""))

    def finish(self) -> None:
        """The completion has ended: release the text that is held back, so that the text is decode()'s."""
        if not self.stopped:
            self._add(self.backend.decode(self._tokens, skip_special_tokens=True)[len(self.text) :])
            self.text += self._waiting * (not self.stopped)

    def _add(self, text: str) -> None:
        first = min((text.find(stop) for stop in self.stops if stop in text), default=-1)
        self.stopped = self.stopped or first >= 0
        end = first if first >= 0 else len(text) - may_begin(text, self.stops)
        self.text, self._waiting = self.text + text[:end], text[end:]


def may_begin(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the start of a mark."""
    return max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)


def half_pair(text: str) -> re.Match[str] | None:
    """The first half surrogate pair in a text, if any: JSON allows one, UTF-8 does not."""
    return None if text.isascii() else re.search("[\ud800-\udfff]", text)
