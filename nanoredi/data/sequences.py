"""JSONL rows to token sequences, each token marked as learned or not; kept on disk, keyed by the data and the
tokenizer, so that a second start only maps them into memory.

Stage 1 rows are {"messages": [...]}, stage 2 rows {"prompt", "chosen", "rejected"}; each of these three is text (the
user's message, the assistant's message) or a list of messages. Both stages follow the original's token rules, which
differ:

    stage 1   the whole templated conversation is tokenised at once; eos is appended unless there; cut on the right;
              learned is what follows the last assistant header, except the padding token, which is eos in Qwen2.5's
              base models
    stage 2   prompt and completion are tokenised apart; eos is appended to the completion unless there; of a long
              prompt the last tokens are kept, a long completion is cut on the right; learned is the completion, eos
              included
"""

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_rows
from nanoredi.common.progress import progress
from nanoredi.data.raw import num_rows
from nanoredi.data.tokenizer import Tokenizer, check_messages

# Part of the cache's key: raise it when the rules above change.
_RULES = 2
_ARRAYS = (("tokens", np.int32), ("learned", np.bool_))
Tokens = tuple[np.ndarray, np.ndarray]  # tokens (n,) int32 and learned (n,) bool


class Sequence(NamedTuple):
    """A prompt and a trace as tokens, and what an optimiser step makes of it.

    Attributes:
        tokens: (n,) integers, at least 2.
        learned: (n,) bool, the tokens the loss is taken on.
        name: what to call it before the user.
        side: "chosen" or "rejected"; all of stage 1's are chosen.
        weight: of each learned token's log-probability in the loss, where that is linear in them (objectives.py).
        share: of each learned token's log-probability in the step's mean over its side's.
        reference: the trace's log-probability under DPO's reference model.
    """

    tokens: np.ndarray
    learned: np.ndarray
    name: str = ""
    side: str = "chosen"
    weight: float = 0.0
    share: float = 0.0
    reference: float = 0.0

    @property
    def num_inputs(self) -> int:
        """Tokens that go through the model: the last one is only ever a target."""
        return len(self.tokens) - 1

    @property
    def num_learned(self) -> int:
        """Its learned tokens; the first token is never a target."""
        return int(self.learned[1:].sum())


@dataclass
class TokenData:
    """The rows of a file as token sequences. The arrays are memory-mapped.

    Attributes:
        path: the file.
        sides: of a row's sequences: chosen alone, or chosen and rejected.
        tokens: (total,) int32, one sequence after the other.
        learned: (total,) bool, the tokens the loss is taken on.
        offsets: (M+1,) int64; sequence j is tokens[offsets[j]:offsets[j+1]].
        notes: what was cut or dropped, as sentences for the user.
        digest: of all that they depend on: the file's content, the tokenizer's files, the limits.
        reference: (rows, sides) fp32, DPO's reference log-probabilities, where they are wanted.
    """

    path: str
    sides: tuple[str, ...]
    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    notes: list[str]
    digest: str
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return (len(self.offsets) - 1) // len(self.sides)

    def row(self, i: int) -> tuple[Sequence, ...]:
        """The sequences of row i, one for each side."""
        sequences = []
        for place, side in enumerate(self.sides):
            j = i * len(self.sides) + place
            part = slice(self.offsets[j], self.offsets[j + 1])
            name = f"row {i + 1} of {self.path}" + (f", {side}" if len(self.sides) > 1 else "")
            reference = 0.0 if self.reference is None else float(self.reference[i, place])
            sequences.append(Sequence(self.tokens[part], self.learned[part], name, side, reference=reference))
        return tuple(sequences)


def load_sft(path: str, tokenizer: Tokenizer, max_tokens: int, cache: str) -> TokenData:
    """Stage 1's sequences, one a row, of at most max_tokens tokens. Call on one rank first: it fills the cache.

    Raises:
        UserError: naming file and line of a malformed row; when no row is left.
    """

    def texts(where: str, row: Any) -> tuple[list[str], tuple[str, str]]:
        prompt, completion = _split(where, tokenizer, conversation(where, row))
        return [prompt, prompt + completion], (prompt, prompt + completion)

    def sequences(encodings: list[Encoding], kept: tuple[str, str], counts: Counter[str]) -> Iterator[Tokens]:
        (prompt, text), (before, ids) = kept, (encoding.ids for encoding in encodings)
        # Where the whole starts with the prompt's own tokens, the rest is the completion's; elsewhere a token straddles
        # the border, and belongs to the prompt.
        first = len(before) if ids[: len(before)] == before else tokenizer.num_before(text, len(prompt))
        if ids[-1] != tokenizer.eos_id:
            ids.append(tokenizer.eos_id)
        counts[f"conversations cut to {max_tokens} tokens"] += len(ids) > max_tokens
        tokens = np.array(ids[:max_tokens], dtype=np.int32)
        learned = np.arange(len(tokens)) >= first
        if tokenizer.pad_id == tokenizer.eos_id:
            learned &= tokens != tokenizer.pad_id
        if learned[1:].any():
            yield tokens, learned
        else:
            counts["rows dropped: the prompt alone fills max_tokens"] += 1

    return _cached(path, ("chosen",), tokenizer, cache, ("sft", max_tokens), texts, sequences)


def load_pairs(
    path: str, tokenizer: Tokenizer, max_prompt_tokens: int, max_response_tokens: int, cache: str
) -> TokenData:
    """Stage 2's sequences, two a row: chosen, rejected. Call on one rank first: it fills the cache.

    Raises:
        UserError: naming file and line of a malformed row; when the file holds none.
    """

    def texts(where: str, row: Any) -> tuple[list[str], None]:
        prompt = check_messages(f"{where}: 'prompt'", _field(where, row, "prompt"))
        answers = [answer_message(f"{where}: {key!r}", _field(where, row, key)) for key in ("chosen", "rejected")]
        (head, chosen), (_, rejected) = (_split(where, tokenizer, [*prompt, answer]) for answer in answers)
        return [head, chosen, rejected], None

    def sequences(encodings: list[Encoding], _: None, counts: Counter[str]) -> Iterator[Tokens]:
        prompt, *completions = (encoding.ids for encoding in encodings)
        counts[f"prompts cut to their last {max_prompt_tokens} tokens"] += len(prompt) > max_prompt_tokens
        prompt = prompt[-max_prompt_tokens:]
        for completion in completions:
            if completion[-1] != tokenizer.eos_id:
                completion.append(tokenizer.eos_id)
            counts[f"responses cut to {max_response_tokens} tokens"] += len(completion) > max_response_tokens
            tokens = np.array(prompt + completion[:max_response_tokens], dtype=np.int32)
            yield tokens, np.arange(len(tokens)) >= len(prompt)

    rules = ("pairs", max_prompt_tokens, max_response_tokens)
    return _cached(path, ("chosen", "rejected"), tokenizer, cache, rules, texts, sequences)


def _split(where: str, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[str, str]:
    try:
        return tokenizer.split(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _field(where: str, row: Any, key: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise UserError(f"{where} has no field {key!r}")
    return row[key]


def conversation(where: str, row: Any) -> list[dict[str, str]]:
    """The messages of a stage 1 row, whose last one is the assistant's."""
    messages = _field(where, row, "messages")
    if not isinstance(messages, list):
        raise UserError(f"{where}: 'messages' must be a list of messages with role and content")
    check_messages(f"{where}: 'messages'", messages)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise UserError(f"{where}: the last message must be the assistant's, and not empty")
    return messages


def answer_message(where: str, value: Any) -> dict[str, str]:
    """A completion, text or a list of one message, as the assistant's message."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    check_messages(where, value)
    if len(value) != 1 or value[0]["role"] != "assistant" or not value[0]["content"]:
        raise UserError(f"{where} must be one message of the assistant, and not empty")
    return value[0]


def _cached(
    path: str,
    sides: tuple[str, ...],
    tokenizer: Tokenizer,
    cache: str,
    rules: tuple,
    texts: Callable,
    sequences: Callable,
) -> TokenData:
    """The file's rows as sequences, from the cache where they have been made before.

    Args:
        texts: (where, row) to the texts to be encoded, and whatever else sequences needs.
        sequences: (encodings, what texts gave beside them, counts of what was cut or dropped) to a row's sequences.
    """
    folder = Path(cache) / _key(path, tokenizer, cache, rules)
    if not folder.exists():
        Path(cache).mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: a cache that is there is whole.
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=cache) as beside:
            made = Path(beside, "data")
            made.mkdir()
            _fill(made, path, tokenizer, texts, sequences)
            made.rename(folder)
    tokens, learned = (np.memmap(folder / name, dtype, "r") for name, dtype in _ARRAYS)
    offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
    notes = json.loads((folder / "notes.json").read_text())
    return TokenData(path, sides, tokens, learned, offsets, [f"{path}: {note}" for note in notes], folder.name)


def _fill(folder: Path, path: str, tokenizer: Tokenizer, texts: Callable, sequences: Callable) -> None:
    """Write tokens, learned, offsets and notes; the sequences go to disk as they come."""
    total = num_rows(Path(path))
    if not total:
        raise UserError(f"{path} holds no rows")
    lengths, counts = [0], Counter()
    read = progress(None, f"tokenising {Path(path).name}", total, "rows", delay=1)
    rows = ((where, *texts(where, row)) for where, row in read_rows(path))
    with read, open(folder / "tokens", "wb") as all_tokens, open(folder / "learned", "wb") as all_learned:
        for kept, encodings in tokenizer.encode_rows(rows):
            for tokens, learned in sequences(encodings, kept, counts):
                all_tokens.write(tokens)
                all_learned.write(learned)
                lengths.append(len(tokens))
            read.update()
    notes = [f"{count:,} of {total:,} {what}" for what, count in counts.items() if count]
    if len(lengths) == 1:
        raise UserError(f"no row of {path} is left: {'; '.join(notes)}")
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    (folder / "notes.json").write_text(json.dumps(notes))


def _key(path: str, tokenizer: Tokenizer, cache: str, rules: tuple) -> str:
    digest = hashlib.blake2b(repr((_RULES, *rules)).encode(), digest_size=12)
    try:
        digest.update(_digest_of(Path(path), Path(cache, "digests")))
        for file in tokenizer.files:
            digest.update(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    return digest.hexdigest()


def _digest_of(path: Path, known: Path) -> bytes:
    """The digest of a file's content. Gigabytes take seconds to read, so it is kept, in the folder `known`, with the
    file's size and time, and holds while these are the same."""
    entry = known / hashlib.blake2b(str(path.resolve()).encode(), digest_size=12).hexdigest()
    stat = path.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns}"
    if entry.exists():
        state_then, digest = entry.read_text().split("\n")
        if state_then == state:
            return bytes.fromhex(digest)
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "blake2b").hexdigest()
    # A file written a moment ago may be written again within the same tick of its clock.
    if time.time() - stat.st_mtime > 2:
        known.mkdir(parents=True, exist_ok=True)
        beside = entry.with_suffix(f".{os.getpid()}")
        beside.write_text(f"{state}\n{digest}")
        beside.rename(entry)
    return bytes.fromhex(digest)
