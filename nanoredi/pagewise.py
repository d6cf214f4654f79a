"""Decoding over a paged cache without a GPU: each page is read once, where it lies, for all the rows that use it.

Gathering every row's pages would copy the whole cache at every step, and a loop over rows would spend its time in
Python. Here a stretch of the pool is a batch of matrix products, one head of one page a member, and the queries of the
page's users attend to it as if they were one sequence:

    queries (P*K, R*G, E), keys and values (P*K, page, E)          R users of a page, G = H/K

The scores of all pages are brought to weights by each row's largest score, and then, page by page, the values are
weighed. A row adds up what its pages give.

A page of one's own has one user, one of a shared beginning mostly as many as a prompt has samples, and a few, such as
the chat template's head, very many: three groups, each with its own R.

What is as large as the queries or the scores is allocated once a step and used at every layer: a step writes so much
that new memory, which the system must first provide, may cost as much as the products. In half precision keys and
values are made fp32, a few pages at a time: their products would round the scores.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 20  # keys' elements that are made fp32 at once, and stay in a CPU's cache
_FEW_QUERIES = 7  # up to so many, keys @ queries.T is the faster product, though its result must be turned


class PageWise:
    """Attention of one new token a row, for one decode step.

    Below, a user is a row with one key-value head, b * K + k, and U counts the places for users at pages.
    """

    def __init__(self, page_table: Tensor, lengths: Tensor, num_shared: Tensor, keys: Tensor, num_heads: int):
        """
        Args:
            page_table: (B, C) int64, each row's pages, then anything.
            lengths: (B,) int64, tokens that each row attends to.
            num_shared: (B,) int64, how many of each row's first pages are whole pages of a shared beginning.
            keys: (P, K, page, E), any layer's, for its shape and dtype.
            num_heads: H.
        """
        _, num_kv_heads, page_size, head_dim = keys.shape
        grouped = num_heads // num_kv_heads  # G
        number = torch.arange(page_table.shape[1])
        filled = (lengths[:, None] - number * page_size).clamp(max=page_size)  # (B, C): tokens in each of a row's pages
        shared = number < num_shared[:, None]
        row, column = ((filled > 0) & ~shared).nonzero(as_tuple=True)
        groups = [(page_table[row, column], row, filled[row, column])]
        row, column = shared.nonzero(as_tuple=True)
        if len(row):
            pages, whole = page_table[row, column], torch.full_like(row, page_size)
            users = torch.bincount(pages)
            common = users[users > 0].double().quantile(0.9)
            few = users[pages] <= common
            groups += [(pages[part], row[part], whole[part]) for part in (few, ~few)]
        self.groups = [_Group(*group, keys, grouped) for group in groups if len(group[0])]
        self.sizes = [len(group.users) for group in self.groups]
        self.users = torch.cat([group.users for group in self.groups])  # (U,)

        # The places of each user, one user after the other.
        taken = torch.cat([group.taken for group in self.groups]).nonzero().squeeze(1)
        self.places = taken[self.users[taken].argsort(stable=True)]
        self.starts = F.pad(self.users[taken].bincount().cumsum(0), (1, -1))

        self.rows = torch.empty(len(lengths) * num_kv_heads, grouped * head_dim)
        self.queries, self.outs = torch.empty(2, len(self.users), grouped * head_dim)
        self.scores = torch.empty(len(self.users), grouped, page_size)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """
        Args:
            q: (B, H, E).
            keys, values: (P, K, page, E), one layer's pool.

        Returns:
            (B, H, E).
        """
        # exp2 of scores / log 2: torch's exp takes four times as long, and where it gives next to nothing twenty times.
        rows = self.rows.view(q.shape).copy_(q).mul_(q.shape[-1] ** -0.5 / math.log(2)).view_as(self.rows)
        torch.index_select(rows, 0, self.users, out=self.queries)
        queries, scores, outs = (x.split(self.sizes) for x in (self.queries, self.scores, self.outs))
        for group, *places in zip(self.groups, queries, scores):
            group.score(keys, *places)
        tops = self._over_places(self.scores.amax(-1), "max")  # (B*K, G)
        weights = self.scores.sub_(tops.index_select(0, self.users)[..., None]).exp2_()
        for group, *places in zip(self.groups, scores, outs):
            group.weigh(values, *places)
        sums = self._over_places(weights.sum(-1), "sum")
        return self._over_places(self.outs, "sum").view(q.shape).div_(sums.view(*q.shape[:2], 1)).to(q.dtype)

    def _over_places(self, x: Tensor, mode: str) -> Tensor:
        """The largest, or the sum, of x (U, ...) over each user's places: (B*K, ...)."""
        return F.embedding_bag(self.places, x, self.starts, mode=mode)


class _Group:
    """P pages with R places each for users.

    Attributes:
        users: (P*K*R,) int64; 0 in a place that is not taken, of which nothing is used.
        taken: (P*K*R,) bool.
        wide: (at_once, K, page, E) fp32, for pages in half precision; None where they are fp32.
        turned: (at_once*K, page, R*G) fp32, for the scores of few queries; None where they are many.
    """

    def __init__(self, pages: Tensor, row: Tensor, filled: Tensor, keys: Tensor, grouped: int):
        """pages, row, filled (X,) int64: of X rows the page, the row, and how many tokens it attends to there."""
        _, num_kv_heads, page_size, head_dim = keys.shape
        used, place, counts = pages.unique(return_inverse=True, return_counts=True)
        num_pages, stretch = len(used), int(used[-1] - used[0]) + 1
        if stretch < 3 * num_pages:
            self.pages: slice | Tensor = slice(int(used[0]), int(used[0]) + stretch)
            num_pages, place = stretch, pages - used[0]
        else:  # most of the stretch is not in use: copying what is takes less
            self.pages = used
        order = place.argsort(stable=True)
        place = place[order]
        users = torch.full((num_pages, num_kv_heads, int(counts.max())), -1)
        users[place, :, _turn(place)] = row[order][:, None] * num_kv_heads + torch.arange(num_kv_heads)
        self.taken = (users >= 0).flatten()
        self.users = users.flatten().clamp_(min=0)
        self.mask = None
        if (filled < page_size).any():  # then each page has one user
            tokens = torch.full((num_pages,), page_size)
            tokens[place] = filled[order]
            self.mask = torch.where(torch.arange(page_size) < tokens[:, None], 0.0, -torch.inf)[:, None, None]
        self.shape = num_pages, num_kv_heads, users.shape[2] * grouped  # (P, K, R*G)
        self.at_once, self.wide, self.turned = num_pages, None, None
        if keys.dtype != torch.float32:
            self.at_once = min(num_pages, max(1, _AT_ONCE // keys[0].numel()))
            self.wide = torch.empty(self.at_once, *keys.shape[1:])
        if self.shape[2] <= _FEW_QUERIES:
            self.turned = torch.empty(self.at_once * num_kv_heads, page_size, self.shape[2])

    def score(self, keys: Tensor, queries: Tensor, scores: Tensor) -> None:
        """The pool's keys (P, K, page, E) and the places' queries (P*K*R, G, E) -> scores (P*K*R, G, page)."""
        queries, scores = (x.view(*self.shape, -1) for x in (queries, scores))
        for part, columns in self._fp32(keys):
            rows, members = queries[part].flatten(0, 1), scores[part].flatten(0, 1)
            if self.turned is None:
                torch.bmm(rows, columns.mT, out=members)
            else:
                members.copy_(torch.bmm(columns, rows.mT, out=self.turned[: len(members)]).mT)
        if self.mask is not None:
            scores += self.mask

    def weigh(self, values: Tensor, weights: Tensor, outs: Tensor) -> None:
        """The pool's values (P, K, page, E) and the places' weights (P*K*R, G, page) -> outs (P*K*R, G, E)."""
        weights, outs = (x.view(*self.shape, -1) for x in (weights, outs))
        for part, contents in self._fp32(values):
            torch.bmm(weights[part].flatten(0, 1), contents, out=outs[part].flatten(0, 1))

    def _fp32(self, pool: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The pages in fp32, a stretch of them at a time: which these are, and each head of each page (p*K, page, E)."""
        pages = pool[self.pages]
        for start in range(0, len(pages), self.at_once):
            part = slice(start, start + self.at_once)
            wide = pages[part] if self.wide is None else self.wide[: len(pages[part])].copy_(pages[part])
            yield part, wide.flatten(0, 1)


def _turn(sorted_values: Tensor) -> Tensor:
    """How many equal values are before each one (X,)."""
    return torch.arange(len(sorted_values)) - torch.searchsorted(sorted_values, sorted_values)
