"""Requests, each with what its random numbers depend on, and who is in the batch: continuous batching over pages.

A row of the batch decodes one sample of a prompt. Its prompt, all but the last token, is put into the cache a piece
at a time, under a budget of tokens between two decode steps; then every decode step adds one token, the prompt's last
one first. So a prompt that is in the cache already, be it for another sample, costs nothing more. A row that ends
frees its pages and its place at once. When pages run out the youngest row is put back: it enters again later, with
the tokens it has, and goes on to the same sample.

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
    tokens: list[int]  # the prompt, and what was completed as far as it was looked at
    longest: int  # how many tokens it may have
    place: int  # in the batch
    pages: list[int]  # that hold its cache, in order
    cached: int  # tokens in the cache, with those of the piece and the decode step that are under way

    @property
    def num_drawn(self) -> int:
        """Tokens of its completion, with one that was not looked at yet."""
        return self.cached + 1 - len(self.request.prompt)


@dataclass
class Entry:
    """What is to be done before the next decode step, in this order."""

    pieces: list[tuple[Row, int, int]] = field(default_factory=list)  # put a row's tokens start:end into its pages
    copies: list[tuple[int, int]] = field(default_factory=list)  # of pages, (source, target)
    rows: list[Row] = field(default_factory=list)  # that decode from now on


class Scheduler:
    """Rows, pages, and the requests that wait for them.

    Attributes:
        waiting: requests, the next one first.
        rows: in the batch, by place; those that entered first come first.
        entering: the row whose prompt is not wholly in the cache yet, if there is one.
    """

    def __init__(
        self, pages: Pages, batch_size: int, max_tokens: int, context: int, budget: int, begins_again: bool = False
    ):
        """budget tokens are put into the cache between two decode steps; begins_again says whether a row that was put back
        makes its tokens again, and not only what the cache held of them."""
        self.pages, self.page_size, self.batch_size = pages, pages.page_size, batch_size
        self.max_tokens, self.context, self.budget, self.begins_again = max_tokens, context, budget, begins_again
        self.waiting: deque[Request] = deque()
        self.rows: dict[int, Row] = {}
        self.entering: Row | None = None

    def limit(self, request: Request) -> int:
        """The longest completion of a request."""
        longest = self.max_tokens if request.max_tokens is None else request.max_tokens
        return min(longest, self.context - len(request.prompt))

    def check(self, requests: Iterable[Request]) -> None:
        """Raise a UserError that names a prompt which is empty, or leaves no room in the context or for ever in this cache."""
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
            start, to_cache = row.cached, len(row.tokens) - 1
            row.cached = min(start + budget, to_cache)
            budget -= row.cached - start
            if row.cached > start:
                entry.pieces.append((row, start, row.cached))
            done = row.cached == to_cache
            # What is in a piece is known at once: whoever shares it computes after it, or with it.
            num_filled = -(-row.cached // self.page_size) if done else row.cached // self.page_size
            for number in range(start // self.page_size, num_filled):
                self.pages.learn(row.tokens[: row.cached], row.pages, number)
            if not done:
                break
            self.entering = None
            entry.rows.append(row)
        for source, _ in entry.copies:
            self.pages.release(source)
        return entry

    def grow(self) -> list[tuple[int, int, int]] | None:
        """Give every row that will decode a page for its next token, if it needs one, the oldest rows first.

        Returns:
            (place, number, page) of each new page; None when the pages ran out.
        """
        needy = [row for row in self.decoding() if row.cached == len(row.pages) * self.page_size]
        if len(needy) > self.pages.num_free:
            return None
        new = []
        for row in needy:
            new.append((row.place, len(row.pages), self.pages.take()))
            row.pages.append(new[-1][2])
        return new

    def decoding(self) -> list[Row]:
        """The rows of the next decode step: all but their last token is in the cache, and they may have more."""
        return [row for row in self.rows.values() if len(row.tokens) - 1 <= row.cached < row.longest - 1]

    def put_back(self) -> None:
        """Take the row out that entered last, to enter again as the next one, with the tokens that it has."""
        row = next(reversed(self.rows.values()))
        row.request.tokens = max(row.request.tokens, row.tokens[len(row.request.prompt) :], key=len)
        self.release(row)
        self.waiting.appendleft(row.request)

    def release(self, row: Row) -> None:
        """Free a row's pages and its place."""
        if row is self.entering:
            self.entering = None
        for page in row.pages:
            self.pages.release(page)
        del self.rows[row.place]

    def _admit(self, entry: Entry) -> bool:
        """Give the next waiting request a place and the pages of its prompt, if they are free."""
        if not self.waiting or len(self.rows) == self.batch_size:
            return False
        request = self.waiting[0]
        tokens = request.prompt + ([] if self.begins_again else request.tokens)
        to_cache, size = len(tokens) - 1, self.page_size
        known, begun = self.pages.find(tokens[:to_cache])
        num_pages = -(-to_cache // size)
        needed = num_pages - sum(self.pages.users[page] > 0 for page in known)
        # A page a row is kept free for those that are in: else they would soon put the new one back.
        if needed + len(self.rows) > self.pages.num_free and self.rows:
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
        place = next(place for place in range(self.batch_size) if place not in self.rows)
        longest = len(request.prompt) + self.limit(request)
        self.rows[place] = self.entering = Row(request, tokens, longest, place, pages, cached)
        return True
