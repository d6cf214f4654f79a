"""The page allocator of the key-value cache: which pages are free, how many rows use each, and which prefix each holds.

A page holds the keys and values of page_size tokens of a row, at every layer. Rows that begin with the same tokens may
share pages (prefix caching): a page is registered by its own tokens and by the page before it, so equal pages mean
equal prefixes, token by token. A page that no row uses is free, but stays registered until it is allocated again.

The lowest free page is allocated first: on a CPU a page takes memory only once it is written.
"""

import heapq
import itertools
from collections.abc import Sequence

# What a page is registered by: the version of the page before it (0: none), and its tokens.
_Key = tuple[int, tuple[int, ...]]


class Pages:
    """num_pages pages of page_size tokens, all free.

    Attributes:
        num_free: pages that no row uses.
        refcounts: how many rows use each page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.page_size, self.num_free = page_size, num_pages
        self.refcounts = [0] * num_pages
        self._free = list(range(num_pages))  # a heap of all free pages, some of them twice, and of some in use again
        self._registered: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * num_pages
        # A page gets a new version when it is registered, so pages that followed its old content are found no more.
        self._versions, self._new_version = [0] * num_pages, itertools.count(1)

    def allocate(self) -> int:
        """The lowest free page, no longer registered. There must be one."""
        while self.refcounts[page := heapq.heappop(self._free)]:
            pass
        self.refcounts[page] = 1
        self.num_free -= 1
        if (key := self._keys[page]) is not None:
            del self._registered[key]
            self._keys[page] = None
        return page

    def share(self, page: int) -> None:
        """Use a registered page, whether or not other rows use it."""
        if not self.refcounts[page]:
            self.num_free -= 1
        self.refcounts[page] += 1

    def release(self, page: int) -> None:
        """Stop using a page."""
        self.refcounts[page] -= 1
        if not self.refcounts[page]:
            self.num_free += 1
            heapq.heappush(self._free, page)

    def find_prefix(self, tokens: Sequence[int]) -> tuple[list[int], int | None]:
        """Which registered pages hold the longest prefix of tokens.

        Returns:
            The full pages; and, if they hold all but the last few tokens, a page that begins with these, or None.
        """
        pages: list[int] = []
        for start in range(0, len(tokens), self.page_size):
            page = self._registered.get(self._key(tokens[start : start + self.page_size], pages))
            if page is None:
                break
            if start + self.page_size > len(tokens):
                return pages, page
            pages.append(page)
        return pages, None

    def register(self, tokens: Sequence[int], pages: list[int], number: int) -> None:
        """Register pages[number], which holds its part of a row's tokens; the pages before it are registered."""
        start, page = number * self.page_size, pages[number]
        key = self._key(tokens[start : start + self.page_size], pages[:number])
        if key not in self._registered and self._keys[page] is None:
            self._registered[key], self._keys[page] = page, key
            self._versions[page] = next(self._new_version)

    def _key(self, tokens: Sequence[int], before: list[int]) -> _Key:
        return (self._versions[before[-1]] if before else 0), tuple(tokens)
