"""Requests, each with what its random numbers depend on, and who is in the batch: continuous batching over pages.

A row of the batch decodes one sample of a prompt. Its prompt, all but the last token, is put into the cache a piece
at a time, under a budget of tokens between two decode steps; then every decode step adds one token, the prompt's last
one first. So a prompt that is in the cache already, be it for another sample, costs nothing more. A row that ends
frees its pages and its place at once. When pages run out the youngest row is put back: it enters again later, with
the tokens it has, and goes on to the same sample.

Nothing here touches a device. What a decode step needs to know of every row is kept in arrays, by place in the batch.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nanoredi.common.errors import UserError
from nanoredi.data.tokenizer import Stream
from nanoredi.sampler.pages import Pages


@dataclass
class Request:
    """A prompt to be completed."""

    prompt: list[int]  # token ids
    sample: int = 0  # which of a prompt's samples this is
    key: int = 0  # what the sample's random numbers depend on (requests_for)
    name: str = "a prompt"  # in messages
    max_tokens: int | None = None  # longest completion; None: the sampler's
    stream: Stream | None = None  # gets the completion's tokens as they come, and ends it when it has stopped
    tokens: list[int] = field(default_factory=list)  # the completion when it has ended, with a stop text, no stop token
    finish_reason: str | None = None  # "stop", or "length" when max_tokens or the context's end came first


def requests_for(prompts: list[list[int]], n: int, seed: int, names: Iterable[str] | None = None) -> list[Request]:
    """n samples of each prompt, in order. A prompt that comes again gets further samples, numbered on, not the same ones.

    Args:
        names: of the prompts, for messages.
    """
    requests = []
    before: Counter[tuple[int, ...]] = Counter()
    for prompt, name in zip(prompts, names or [Request.name] * len(prompts), strict=True):
        first = before[tuple(prompt)]
        for sample in range(first, first + n):
            requests.append(Request(prompt, sample, _key(seed, prompt, sample), name))
        before[tuple(prompt)] += n
    return requests


def _key(seed: int, prompt: list[int], sample: int) -> int:
    """64 bits of what a sample's random numbers depend on, as a signed integer."""
    text = ",".join(map(str, (seed, sample, *prompt)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(eq=False)  # each is itself alone, and to look for a free place takes no time
class Row:
    """A request in the batch."""

    request: Request
    tokens: list[int]  # the prompt and what was completed when the row entered
    place: int  # in the batch
    pages: list[int]  # that hold its cache, in order
    cached: int  # how many of its first tokens are in the cache, or in a piece that will be before the next decode step

    @property
    def to_cache(self) -> int:
        """Tokens to be in the cache before the row decodes."""
        return len(self.tokens) - 1


@dataclass
class Entry:
    """What is to be done before the next decode step, in this order."""

    pieces: list[tuple[Row, int, int]] = field(default_factory=list)  # put a row's tokens start:end into its pages
    copies: list[tuple[int, int]] = field(
        default_factory=list
    )  # of pages (source, target), from whose end two rows part
    rows: list[Row] = field(default_factory=list)  # that decode from now on


class Scheduler:
    """Rows, pages, and the requests that wait for them.

    Attributes:
        waiting: requests, the next one first.
        rows: by place; None where the place is free.
        lengths, rooms: (B,) int64, tokens in each row's cache, and how many its pages have room for.
        left: (B,) int64, how many more decode steps each row may take; 0 for rows that do not decode.
        entered: (B,) int64, a number for each entering of a row, ever rising; 0 where the place is free.
    """

    def __init__(
        self, pages: Pages, batch_size: int, max_tokens: int, context: int, budget: int, begins_again: bool = False
    ):
        """
        Args:
            budget: tokens that are put into the cache between two decode steps.
            begins_again: whether a row that was put back makes its tokens again, and not only what the cache held of them.
        """
        self.pages, self.page_size = pages, pages.page_size
        self.max_tokens, self.context, self.budget, self.begins_again = max_tokens, context, budget, begins_again
        self.waiting: deque[Request] = deque()
        self.rows: list[Row | None] = [None] * batch_size
        self.entering: Row | None = None  # its prompt is not wholly in the cache yet
        self.lengths, self.rooms, self.left, self.entered = np.zeros((4, batch_size), dtype=np.int64)
        self._last_entered = 0

    @property
    def num_rows(self) -> int:
        return len(self.rows) - self.rows.count(None)

    def limit(self, request: Request) -> int:
        """The longest completion of a request."""
        longest = self.max_tokens if request.max_tokens is None else request.max_tokens
        return min(longest, self.context - len(request.prompt))

    def check(self, requests: Iterable[Request]) -> None:
        """
        Raises:
            UserError: naming a prompt that is empty, leaves no room in the context, or can never be completed in this
            cache.
        """
        for request in requests:
            length = len(request.prompt)
            if not length:
                raise UserError(f"{request.name} has no tokens")
            if length >= self.context:
                raise UserError(
                    f"{request.name} has {length:,} tokens with its template and fills the context of "
                    f"{self.context:,}; give a shorter one"
                )
            longest, room = length + self.limit(request) - 1, len(self.pages.users) * self.page_size
            if longest > room:
                raise UserError(
                    f"{request.name} has {length:,} tokens with its template and may become {longest:,} long; "
                    f"the cache has room for {room:,}: give a larger --cache_gb or a smaller --max_tokens"
                )

    def enter(self) -> Entry:
        """Let waiting requests in while there are places, pages and budget."""
        entry, budget = Entry(), self.budget
        while self.entering or self._admit(entry):
            row = self.entering
            start = row.cached
            row.cached = min(start + budget, row.to_cache)
            budget -= row.cached - start
            if row.cached > start:
                entry.pieces.append((row, start, row.cached))
            done = row.cached == row.to_cache
            # What is in a piece is known at once: whoever shares it computes after it, or with it.
            num_filled = -(-row.cached // self.page_size) if done else row.cached // self.page_size
            for number in range(start // self.page_size, num_filled):
                self.pages.learn(row.tokens[: row.cached], row.pages, number)
            if not done:
                break
            self.entering = None
            self.lengths[row.place] = row.to_cache
            self.rooms[row.place] = len(row.pages) * self.page_size
            self.left[row.place] = self.limit(row.request) - (len(row.tokens) - len(row.request.prompt))
            entry.rows.append(row)
        for source, _ in entry.copies:
            self.pages.release(source)
        return entry

    def grow(self) -> list[tuple[int, int, int]] | None:
        """Give every row that will decode a page for its next token, if it needs one, the oldest rows first.

        Returns:
            (place, number, page) of each new page; None when the pages ran out.
        """
        needy = np.flatnonzero((self.left > 0) & (self.lengths == self.rooms))
        if len(needy) > self.pages.num_free:
            return None
        new = []
        for place in needy[np.argsort(self.entered[needy])].tolist():
            row = self.rows[place]
            new.append((place, len(row.pages), self.pages.take()))
            row.pages.append(new[-1][2])
            self.rooms[place] += self.page_size
        return new

    def youngest(self) -> Row:
        """The row that entered last."""
        return max((row for row in self.rows if row), key=lambda row: self.entered[row.place])

    def put_back(self, row: Row) -> None:
        """Take a row out, to enter again as the next one."""
        self.release(row)
        self.waiting.appendleft(row.request)

    def release(self, row: Row) -> None:
        """Free a row's pages and its place."""
        if row is self.entering:
            self.entering = None
        for page in row.pages:
            self.pages.release(page)
        self.rows[row.place] = None
        self.left[row.place] = self.entered[row.place] = 0

    def _admit(self, entry: Entry) -> bool:
        """Give the next waiting request a place and the pages of its prompt, if they are free."""
        if not self.waiting or None not in self.rows:
            return False
        request = self.waiting[0]
        tokens = request.prompt + ([] if self.begins_again else request.tokens)
        to_cache, size = len(tokens) - 1, self.page_size
        known, begun = self.pages.find(tokens[:to_cache])
        num_pages = -(-to_cache // size)
        needed = num_pages - sum(self.pages.users[page] > 0 for page in known)
        # A page a row is kept free for those that are in: else they would soon put the new one back.
        if needed + self.num_rows > self.pages.num_free and self.num_rows:
            return False
        self.waiting.popleft()
        pages = list(known)
        for page in known:
            self.pages.share(page)
        if begun is not None and not self.pages.users[begun]:
            self.pages.share(begun)
            pages.append(begun)
        elif begun is not None:
            self.pages.share(begun)  # until it is copied
            pages.append(self.pages.take())
            entry.copies.append((begun, pages[-1]))
        pages += [self.pages.take() for _ in range(len(pages), num_pages)]
        cached = to_cache if begun is not None else len(known) * size
        place = self.rows.index(None)
        self.rows[place] = self.entering = Row(request, tokens, place, pages, cached)
        self._last_entered += 1
        self.entered[place] = self._last_entered
        return True
