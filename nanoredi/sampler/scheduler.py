"""Continuous batching over pages: requests, which of them are in the batch, and which pages they have.

A row of the batch decodes one sample of a prompt. First the prompt, all but its last token, is prefilled in chunks,
under a budget of tokens between two decode steps; then every decode step takes the row's last token and samples the
next one. So a prompt that is in the cache already, for instance for another sample, is not computed again. A row that
ends frees its pages and its slot at once. When no page is free, the youngest row is preempted: its request waits again,
before all others, and resumes with the tokens that it has, to the same sample.

Nothing here touches a device.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanoredi.common.errors import UserError
from nanoredi.data.tokenizer import Stream
from nanoredi.sampler.pages import Pages


@dataclass
class Request:
    """A prompt to be completed."""

    prompt: list[int]  # token ids
    sample: int = 0  # which of the prompt's samples this is
    key: int = 0  # of the sample's random numbers (requests_for)
    name: str = "a prompt"  # in messages
    max_tokens: int | None = None  # longest completion; None: the sampler's
    stream: Stream | None = None  # receives the completion's tokens as they are sampled; may end it at a stop string
    tokens: list[int] = field(default_factory=list)  # the ended completion, with its stop string, without a stop token
    finish_reason: str | None = None  # "stop", or "length" when max_tokens or the context was reached


def requests_for(prompts: list[list[int]], n: int, seed: int, names: Iterable[str] | None = None) -> list[Request]:
    """n samples of each prompt, in order. A repeated prompt gets further samples, numbered on, not the same ones.

    Args:
        names: of the prompts, for messages.
    """
    requests = []
    before: Counter[tuple[int, ...]] = Counter()
    for prompt, name in zip(prompts, names or [Request.name] * len(prompts), strict=True):
        first = before[tuple(prompt)]
        requests += [Request(prompt, k, _key(seed, prompt, k), name) for k in range(first, first + n)]
        before[tuple(prompt)] += n
    return requests


def _key(seed: int, prompt: list[int], sample: int) -> int:
    """A hash of 64 bits, as a signed integer."""
    text = ",".join(map(str, (seed, sample, *prompt)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(eq=False)  # compared by identity
class Row:
    """A request in the batch."""

    request: Request
    tokens: list[int]  # the prompt, and what the host has read of the completion
    max_length: int  # of tokens
    slot: int  # in the batch
    pages: list[int]  # of its tokens, in order
    num_cached: int  # tokens in the cache, including those of the chunk and the decode step in flight

    @property
    def num_sampled(self) -> int:
        """Tokens of the completion, including one that the host has not read yet."""
        return self.num_cached + 1 - len(self.request.prompt)


@dataclass
class Prefill:
    """What to compute before the next decode step, in this order."""

    chunks: list[tuple[Row, int, int]] = field(default_factory=list)  # a row's tokens start:end, into its pages
    copies: list[tuple[int, int]] = field(default_factory=list)  # of pages, (source, target)
    rows: list[Row] = field(default_factory=list)  # that start to decode


class Scheduler:
    """Rows, pages, and the requests that wait for them.

    Attributes:
        waiting: requests, the next one first.
        rows: in the batch, by slot; the oldest comes first.
        prefilling: the row whose prompt is only partly cached, if there is one.
    """

    def __init__(
        self, pages: Pages, batch_size: int, max_tokens: int, context: int, budget: int, resample: bool = False
    ):
        """budget: tokens prefilled between two decode steps. resample: a preempted row samples its completion again,
        instead of prefilling what it had of it."""
        self.pages, self.page_size, self.batch_size = pages, pages.page_size, batch_size
        self.max_tokens, self.context, self.budget, self.resample = max_tokens, context, budget, resample
        self.waiting: deque[Request] = deque()
        self.rows: dict[int, Row] = {}
        self.prefilling: Row | None = None

    def limit(self, request: Request) -> int:
        """The longest completion of a request."""
        longest = self.max_tokens if request.max_tokens is None else request.max_tokens
        return min(longest, self.context - len(request.prompt))

    def check(self, requests: Iterable[Request], vocab_size: int) -> None:
        """Raise a UserError that names a request which cannot be completed: its prompt is empty, is of another model or
        fills the context; it may have no tokens; or it does not fit into the cache."""
        for request in requests:
            length = len(request.prompt)
            if not length:
                raise UserError(f"{request.name} has no tokens")
            if max(request.prompt) >= vocab_size:
                raise UserError(
                    f"{request.name} has the token {max(request.prompt)}, outside the model's vocabulary of "
                    f"{vocab_size}; the tokenizer is not this model's"
                )
            if length >= self.context:
                raise UserError(
                    f"{request.name} has {length:,} tokens with its template and fills the context of "
                    f"{self.context:,}; give a shorter one"
                )
            longest, room = length + self.limit(request) - 1, len(self.pages.refcounts) * self.page_size
            if longest < length:
                raise UserError(f"{request.name} may get no tokens: give a max_tokens of at least 1")
            if longest > room:
                raise UserError(
                    f"{request.name} has {length:,} tokens with its template and may become {longest:,} long; "
                    f"the cache has room for {room:,}: give a larger --cache_gb or a smaller --max_tokens"
                )

    def admit(self) -> Prefill:
        """Admit waiting requests while there are slots, pages and budget."""
        prefill, budget = Prefill(), self.budget
        while self.prefilling or self._admit_next(prefill):
            row = self.prefilling
            start, to_cache = row.num_cached, len(row.tokens) - 1
            row.num_cached = min(start + budget, to_cache)
            budget -= row.num_cached - start
            if row.num_cached > start:
                prefill.chunks.append((row, start, row.num_cached))
            done = row.num_cached == to_cache
            # Registered before it is computed: a row that shares the page is computed later, or in the same pass.
            num_filled = -(-row.num_cached // self.page_size) if done else row.num_cached // self.page_size
            for number in range(start // self.page_size, num_filled):
                self.pages.register(row.tokens[: row.num_cached], row.pages, number)
            if not done:
                break
            self.prefilling = None
            prefill.rows.append(row)
        for source, _ in prefill.copies:
            self.pages.release(source)
        return prefill

    def append_pages(self) -> list[tuple[int, int, int]] | None:
        """Give every row that is about to decode a page for its next token, if it needs one, the oldest rows first.

        Returns:
            (slot, number, page) of each new page; None when there are too few.
        """
        full = [row for row in self.decoding() if row.num_cached == len(row.pages) * self.page_size]
        if len(full) > self.pages.num_free:
            return None
        for row in full:
            row.pages.append(self.pages.allocate())
        return [(row.slot, len(row.pages) - 1, row.pages[-1]) for row in full]

    def decoding(self) -> list[Row]:
        """The rows of the next decode step: their prompts are cached, and they may have more tokens."""
        return [row for row in self.rows.values() if len(row.tokens) - 1 <= row.num_cached < row.max_length - 1]

    def preempt(self) -> None:
        """Take the youngest row out of the batch; its request waits again, as the next one, with its tokens so far."""
        row = next(reversed(self.rows.values()))
        row.request.tokens = max(row.request.tokens, row.tokens[len(row.request.prompt) :], key=len)
        self.release(row)
        self.waiting.appendleft(row.request)

    def release(self, row: Row) -> None:
        """Free a row's pages and its slot."""
        if row is self.prefilling:
            self.prefilling = None
        for page in row.pages:
            self.pages.release(page)
        del self.rows[row.slot]

    def _admit_next(self, prefill: Prefill) -> bool:
        """Give the next waiting request a slot and the pages of its prompt, if they are free."""
        if not self.waiting or len(self.rows) == self.batch_size:
            return False
        request = self.waiting[0]
        tokens = request.prompt + ([] if self.resample else request.tokens)
        to_cache, size = len(tokens) - 1, self.page_size
        pages, partial = self.pages.find_prefix(tokens[:to_cache])
        num_pages = -(-to_cache // size)
        num_cached = len(pages) * size if partial is None else to_cache
        needed = num_pages - sum(self.pages.refcounts[page] > 0 for page in pages)
        # One page is kept free for each row in the batch; without them the new one would soon be preempted.
        if needed + len(self.rows) > self.pages.num_free and self.rows:
            return False
        self.waiting.popleft()
        for page in pages:
            self.pages.share(page)
        if partial is not None:
            self.pages.share(partial)
            if self.pages.refcounts[partial] > 1:  # another row appends to it, so this one needs a copy
                source, partial = partial, self.pages.allocate()
                prefill.copies.append((source, partial))
            pages.append(partial)
        pages += [self.pages.allocate() for _ in range(len(pages), num_pages)]
        slot = next(slot for slot in range(self.batch_size) if slot not in self.rows)
        max_length = len(request.prompt) + self.limit(request)
        self.rows[slot] = self.prefilling = Row(request, tokens, max_length, slot, pages, num_cached)
        return True
