"""The filters ("gates") between raw traces and training rows, in the original's order.

A raw row holds a problem, several generations for it, and verdicts on each; a generation is correct if all its verdicts
are true. Stage 1 learns a problem's first correct generation, at any length; stage 2 learns the first correct and the
first incorrect one as a pair, if the prompt and both responses are within the limits. Each gate looks at a single row.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import check
from nanoredi.data.messages import Messages, user_message
from nanoredi.data.tokenizer import half_pair

SFT_GATE = "SFT: has a correct generation"
_EMPTY = "generations are empty or white space: neither correct nor incorrect"
_SAME = "generations are incorrect, but have the same text as the correct one: skipped"
_LABELS = ("llama_verification", "math_verify_reparsed_answer")
_ROW = {
    **dict.fromkeys(("problem_is_valid?", "source?", "problem?"), str),
    "generations?": [(str, None)],
    **dict.fromkeys(("correct?", *(f"{label}?" for label in _LABELS)), [(bool, None)]),
}


@dataclass(frozen=True)
class Traces:
    """What is learned from a raw row."""

    where: str  # file and line, for error messages
    index: int  # the row's number
    source: str | None  # where the problem comes from, if known
    problem: str
    prompt: Messages  # the messages that ask the problem
    generations: list[str]
    chosen: int  # the index of the first correct generation
    rejected: int | None  # the index of the first incorrect one, if any

    @property
    def answers(self) -> Messages:
        """The chosen and, if any, the rejected generation, as messages."""
        numbers = (i for i in (self.chosen, self.rejected) if i is not None)
        return [{"role": "assistant", "content": self.generations[i]} for i in numbers]

    def sft_row(self, lengths: list[int]) -> dict[str, Any]:
        """The row of stage 1, given the lengths of prompt and answers."""
        return {
            "messages": [*self.prompt, self.answers[0]],
            "original_index": self.index,
            "source": self.source,
            "generation_index": self.chosen,
            **dict(zip(("prompt_tokens", "response_tokens"), lengths)),
        }

    def pair(self, lengths: list[int]) -> dict[str, Any]:
        """The row of stage 2, given the lengths of prompt and answers."""
        chosen, rejected = self.answers
        return {
            "prompt": self.prompt,
            "chosen": [chosen],
            "rejected": [rejected],
            "original_index": self.index,
            "source": self.source,
            "chosen_index": self.chosen,
            "rejected_index": self.rejected,
            **dict(zip(("prompt_tokens", "chosen_tokens", "rejected_tokens"), lengths)),
        }


class Gates:
    """The gates, with counts of the rows that passed each.

    Args:
        max_prompt_tokens, max_response_tokens: a pair's limits.
        strict_negatives: a generation is incorrect only if all its verdicts say so; otherwise one is enough.

    Attributes:
        counts: {gate: rows that passed it and all before it}. A pair's correct generation is the one of its SFT row, so
            the gates for pairs come after the one for SFT.
        unreadable: the places of rows with text that no tokenizer can encode; they pass no gate.
        remarks: {what was skipped within rows, as a sentence for the user: count}.
    """

    def __init__(self, max_prompt_tokens: int, max_response_tokens: int, strict_negatives: bool = False):
        self.limits = max_prompt_tokens, max_response_tokens
        self.strict_negatives = strict_negatives
        self.unreadable: list[str] = []
        self.remarks = Counter[str]()
        self.names = (
            "rows read",
            "problem_is_valid is yes",
            "source is not cn_k12",
            "has a problem",
            "has generations",
            "has both labels of each generation",
            SFT_GATE,
            "pairs: has a correct and an incorrect one",
            f"pairs: prompt within {max_prompt_tokens:,} tokens",
            f"pairs: both responses within {max_response_tokens:,} tokens",
        )
        self.counts = dict.fromkeys(self.names, 0)

    def sift(self, where: str, row: dict[str, Any], index: int) -> Traces | None:
        """What is learned from a raw row; None if a gate before the pairs' stops it.

        Raises:
            UserError: naming file, line and field of a malformed row.
        """
        for name in ("problem_is_valid", "source"):
            if name not in row:  # unlike null, a missing field means that the rows have another layout
                raise UserError(f"{where} has no field {name!r}; rows of your own go with --grade")
        if "correct" in row:  # the user's labels; otherwise the verdicts of OpenR1's two verifiers
            labels = {"correct": row["correct"]}
        else:
            verdicts = check(where, row.get("correctness"), (dict, None), "correctness") or {}
            labels = {name: verdicts.get(name) for name in _LABELS}
        known = {name: value for name, value in {**row, **labels}.items() if value is not None}
        check(where, known, _ROW)  # without the nulls: `datasets` reads a missing field as null
        problem, generations = known.get("problem", ""), known.get("generations", [])
        readable = not any(map(half_pair, (problem, *filter(None, generations))))
        if not readable:
            self.unreadable.append(where)
        passed = [
            True,
            readable and known.get("problem_is_valid", "").strip().lower() == "yes",
            known.get("source") != "cn_k12",
            bool(problem),
            bool(generations),
            all(len(known.get(name, ())) == len(generations) for name in labels),
        ]
        if not all(passed):
            self._count(0, passed)
            return None
        judged = [*zip(*(known[name] for name in labels))]  # each generation's verdicts, of which a null is not true
        correct = [all(verdicts) for verdicts in judged]
        incorrect = [not right for right in correct]
        if self.strict_negatives:
            incorrect = [all(verdict is False for verdict in verdicts) for verdicts in judged]
        # differs from the original: an empty generation, from which nothing can be learned, is neither
        full = [i for i, text in enumerate(generations) if text and text.strip()]
        chosen = next((i for i in full if correct[i]), None)
        same = [i for i in full if incorrect[i] and chosen is not None and generations[i] == generations[chosen]]
        self.remarks[_EMPTY] += len(generations) - len(full)
        self.remarks[_SAME] += len(same)
        rejected = next((i for i in full if incorrect[i] and i not in same), None)
        self._count(0, [*passed, chosen is not None, rejected is not None])
        if chosen is None:
            return None
        prompt = row.get("prompt", user_message(problem))
        return Traces(where, index, known.get("source"), problem, prompt, generations, chosen, rejected)

    def fits(self, lengths: list[int]) -> bool:
        """Whether these lengths of prompt and answers are a pair's, and within the limits."""
        if len(lengths) < 3:
            return False
        passed = [lengths[0] <= self.limits[0], max(lengths[1:]) <= self.limits[1]]
        self._count(8, passed)
        return all(passed)

    def _count(self, first: int, passed: list[bool]) -> None:
        for name, _ in zip(self.names[first:], takewhile(bool, passed)):
            self.counts[name] += 1


def say_dropped(what: str, why: str, places: list[str], total: int) -> None:
    """Print to stderr how many things were dropped, if any, with the first few places."""
    if places:
        more = f"; and {len(places) - 5:,} more" if len(places) > 5 else ""
        line = f"Dropped {len(places):,} of {total:,} {what}, whose {why}: {'; '.join(places[:5])}{more}."
        print(line, file=sys.stderr)
