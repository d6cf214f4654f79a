"""Rows to token sequences, each token marked as learned or not.

messages.py says what rows there are. Both stages follow the original's token rules, which differ:

    stage 1   the whole templated conversation is tokenised at once, and cut on the right; learned is what follows the
              prompt, except the padding token where that is eos and the template has another end of its own, as with
              Qwen2.5's base models
    stage 2   prompt and completion are tokenised apart; of a long prompt the last tokens are kept, a long completion is
              cut on the right; learned is the completion, eos included

Both append eos to a completion, unless the template's end has it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from nanoredi.common.errors import UserError, naming
from nanoredi.data.cache import Arrays, cached
from nanoredi.data.messages import SIDES, Messages, conversation, pair
from nanoredi.data.tokenizer import Tokenizer

# Part of the cache's key: raise it when the rules above change.
_RULES = 6


class Sequence(NamedTuple):
    """A prompt and a trace as tokens, and what an optimiser step makes of it (objectives.py)."""

    tokens: np.ndarray  # (n,) integers, at least 2
    learned: np.ndarray  # (n,) bool, the tokens the loss is taken on
    name: str = ""  # what to call it before the user
    side: str = "chosen"  # or "rejected"; stage 1's are chosen, but for those of a weight below 0
    weight: float = 0.0  # of each learned token's log-probability in the loss, where that is linear in them
    share: float = 0.0  # of each learned token's log-probability in the step's mean over its side's
    reference: float = 0.0  # the trace's log-probability under DPO's reference model
    row_weight: float = 1.0  # what its row gives it to count; below 0 the trace is one to avoid

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
    """The rows of a file as token sequences. The arrays are memory-mapped."""

    path: str
    sides: tuple[str, ...]  # of a row's sequences: chosen alone, or chosen and rejected
    tokens: np.ndarray  # (total,) int32, one sequence after the other
    learned: np.ndarray  # (total,) bool, the tokens the loss is taken on
    row_weights: np.ndarray  # (M,) fp32, what each sequence's row gives it to count
    offsets: np.ndarray  # (M+1,) int64; sequence j is tokens[offsets[j]:offsets[j+1]]
    notes: list[str]  # what was cut or dropped, as sentences for the user
    digest: str  # of all that they depend on: the file's content, the tokenizer's files, the limits
    reference: np.ndarray | None = None  # (rows, sides) fp32, DPO's reference log-probabilities, where they are wanted

    def __len__(self) -> int:
        """The number of rows."""
        return (len(self.offsets) - 1) // len(self.sides)

    def row(self, i: int) -> tuple[Sequence, ...]:
        """The sequences of row i, one for each side."""
        sequences = []
        for place, side in enumerate(self.sides):
            j = i * len(self.sides) + place
            part = slice(*self.offsets[j : j + 2])
            name = f"row {i + 1} of {self.path}" + (f", {side}" if len(self.sides) > 1 else "")
            reference = 0.0 if self.reference is None else float(self.reference[i, place])
            weight = float(self.row_weights[j])
            side = "rejected" if weight < 0 else side
            sequences.append(Sequence(self.tokens[part], self.learned[part], name, side, 0.0, 0.0, reference, weight))
        return tuple(sequences)


def load_sft(path: str, tokenizer: Tokenizer, max_tokens: int, cache: str) -> TokenData:
    """Stage 1's sequences, one a row, of at most max_tokens tokens. Call on one rank first: it fills the cache.

    Raises:
        UserError: naming file and line of a malformed row; when no row is left.
    """
    masked = tokenizer.pad_id if tokenizer.pad_id == tokenizer.eos_id and len(tokenizer.stop_ids) > 1 else -1

    def texts(where: str, row: Any, counts: Counter[str]) -> tuple[list[str], tuple[int, str, float]] | None:
        *prompt, answer = conversation(where, row)
        parts = _texts(where, tokenizer, prompt, [answer], counts)
        whole, weighed = "".join(parts or []), answer if row.get("weight") is None else row
        return ([parts[0], whole], (len(parts[0]), whole, _weight(where, weighed, "weight", -1))) if parts else None

    def arrays(encodings: list[Encoding], kept: tuple[int, str, float], counts: Counter[str]) -> Iterator[Arrays]:
        (num_chars, text, weight), (before, ids) = kept, (encoding.ids for encoding in encodings)
        # Where the whole starts with the prompt's own tokens, the rest is the completion's; elsewhere a token straddles
        # the border, and belongs to the prompt: as in the original, but not where sampling goes on from a <think>.
        if ids[: len(before)] != before and text[:num_chars].rstrip().endswith("<think>"):
            ids = before + tokenizer.encode(text[num_chars:])
        first = len(before) if ids[: len(before)] == before else tokenizer.num_before(text, num_chars)
        ids = tokenizer.ended(ids)
        counts[f"conversations cut to {max_tokens} tokens"] += len(ids) > max_tokens
        tokens = np.array(ids[:max_tokens], dtype=np.int32)
        learned = (np.arange(len(tokens)) >= first) & (tokens != masked)
        if learned[1:].any():
            yield tokens, learned, weight
        else:
            counts["rows dropped: the prompt alone fills max_tokens"] += 1

    loaded = cached(path, tokenizer, cache, (_RULES, "sft", max_tokens), texts, arrays)
    return TokenData(path, ("chosen",), *loaded)


def load_pairs(
    path: str, tokenizer: Tokenizer, max_prompt_tokens: int, max_response_tokens: int, cache: str
) -> TokenData:
    """Stage 2's sequences, two a row: chosen, rejected. The cache and what is raised are as in load_sft."""

    def texts(where: str, row: Any, counts: Counter[str]) -> tuple[list[str], tuple[float, float]] | None:
        parts = _texts(where, tokenizer, *pair(where, row), counts)
        return (parts, (_weight(where, row, "chosen_weight", 0), 1.0)) if parts else None

    def arrays(encodings: list[Encoding], weights: tuple[float, float], counts: Counter[str]) -> Iterator[Arrays]:
        prompt, *completions = (encoding.ids for encoding in encodings)
        counts[f"prompts cut to their last {max_prompt_tokens} tokens"] += len(prompt) > max_prompt_tokens
        prompt = prompt[-max_prompt_tokens:]
        for completion, weight in zip(map(tokenizer.ended, completions), weights):
            counts[f"responses cut to {max_response_tokens} tokens"] += len(completion) > max_response_tokens
            tokens = np.array(prompt + completion[:max_response_tokens], dtype=np.int32)
            yield tokens, np.arange(len(tokens)) >= len(prompt), weight

    rules = (_RULES, "pairs", max_prompt_tokens, max_response_tokens)
    return TokenData(path, SIDES, *cached(path, tokenizer, cache, rules, texts, arrays))


def _texts(
    where: str, tokenizer: Tokenizer, prompt: Messages, answers: Messages, counts: Counter[str]
) -> list[str] | None:
    """The prompt and the completions as text; None for a row that is nothing to learn from, which is counted."""
    if any(map(tokenizer.is_blank, answers)):
        counts["rows dropped: an answer is nothing but white space"] += 1
        return None
    remarks: set[str] = set()
    with naming(where):
        parts = [tokenizer.split([*prompt, answer], remarks) for answer in answers]
    completions = [completion for _, completion in parts]
    if len(set(completions)) < len(completions):
        counts["rows dropped: chosen and rejected are the same"] += 1
        return None
    counts.update(sorted(remarks))
    return [parts[0][0], *completions]


def _weight(where: str, row: dict[str, Any], name: str, low: int) -> float:
    """What a row's sequence is to count in the loss, 1 when it does not say."""
    weight = 1 if row.get(name) is None else row[name]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not low <= weight <= 1:
        raise UserError(f"{where}: {name!r} must be a number from {low} to 1, not {str(weight)[:60]!r}")
    return float(weight)
