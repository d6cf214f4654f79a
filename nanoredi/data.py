"""JSONL rows to token sequences, each token marked as learned or not; kept on disk, keyed by the data and the
tokenizer.

Stage 1 rows are {"messages": [...]}, stage 2 rows {"prompt", "chosen", "rejected"}; each of these three is text (the
user's message, the assistant's message) or a list of messages. Both stages follow the original's token rules, which
differ:

    stage 1   the whole templated conversation is tokenised at once; eos is appended unless there; cut on the right;
    learned is
              what follows the last assistant header, except the padding token, which is eos in Qwen2.5's base models
    stage 2   prompt and completion are tokenised apart; eos is appended to the completion unless there; of a long
    prompt the
              last tokens are kept, a long completion is cut on the right; learned is the completion, eos included
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanoredi.errors import UserError
from nanoredi.files import read_rows
from nanoredi.tokenizer import Tokenizer, check_messages

# Part of the cache's key: raise it when the rules above change.
_RULES = 1
_ROWS_AT_ONCE = 256


@dataclass
class TokenData:
    """Token sequences one after the other; sequence i is tokens[offsets[i]:offsets[i+1]]. The arrays are memory-mapped.

    Attributes:
        tokens: (total,) int32.
        learned: (total,) bool, the tokens the loss is taken on.
        offsets: (M+1,) int64 for M sequences; of pairs, row i is sequences 2i (chosen) and 2i+1 (rejected).
        notes: what was cut or dropped, as sentences for the user.
    """

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    notes: list[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens (n,) int32 and learned (n,) bool of sequence i."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.learned[part]

    def num_learned(self, i: int) -> int:
        """Learned tokens of sequence i; its first token is never a target."""
        return int(self.learned[self.offsets[i] + 1 : self.offsets[i + 1]].sum())


def load_sft(path: str, tokenizer: Tokenizer, max_tokens: int, cache: str) -> TokenData:
    """Stage 1's sequences, one a row, of at most max_tokens tokens. Call on one rank first: it fills the cache.

    Raises:
        UserError: naming file and line of a malformed row; when no row is left.
    """

    def tokenise(rows: list[tuple[str, Any]], counts: Counter[str]) -> Iterator[tuple[list[int], list[bool]]]:
        splits = [tokenizer.split(_conversation(where, row)) for where, row in rows]
        for (prompt, _), encoding in zip(splits, tokenizer.encode_batch([p + c for p, c in splits])):
            ids = encoding.ids
            learned = [start >= len(prompt) for start, _ in encoding.offsets]
            if ids[-1] != tokenizer.eos_id:
                ids, learned = [*ids, tokenizer.eos_id], [*learned, True]
            if tokenizer.pad_id == tokenizer.eos_id:
                learned = [here and token != tokenizer.pad_id for token, here in zip(ids, learned)]
            counts[f"conversations cut to {max_tokens} tokens"] += len(ids) > max_tokens
            ids, learned = ids[:max_tokens], learned[:max_tokens]
            if any(learned[1:]):
                yield ids, learned
            else:
                counts["rows dropped: the prompt alone fills max_tokens"] += 1

    return _cached(path, tokenizer, cache, ("sft", max_tokens), tokenise)


def load_pairs(
    path: str, tokenizer: Tokenizer, max_prompt_tokens: int, max_response_tokens: int, cache: str
) -> TokenData:
    """Stage 2's sequences, two a row: chosen, rejected. Call on one rank first: it fills the cache.

    Raises:
        UserError: naming file and line of a malformed row; when the file holds none.
    """

    def tokenise(rows: list[tuple[str, Any]], counts: Counter[str]) -> Iterator[tuple[list[int], list[bool]]]:
        texts = []
        for where, row in rows:
            prompt = check_messages(f"{where}: 'prompt'", _field(where, row, "prompt"))
            (head, chosen), (_, rejected) = (
                tokenizer.split([*prompt, _answer(f"{where}: {key!r}", _field(where, row, key))])
                for key in ("chosen", "rejected")
            )
            texts += [head, chosen, rejected]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        for prompt, *completions in zip(ids[::3], ids[1::3], ids[2::3]):
            counts[f"prompts cut to their last {max_prompt_tokens} tokens"] += len(prompt) > max_prompt_tokens
            prompt = prompt[-max_prompt_tokens:]
            for completion in completions:
                if completion[-1] != tokenizer.eos_id:
                    completion = [*completion, tokenizer.eos_id]
                counts[f"responses cut to {max_response_tokens} tokens"] += len(completion) > max_response_tokens
                completion = completion[:max_response_tokens]
                yield prompt + completion, [False] * len(prompt) + [True] * len(completion)

    return _cached(path, tokenizer, cache, ("pairs", max_prompt_tokens, max_response_tokens), tokenise)


def _field(where: str, row: Any, key: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise UserError(f"{where} has no field {key!r}")
    return row[key]


def _conversation(where: str, row: Any) -> list[dict[str, str]]:
    messages = _field(where, row, "messages")
    if not isinstance(messages, list):
        raise UserError(f"{where}: 'messages' must be a list of messages with role and content")
    check_messages(f"{where}: 'messages'", messages)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise UserError(f"{where}: the last message must be the assistant's, and not empty")
    return messages


def _answer(where: str, value: Any) -> dict[str, str]:
    """A completion, text or a list of one message, as the assistant's message."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    check_messages(where, value)
    if len(value) != 1 or value[0]["role"] != "assistant" or not value[0]["content"]:
        raise UserError(f"{where} must be one message of the assistant, and not empty")
    return value[0]


def _cached(path: str, tokenizer: Tokenizer, cache: str, rules: tuple, tokenise: Callable) -> TokenData:
    """What tokenise makes of the file's rows, from the cache where it has been made before."""
    folder = Path(cache) / _key(path, tokenizer, rules)
    if not (folder / "notes.json").exists():
        _fill(folder, path, tokenise)
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("tokens", "learned", "offsets")
    }
    return TokenData(**arrays, notes=json.loads((folder / "notes.json").read_text()))


def _fill(folder: Path, path: str, tokenise: Callable) -> None:
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"{path} holds no rows")
    tokens, learned, lengths = [], [], [0]
    counts: Counter[str] = Counter()
    with tqdm(
        total=len(rows), desc=f"tokenising {Path(path).name}", unit=" rows", file=sys.stderr, leave=False
    ) as progress:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            batch = rows[start : start + _ROWS_AT_ONCE]
            for ids, here in tokenise(batch, counts):
                tokens.append(np.array(ids, dtype=np.int32))
                learned.append(np.array(here, dtype=bool))
                lengths.append(len(ids))
            progress.update(len(batch))
    notes = [f"{path}: {count:,} of {len(rows):,} {what}" for what, count in counts.items() if count]
    if len(lengths) == 1:
        raise UserError(f"no row of {path} is left: {'; '.join(notes)}")
    # Written beside and renamed: a cache that is there is whole.
    beside = folder.with_name(f"{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    np.save(beside / "tokens.npy", np.concatenate(tokens))
    np.save(beside / "learned.npy", np.concatenate(learned))
    np.save(beside / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    (beside / "notes.json").write_text(json.dumps(notes))
    beside.rename(folder)


def _key(path: str, tokenizer: Tokenizer, rules: tuple) -> str:
    digest = hashlib.blake2b(repr((_RULES, *rules)).encode(), digest_size=12)
    try:
        for file in (Path(path), *tokenizer.files):
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    return digest.hexdigest()
