"""Rows to token sequences, with a mask of the tokens that are learned.

messages.py lists the layouts of rows. Both stages follow the original's token rules, which differ:

    stage 1   the whole templated conversation is tokenised at once, and cut on the right; what follows the prompt is
              learned, except the padding token if that is also eos and the template ends answers with another token, as
              with Qwen2.5's base models
    stage 2   prompt and completion are tokenised separately; a long prompt is cut on the left, a long completion on the
              right; the completion is learned, eos included

Both append eos to a completion, unless the template's end contains it.
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

# Part of the cache's key: raise it when the same rows become other sequences, or are refused.
_RULES = 10


class Sequence(NamedTuple):
    """A prompt and a trace as tokens, with their weights in an optimiser step."""

    tokens: np.ndarray  # (n,) integers, at least 2
    learned: np.ndarray  # (n,) bool, the tokens that enter the loss
    side: str = "chosen"  # or "rejected"; in stage 1 chosen, unless its weight is below 0
    row_weight: float = 1.0  # the weight that its row gives it; a trace of a negative weight is unlearned
    reference: float = 0.0  # the trace's log-probability under DPO's reference model
    weight: float = 0.0  # of each learned token's log-probability in the loss, if that is linear (objectives.units)
    share: float = 0.0  # of each learned token's log-probability in the step's mean of its side

    @property
    def num_inputs(self) -> int:
        """The number of tokens that go through the model: the last one is only a target."""
        return len(self.tokens) - 1

    @property
    def num_learned(self) -> int:
        """The number of learned tokens; the first token is never a target."""
        return int(self.learned[1:].sum())


@dataclass
class TokenData:
    """The rows of a file as token sequences. The arrays are memory-mapped."""

    sides: tuple[str, ...]  # of a row's sequences: only chosen, or chosen and rejected
    tokens: np.ndarray  # (total,) int32, all sequences concatenated
    learned: np.ndarray  # (total,) bool, the tokens that enter the loss
    row_weights: np.ndarray  # (M,) fp32, each sequence's weight from its row
    offsets: np.ndarray  # (M+1,) int64; sequence j is tokens[offsets[j]:offsets[j+1]]
    notes: list[str]  # what was cut or dropped, as sentences for the user
    digest: str  # of the four arrays, whatever they were made from
    reference: np.ndarray | None = None  # (rows, sides) fp32, DPO's reference log-probabilities

    def __len__(self) -> int:
        """The number of rows."""
        return (len(self.offsets) - 1) // len(self.sides)

    def row(self, i: int) -> tuple[Sequence, ...]:
        """The sequences of row i, one for each side."""
        sequences = []
        for j, side in enumerate(self.sides, i * len(self.sides)):
            part = slice(*self.offsets[j : j + 2])
            reference = 0.0 if self.reference is None else float(self.reference.flat[j])
            weight = float(self.row_weights[j])
            side = "rejected" if weight < 0 else side
            sequences.append(Sequence(self.tokens[part], self.learned[part], side, weight, reference))
        return tuple(sequences)


def load_sft(path: str, tokenizer: Tokenizer, max_tokens: int, cache: str) -> TokenData:
    """Stage 1's sequences, one per row, of at most max_tokens tokens. Call on one rank first, to fill the cache.

    Raises:
        UserError: naming file and line of a malformed row; when no row is left.
    """
    masked_id = tokenizer.pad_id if tokenizer.pad_id == tokenizer.eos_id and len(tokenizer.stop_ids) > 1 else -1

    def texts(where: str, row: Any, counts: Counter[str]) -> tuple[list[str], tuple[int, str, float]] | None:
        *prompt, answer = conversation(where, row)
        parts = _texts(where, tokenizer, prompt, [answer], counts)
        if parts is None:
            return None
        before, whole = parts[0], "".join(parts)
        weight = _weight(where, answer if row.get("weight") is None else row, "weight", -1)
        return [before, whole], (len(before), whole, weight)

    def arrays(encodings: list[Encoding], kept: tuple[int, str, float], counts: Counter[str]) -> Iterator[Arrays]:
        before, ids = (encoding.ids for encoding in encodings)
        num_chars, text, weight = kept
        # Usually the whole starts with the prompt's own tokens. If not, a token straddles the border; as originally
        # it counts as the prompt's, unless that ends with <think>, after which sampling starts a new token.
        if ids[: len(before)] != before and text[:num_chars].rstrip().endswith("<think>"):
            ids = before + tokenizer.encode(text[num_chars:])
        first = len(before) if ids[: len(before)] == before else tokenizer.num_before(text, num_chars)
        ids = tokenizer.ended(ids)
        counts[f"conversations cut to {max_tokens} tokens"] += len(ids) > max_tokens
        tokens = np.array(ids[:max_tokens], dtype=np.int32)
        learned = (np.arange(len(tokens)) >= first) & (tokens != masked_id)
        if learned[1:].any():
            yield tokens, learned, weight
        else:
            counts["rows dropped: the prompt alone fills max_tokens"] += 1

    loaded = cached(path, tokenizer, cache, (_RULES, "sft", max_tokens), texts, arrays)
    return TokenData(("chosen",), *loaded)


def load_pairs(
    path: str, tokenizer: Tokenizer, max_prompt_tokens: int, max_response_tokens: int, cache: str
) -> TokenData:
    """Stage 2's sequences, two per row: chosen, rejected. The cache and the errors raised are those of load_sft."""

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
    return TokenData(SIDES, *cached(path, tokenizer, cache, rules, texts, arrays))


def _texts(
    where: str, tokenizer: Tokenizer, prompt: Messages, answers: Messages, counts: Counter[str]
) -> list[str] | None:
    """The prompt and the completions as text; None, and counted, for a row from which nothing can be learned."""
    if any(map(tokenizer.is_blank, answers)):
        counts["rows dropped: an answer is nothing but white space"] += 1
        return None
    remarks: set[str] = set()
    with naming(where):
        prompts, completions = zip(*(tokenizer.split([*prompt, answer], remarks) for answer in answers))
    if len(set(completions)) < len(completions):
        counts["rows dropped: chosen and rejected are the same"] += 1
        return None
    counts.update(sorted(remarks))
    return [prompts[0], *completions]


def _weight(where: str, row: dict[str, Any], name: str, low: int) -> float:
    """The weight in the loss that a row gives to its sequence, by default 1."""
    weight = 1 if row.get(name) is None else row[name]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not low <= weight <= 1:
        raise UserError(f"{where}: {name!r} must be a number from {low} to 1, not {str(weight)[:60]!r}")
    return float(weight)
