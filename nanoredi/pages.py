"""The book of a cache's pages: which are free, how many rows use each, which hold a beginning that others may share.

A page holds the keys and values of page_size tokens of one row, at every layer. Whoever begins with the same tokens
may use the same page: it is known by its own tokens and by the page before it, so equal pages mean equal beginnings,
token by token. A page that nobody uses is free, but stays known until it is taken for something else.

Pages that hold beginnings are taken from the pool's low end, rows' own ones from its high end, each time the
outermost free one: both kinds stay close together, and what a decode step on a CPU goes through is little more than
what is in use. Where nothing comes after the rows that end, the others' pages are moved together (Scheduler.compact).
"""

import heapq
from collections.abc import Sequence

# How a page is known: the number of the page before it (0: none), and its tokens.
_Beginning = tuple[int, tuple[int, ...]]


class Pages:
    """num_pages pages of page_size tokens, all free.

    Attributes:
        num_free: pages that nobody uses.
        users: how many use each page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self.num_free = num_pages
        self.users = [0] * num_pages
        # Heaps, each of which holds every free page, and some that have been taken from the other end since.
        self._low = list(range(num_pages))
        self._high = [-page for page in reversed(range(num_pages))]
        self._in_low, self._in_high = [True] * num_pages, [True] * num_pages
        self._known: dict[_Beginning, int] = {}
        self._beginning: list[_Beginning | None] = [None] * num_pages
        # A page gets a new number each time it becomes known, so nothing known by its old content is found again.
        self._number, self._last_number = [0] * num_pages, 0

    def outermost(self, low: bool) -> int | None:
        """The free page nearest to the low or the high end; None when there is none."""
        heap, held = (self._low, self._in_low) if low else (self._high, self._in_high)
        while heap and self.users[abs(heap[0])]:
            held[abs(heapq.heappop(heap))] = False
        return abs(heap[0]) if heap else None

    def take(self, low: bool) -> int:
        """The outermost free page; whatever it was known for is forgotten. There must be one."""
        page = self.outermost(low)
        self.users[page] = 1
        self.num_free -= 1
        if self._beginning[page] is not None:
            del self._known[self._beginning[page]]
            self._beginning[page] = None
        return page

    def share(self, page: int) -> None:
        """Use a page that is known, whether or not others use it."""
        self.num_free -= not self.users[page]
        self.users[page] += 1

    def release(self, page: int) -> None:
        """Use a page no more."""
        self.users[page] -= 1
        if not self.users[page]:
            self.num_free += 1
            if not self._in_low[page]:
                self._in_low[page] = True
                heapq.heappush(self._low, page)
            if not self._in_high[page]:
                self._in_high[page] = True
                heapq.heappush(self._high, -page)

    def move(self, source: int, target: int) -> None:
        """Hand source's users, and what it is known for, to target, which was taken for that; source is free then."""
        self.users[target], self.users[source] = self.users[source], 1
        self.release(source)
        beginning, self._beginning[source] = self._beginning[source], None
        if beginning is not None:
            self._known[beginning], self._beginning[target] = target, beginning
            self._number[target] = self._number[source]

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int | None]:
        """Which pages hold the beginning of tokens.

        Returns:
            The whole pages, as many as are known; and, if these are all, the page that begins with the rest, if known.
        """
        pages: list[int] = []
        for start in range(0, len(tokens), self.page_size):
            page = self._known.get(self._key(tokens[start : start + self.page_size], pages))
            if page is None:
                break
            if start + self.page_size > len(tokens):
                return pages, page
            pages.append(page)
        return pages, None

    def learn(self, tokens: Sequence[int], pages: list[int], number: int) -> None:
        """Make a row's page known, by its number. Its pages hold tokens; those before this one are known."""
        start = number * self.page_size
        beginning = self._key(tokens[start : start + self.page_size], pages[:number])
        page = pages[number]
        if beginning not in self._known and self._beginning[page] is None:
            self._known[beginning] = page
            self._beginning[page] = beginning
            self._last_number += 1
            self._number[page] = self._last_number

    def _key(self, tokens: Sequence[int], before: list[int]) -> _Beginning:
        return (self._number[before[-1]] if before else 0), tuple(tokens)
