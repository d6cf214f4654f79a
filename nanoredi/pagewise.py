"""Decoding over a paged cache without a GPU: each page is read once, where it lies, for all the rows that use it.

Gathering every row's pages would copy the whole cache at every step, and a loop over rows would spend its time in
Python. Here a stretch of the pool is one operand of a batched product, page by page, and the queries of each page's
users are the other one:

    scores (P, K, R*G, page) = queries (P, K, R*G, E) @ keys (P, K, page, E)^T          R users of a page, G = H/K

and each row's softmax is put together from its pages' parts. A page of one's own has one user, one of a shared
beginning mostly as many as a prompt has samples, and a few, such as the chat template's head, very many: three
groups, each with its own R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
        self.groups = [_Group(*group, num_rows) for group in groups if len(group[0])]
        # Where each row's parts are among all groups' parts, for adding them up.
        users = torch.cat([group.users.flatten() for group in self.groups])  # (U,)
        in_use = (users < num_rows).nonzero().squeeze(1)
        self.parts = in_use[users[in_use].argsort(stable=True)]
        self.starts = torch.searchsorted(users[self.parts], torch.arange(num_rows))

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """
        Args:
            q: (B, H, E).
            keys, values: (P, K, page, E), one layer's pool.

        Returns:
            (B, H, E).
        """
        queries = _and_nobody((q * q.shape[-1] ** -0.5).unflatten(1, (keys.shape[1], -1)))  # (B+1, K, G, E)
        scores = [group.scores(queries, keys) for group in self.groups]
        tops = self._reduce([s.amax(-1) for s in scores], "max")  # (B, K, G)
        tops = _and_nobody(tops)
        weights = [group.weights(s, tops) for group, s in zip(self.groups, scores)]
        sums = self._reduce([w.sum(-1) for w in weights], "sum")  # (B, K, G)
        outs = [group.outputs(w, values) for group, w in zip(self.groups, weights)]
        return (self._reduce(outs, "sum") / sums[..., None]).flatten(1, 2).to(q.dtype)

    def _reduce(self, parts: list[Tensor], mode: str) -> Tensor:
        """Each row's sum or maximum of its parts: of every group (P, K, R, G, ...) -> (B, K, G, ...)."""
        by_user = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])  # (U, K, G, ...)
        reduced = F.embedding_bag(self.parts, by_user.flatten(1), self.starts, mode=mode)
        return reduced.unflatten(1, by_user.shape[1:])


class _Group:
    """Pages with at most R users each; places without one are nobody's, the row after the last."""

    def __init__(self, pages: Tensor, row: Tensor, filled: Tensor, nobody: int):
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
        self.users = torch.full((num_pages, int(counts.max())), nobody)
        self.users[place, turn] = row[order]
        tokens = torch.zeros_like(self.users)
        tokens[place, turn] = filled[order]
        self.tokens = tokens[:, None, :, None, None]  # (P, 1, R, 1, 1)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B+1, K, G, E) and the pool's (P, K, page, E) -> (P, K, R, G, page) fp32."""
        q = queries[self.users].transpose(1, 2)  # (P, K, R, G, E)
        scores = (q.flatten(2, 3) @ keys[self.pages].transpose(2, 3)).float().unflatten(2, q.shape[2:4])
        return scores.masked_fill_(torch.arange(keys.shape[2]) >= self.tokens, -torch.inf)

    def weights(self, scores: Tensor, tops: Tensor) -> Tensor:
        """exp(score - the row's largest): (P, K, R, G, page)."""
        return scores.sub_(tops[self.users].transpose(1, 2)[..., None]).exp_()

    def outputs(self, weights: Tensor, values: Tensor) -> Tensor:
        """(P, K, R, G, page) and the pool's (P, K, page, E) -> (P, K, R, G, E) fp32."""
        out = weights.flatten(2, 3).to(values.dtype) @ values[self.pages]
        return out.float().unflatten(2, weights.shape[2:4])


def _and_nobody(x: Tensor) -> Tensor:
    """A row of zeros after the last one."""
    return torch.cat((x, torch.zeros_like(x[:1])))
