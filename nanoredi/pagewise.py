"""Decoding over a paged cache without a GPU: each page is read once, where it lies, for all the rows that use it.

Gathering every row's pages would copy the whole cache at every step, and a loop over rows would spend its time in
Python. Here a stretch of the pool is a batch for PyTorch's flash attention, one page a member, and the queries of the
page's users attend to it as if they were one sequence:

    queries (P, K, R*G, E), keys and values (P, K, page, E)          R users of a page, G = H/K

Each of a row's pages gives a part: an output, and the logarithm of the sum of exponentials that it was divided by. With
these logarithms the parts are weighed against each other (FlashAttention-2, arXiv 2307.08691, section 2.3.1).

A page of one's own has one user, one of a shared beginning mostly as many as a prompt has samples, and a few, such as
the chat template's head, very many: three groups, each with its own R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # SDPA keeps the logarithms to itself


class PageWise:
    """Attention of one new token a row, for one decode step."""

    def __init__(self, page_table: Tensor, lengths: Tensor, num_shared: Tensor, page_size: int):
        """
        Args:
            page_table: (B, C) int64, each row's pages, then anything.
            lengths: (B,) int64, tokens that each row attends to.
            num_shared: (B,) int64, how many of each row's first pages are whole pages of a shared beginning.
        """
        num_rows = len(lengths)
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
        self.groups = [_Group(*group, page_size) for group in groups if len(group[0])]
        # Where each row's parts are among all groups' parts, for adding them up.
        self.users = torch.cat([group.users for group in self.groups])  # (U,)
        parts = torch.cat([group.taken for group in self.groups]).nonzero().squeeze(1)
        self.parts = parts[self.users[parts].argsort(stable=True)]
        self.starts = torch.searchsorted(self.users[self.parts], torch.arange(num_rows))

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """
        Args:
            q: (B, H, E).
            keys, values: (P, K, page, E), one layer's pool.

        Returns:
            (B, H, E).
        """
        queries = q.unflatten(1, (keys.shape[1], -1)).transpose(1, 2).contiguous()  # (B, G, K, E)
        outs, logs = zip(*(group(queries, keys, values) for group in self.groups))
        log = torch.cat(logs)  # (U, G, K)
        weights = (log - self._over_parts(log, "max").index_select(0, self.users)).exp_()
        weighed = queries.new_empty(*log.shape, queries.shape[-1], dtype=torch.float32)
        for out, weight, target in zip(outs, *(x.split([len(out) for out in outs]) for x in (weights, weighed))):
            torch.mul(out, weight[..., None], out=target)
        out = self._over_parts(weighed, "sum") / self._over_parts(weights, "sum")[..., None]
        return out.transpose(1, 2).flatten(1, 2).to(q.dtype)

    def _over_parts(self, parts: Tensor, mode: str) -> Tensor:
        """Each row's sum or maximum of its parts: (U, ...) -> (B, ...)."""
        return F.embedding_bag(self.parts, parts.flatten(1), self.starts, mode=mode).unflatten(1, parts.shape[1:])


class _Group:
    """P pages with R places each for users.

    Attributes:
        users: (P*R,) int64, the rows; 0 in a place that is not taken, whose part is never looked at.
        taken: (P*R,) bool.
    """

    def __init__(self, pages: Tensor, row: Tensor, filled: Tensor, page_size: int):
        """pages, row, filled (X,) int64: of X users the page, the row, and how many tokens it attends to there."""
        used, place, counts = pages.unique(return_inverse=True, return_counts=True)
        num_pages, stretch = len(used), int(used[-1] - used[0]) + 1
        if stretch < 3 * num_pages:
            self.pages: slice | Tensor = slice(int(used[0]), int(used[0]) + stretch)
            num_pages, place = stretch, pages - used[0]
        else:  # most of the stretch is not in use: copying what is takes less
            self.pages = used
        order = place.argsort(stable=True)
        place = place[order]
        turn = torch.arange(len(place)) - torch.searchsorted(place, place)  # among the users of the same page
        self.num_users = int(counts.max())
        taken = place * self.num_users + turn
        self.users = torch.zeros(num_pages * self.num_users, dtype=torch.int64)
        self.users[taken] = row[order]
        self.taken = torch.zeros_like(self.users, dtype=torch.bool)
        self.taken[taken] = True
        self.mask = None
        if (filled < page_size).any():  # then each page has one user
            tokens = torch.full((num_pages,), page_size)
            tokens[place] = filled[order]
            self.mask = torch.where(torch.arange(page_size) < tokens[:, None], 0.0, -torch.inf)[:, None, None]

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, K, E) and the pool's (P, K, page, E) -> outputs (U, G, K, E) fp32, logarithms (U, G, K) fp32."""
        q = queries.index_select(0, self.users).unflatten(0, (-1, self.num_users))  # (P, R, G, K, E)
        out, log = _flash_attention(
            q.flatten(1, 2).transpose(1, 2), keys[self.pages], values[self.pages], attn_mask=self.mask
        )
        return tuple(x.transpose(1, 2).unflatten(1, q.shape[1:3]).flatten(0, 1).float() for x in (out, log))
