"""Decoding over a paged cache without a GPU: each page is read once, where it lies, for all the rows that use it.

Gathering every row's pages would copy the whole cache at every step, and a loop over rows would spend its time in
Python. Here a stretch of the pool is a batch of matrix products, one head of one page a member, and the queries of the
page's users attend to it as if they were one sequence:

    queries (P*K, R*G, E), keys and values (P*K, page, E)          R users of a page, G = H/K

Each of a row's pages gives a part: the sum of the values weighed by exp(score - top), top being the part's largest
score, and the sum of these weights. The parts are then brought to the row's largest top and added up
(FlashAttention-2, arXiv 2307.08691, section 2.3.1).

A page of one's own has one user, one of a shared beginning mostly as many as a prompt has samples, and a few, such as
the chat template's head, very many: three groups, each with its own R.

What is as large as the queries or the scores is allocated once a step and used at every layer: a step writes so much
that new memory, which the system must first provide, may cost as much as the products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 20  # keys' elements that are made fp32 at once, and stay in a CPU's cache


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

        # The places of each user's parts (B*K, most parts); a line is filled up with place U, where there is nothing.
        parts = torch.cat([group.taken for group in self.groups]).nonzero().squeeze(1)
        parts = parts[self.users[parts].argsort(stable=True)]
        users = self.users[parts]
        turn = _turn(users)
        self.table = torch.full((len(lengths) * num_kv_heads, int(turn.max()) + 1), len(self.users))
        self.table[users, turn] = parts
        # The same for each query head, b * H + h, one after the other.
        heads = (self.table[..., None] * grouped + torch.arange(grouped)).transpose(1, 2)  # (B*K, G, C)
        self.lookups = heads[(self.table < len(self.users))[:, None].expand_as(heads)]
        self.starts = F.pad(torch.bincount(users).repeat_interleave(grouped).cumsum(0), (1, -1))

        self.queries = keys.new_empty(len(lengths), num_heads, head_dim)
        self.outs = torch.empty(len(self.users), grouped, head_dim)
        self.sums, self.tops = torch.zeros(2, len(self.users) + 1, grouped)
        self.tops[-1] = -torch.inf

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """
        Args:
            q: (B, H, E).
            keys, values: (P, K, page, E), one layer's pool.

        Returns:
            (B, H, E).
        """
        queries = self.queries.copy_(q).view(len(self.table), -1)  # (B*K, G*E)
        places = zip(*(x.split(self.sizes) for x in (self.outs, self.sums[:-1], self.tops[:-1])))
        for group, place in zip(self.groups, places):
            group(queries, keys, values, *place)
        weights = (self.tops[:-1] - self.tops[self.table].amax(1).index_select(0, self.users)).exp_()  # (U, G)
        self.sums[:-1] *= weights
        weights /= self.sums[self.table].sum(1).index_select(0, self.users)
        weights, outs = weights.flatten()[self.lookups], self.outs.flatten(0, 1)
        out = F.embedding_bag(self.lookups, outs, self.starts, mode="sum", per_sample_weights=weights)
        return out.view(q.shape).to(q.dtype)


class _Group:
    """P pages with R places each for users.

    Attributes:
        users: (P*K*R,) int64; 0 in a place that is not taken, whose part is never looked at.
        taken: (P*K*R,) bool.
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
        self.queries = keys.new_empty(len(self.users), grouped * head_dim)
        self.scores = torch.empty(*self.shape, page_size)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, outs: Tensor, sums: Tensor, tops: Tensor) -> None:
        """(B*K, G*E) and the pool's (P, K, page, E) -> the parts' sums of values outs (P*K*R, G, E), sums of weights
        and tops (P*K*R, G)."""
        keys, values = keys[self.pages], values[self.pages]
        q = torch.index_select(queries, 0, self.users, out=self.queries).view(*self.shape, -1)
        outs, sums, tops = outs.view(q.shape), sums.view(self.shape), tops.view(self.shape)
        # In half precision keys and values are made fp32, a few pages at a time: their products would round the scores.
        num_pages = len(q) if keys.dtype == torch.float32 else max(1, _AT_ONCE // keys[0].numel())
        for start in range(0, len(q), num_pages):
            part = slice(start, start + num_pages)
            scores = self.scores[part]
            # A member of the products is a page and head.
            tensors = q[part], keys[part], values[part], scores
            rows, columns, contents, members = (x.flatten(0, 1).float() for x in tensors)
            torch.baddbmm(members, rows, columns.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=members)
            if self.mask is not None:
                scores += self.mask[part]
            torch.amax(scores, -1, out=tops[part])
            scores.sub_(tops[part, ..., None]).exp_()
            torch.sum(scores, -1, out=sums[part])
            torch.bmm(members, contents, out=outs[part].flatten(0, 1))


def _turn(sorted_values: Tensor) -> Tensor:
    """How many equal values are before each one (X,)."""
    return torch.arange(len(sorted_values)) - torch.searchsorted(sorted_values, sorted_values)
