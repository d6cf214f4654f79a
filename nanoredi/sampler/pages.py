"""The book of a cache's pages: which are free, how many rows use each, which hold a beginning that others may share.

A page holds the keys and values of page_size tokens of one row, at every layer. Whoever begins with the same tokens
may use the same page: it is known by its own tokens and by the page before it, so equal pages mean equal beginnings,
token by token. A page that nobody uses is free, but stays known until it is taken for something else.

Each time the lowest free page is taken: on a CPU the pool's memory counts from when it is first written.
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
        self._free = list(range(num_pages))  # a heap that has every free page, and some that are shared again
        self._in_heap = [True] * num_pages
        self._known: dict[_Beginning, int] = {}
        self._beginning: list[_Beginning | None] = [None] * num_pages
        # A page gets a new number each time it becomes known, so nothing known by its old content is found again.
        self._number, self._last_number = [0] * num_pages, 0

    def take(self) -> int:
        """The lowest free page; whatever it was known for is forgotten. There must be one."""
        page = self._pop()
        while self.users[page]:
            page = self._pop()
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
            if not self._in_heap[page]:
                self._in_heap[page] = True
                heapq.heappush(self._free, page)

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

    def _pop(self) -> int:
        page = heapq.heappop(self._free)
        self._in_heap[page] = False
        return page

    def _key(self, tokens: Sequence[int], before: list[int]) -> _Beginning:
        return (self._number[before[-1]] if before else 0), tuple(tokens)
