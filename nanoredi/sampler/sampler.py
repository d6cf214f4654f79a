"""Sampling: a model, a scheduler and a paged cache.

Every sample has a key of its own, made from the seed, the prompt and the sample's number (scheduler.requests_for), and
draws one uniform number a token from a counter-based generator. So a sample depends neither on what else is in the
batch nor on the order of the work, nor on being put back in between. Nor does its rounding, if numbers are added up in an
order that does not depend on the batch. In attention they are: row by row, in spans of a fixed number of tokens. On a CPU
they are in products, too, from two rows on. On a GPU a product's order follows from a step's size; so with batch_invariant
each step has the full size, nobody's rows included, and a row that was put back begins again.

What a decode step reads and writes stays on the device: each row's newest token, its length, its pages. The tokens of a
step are looked at while the next one is under way, so a row that drew a stop token takes one step more, which is thrown
away, and nothing ever waits. On a GPU the step is a CUDA graph, one for each of a few batch sizes and lengths of rows.
"""

import gc
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoredi.common.errors import UserError
from nanoredi.config import SamplingConfig
from nanoredi.kernels import linear
from nanoredi.kernels.dispatch import decode_graphs, prepare_for_sampling
from nanoredi.model.qwen2 import Qwen2
from nanoredi.sampler.choose import choose, uniform
from nanoredi.sampler.kv_cache import PagedCache, upload
from nanoredi.sampler.pages import Pages
from nanoredi.sampler.scheduler import Request, Row, Scheduler

# Tokens that are put into the cache between two decode steps.
_PREFILL_TOKENS = 1_024
# The share of the free memory that the cache takes: on a CPU others live there, too.
_GPU_SHARE, _CPU_SHARE = 0.9, 0.5
# Rows decoded at once and tokens of a page, where the user does not say. A GPU takes half as many rows as long as the cache has
# no room for so many tokens of each; its pages are what torch's flash attention reads.
_GPU_SIZES, _CPU_SIZES, _ROOM = (256, 256), (64, 32), 2_048


# The tokens (B,) int64 of a decode step's rows, on their way to the host, and the event of their arrival.
_Drawn = tuple[list[Row], Tensor, torch.cuda.Event | None]


class Sampler:
    """Completes requests, up to batch_size of them at once.

    Call step() until `busy` is false, or iterate over run().
    """

    def __init__(self, model: Qwen2, stop_ids: list[int], config: SamplingConfig):
        """Raises a UserError when the memory has no room for a single page."""
        self.model, self.config = model, config
        self.stop_ids = set(stop_ids)
        self.device = model.lm_head_weight.device
        self.head = prepare_for_sampling(model.lm_head_weight, True)
        self.cache, self.batch_size = _cache(model, config, self.device)
        context, page_size, batch_size = model.config.max_position_embeddings, self.cache.page_size, self.batch_size
        self.full_size = config.batch_invariant and self.device.type == "cuda"
        pages = Pages(self.cache.num_pages, page_size)
        self.scheduler = Scheduler(pages, batch_size, config.max_tokens, context, _PREFILL_TOKENS, self.full_size)
        # The rows' state on the device; the last place is nobody's, for filling a batch up.
        self.newest, self.lengths = torch.zeros(2, batch_size + 1, dtype=torch.int64, device=self.device)
        num_columns = -(-context // page_size)
        self.page_table = torch.full((batch_size + 1, num_columns), self.cache.num_pages, device=self.device)
        self.drawn: _Drawn | None = None
        self.graphs = decode_graphs(self.newest, self._advance, (batch_size, num_columns, page_size), self.full_size)

    @property
    def busy(self) -> bool:
        return self.num_held > 0

    @property
    def num_held(self) -> int:
        """Requests that wait or are being completed."""
        return len(self.scheduler.waiting) + len(self.scheduler.rows)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise a UserError that names a prompt which can never be completed."""
        requests, vocabulary = list(requests), self.model.config.vocab_size
        for request in requests:
            if max(request.prompt, default=0) >= vocabulary:
                raise UserError(
                    f"{request.name} has the token {max(request.prompt)}, outside the model's vocabulary of {vocabulary}; "
                    "the tokenizer is not this model's"
                )
        self.scheduler.check(requests)

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests: all of them, or with check's UserError none."""
        requests = list(requests)
        self.check(requests)
        self.scheduler.waiting.extend(requests)

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Complete requests; each is given when it ends."""
        self.add(requests)
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Let waiting requests in, then add a token to every row. Returns the requests that ended.

        Raises:
            UserError: when a row's logits are not finite.
        """
        self._enter()
        ended = self._grow()
        rows = self.scheduler.decoding()
        drawn = self._launch(rows) if rows else None
        ended += self._look()
        self.drawn = drawn
        return ended

    def end(self, request: Request) -> None:
        """End a request that is being completed, with the tokens that it has."""
        for row in list(self.scheduler.rows.values()):
            if row.request is request:
                self._end(row, "stop")

    def _enter(self) -> None:
        entry = self.scheduler.enter()
        if entry.pieces:
            ids = np.concatenate([row.tokens[start:end] for row, start, end in entry.pieces])
            filling = self._filling(len(ids), _PREFILL_TOKENS)
            pieces = [(row.pages, start, end) for row, start, end in entry.pieces]
            attend, positions = self.cache.prefill(pieces, filling)
            self.model.hidden_states(upload(np.pad(ids, (0, filling)), self.device), positions, attend)
        if entry.copies:
            self.cache.copy(*zip(*entry.copies))
        if not entry.rows:
            return
        rows = entry.rows
        pages = np.full((len(rows), self.page_table.shape[1]), self.cache.num_pages)
        for row, line in zip(rows, pages):
            line[: len(row.pages)] = row.pages
        state = np.array([(row.place, row.tokens[-1], row.cached) for row in rows])
        places, newest, lengths = upload(state, self.device).T
        self.newest[places], self.lengths[places] = newest, lengths
        self.page_table[places] = upload(pages, self.device)

    def _grow(self) -> list[Request]:
        """See to it that every row has a page for its next token. Returns requests that were found to have ended."""
        ended = []
        while (new := self.scheduler.grow()) is None:
            if self.drawn:
                ended += self._look()
            else:
                self.scheduler.put_back()
        if new:
            places, numbers, pages = upload(np.array(new), self.device).T
            self.page_table[places, numbers] = pages
        return ended

    def _launch(self, rows: list[Row]) -> _Drawn:
        """Start a decode step."""
        places, keys = np.array([row.place for row in rows]), np.array([row.request.key for row in rows])
        uniforms = uniform(keys, np.array([row.num_drawn for row in rows]))
        for row in rows:
            row.cached += 1
        if not self.graphs:
            filling = self._filling(len(places), self.batch_size)
            filled = np.pad(places, (0, filling), constant_values=self.batch_size)
            tokens = self._advance(upload(filled, self.device), upload(uniforms, self.device))
            return rows, tokens.cpu(), None
        tokens = self.graphs(places, uniforms, max(row.cached for row in rows))
        there = torch.empty(len(places), dtype=torch.int64, pin_memory=True)
        there.copy_(tokens[: len(places)], non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return rows, there, arrived

    def _advance(self, places: Tensor, uniforms: Tensor, num_columns: int | None = None) -> Tensor:
        """Put the newest tokens of the rows in these places through the model, and draw the next ones by uniforms (B,): (B,)
        int64. What comes after the first B places is nobody's. No row has more pages than num_columns."""
        lengths = self.lengths[places]
        attend = self.cache.decode(self.page_table[places, :num_columns], lengths)
        logits = linear(self.model.hidden_states(self.newest[places], lengths, attend), self.head)
        places, lengths, logits = (x[: len(uniforms)] for x in (places, lengths, logits))
        c = self.config
        tokens = choose(logits, uniforms, c.temperature, c.top_p, c.top_k)
        self.newest[places] = tokens.clamp(min=0)
        self.lengths[places] = (lengths + 1) * (places < self.batch_size)  # nobody's row stays empty
        return tokens

    def _filling(self, num_tokens: int, full_size: int) -> int:
        """How many tokens of nobody's go with so many. On a CPU each new number may cost a kernel for every product, half a
        megabyte and a millisecond or two; and a single token is multiplied by other code, which adds up in another order."""
        if self.full_size:
            return full_size - num_tokens
        if self.device.type != "cpu":
            return 0
        return max(2 - num_tokens, -num_tokens % (1 if num_tokens <= 4 else 8 if num_tokens <= 128 else 64))

    def _look(self) -> list[Request]:
        """Look at the tokens that were drawn last. Returns the requests that ended."""
        drawn, self.drawn = self.drawn, None
        if not drawn:
            return []
        rows, tokens, arrived = drawn
        if arrived:
            arrived.synchronize()
        ended = []
        for row, token in zip(rows, tokens.tolist()):
            if self.scheduler.rows.get(row.place) is not row:
                continue  # it has ended, or was put back, since
            if token < 0:
                raise UserError("the model's logits over the temperature are not finite: its weights are broken")
            request, stream, stops = row.request, row.request.stream, token in self.stop_ids
            if not stops:
                row.tokens.append(token)
                # Of a row that was put back the stream has the first tokens already.
                if stream and len(row.tokens) > len(request.prompt) + len(request.tokens):
                    stream.push(token)
                    stops = stream.stopped
            if stops or len(row.tokens) == row.longest:
                ended.append(self._end(row, "stop" if stops else "length"))
        return ended

    def _end(self, row: Row, reason: str) -> Request:
        row.request.tokens, row.request.finish_reason = row.tokens[len(row.request.prompt) :], reason
        if row.request.stream:
            row.request.stream.finish()
        self.scheduler.release(row)
        return row.request


def _cache(model: Qwen2, config: SamplingConfig, device: torch.device) -> tuple[PagedCache, int]:
    """A cache of the size that the user gives, or that the device has memory for; never more than the batch can use. And the
    number of rows."""
    c, dtype = model.config, model.lm_head_weight.dtype
    num_rows, page_size = _GPU_SIZES if device.type == "cuda" else _CPU_SIZES
    num_rows, page_size = config.batch_size or num_rows, config.page_size or page_size
    a_page = 2 * c.num_hidden_layers * c.num_key_value_heads * page_size * c.head_dim * dtype.itemsize
    memory = config.cache_gb * 1e9 or _free_memory(model, num_rows, device)
    num_pages = int(memory / a_page)
    if num_pages < 1:
        raise UserError(
            f"a cache of {memory / 1e9:.3g} GB has no room for a page of {page_size} tokens, "
            f"{a_page / 1e9:.3g} GB: give a larger --cache_gb or a smaller --page_size"
        )
    if device.type == "cuda" and not config.batch_size:
        room = max(1, num_pages * page_size // min(_ROOM, c.max_position_embeddings))
        num_rows = min(num_rows, 1 << (room.bit_length() - 1))
    num_pages = min(num_pages, num_rows * -(-c.max_position_embeddings // page_size))
    shape = c.num_hidden_layers, num_pages, c.num_key_value_heads, page_size, c.head_dim
    return PagedCache(shape, dtype, device), num_rows


def _free_memory(model: Qwen2, num_rows: int, device: torch.device) -> float:
    """Bytes that the cache may take on this device."""
    if device.type == "cuda":
        c, size = model.config, model.lm_head_weight.dtype.itemsize
        give_back()
        # What a forward pass needs beside: logits with their copies in fp32 and fp64, and the activations of a block.
        logits = num_rows * c.vocab_size * (size + 24)
        block = _PREFILL_TOKENS * (8 * c.hidden_size + 4 * c.intermediate_size) * size
        return _GPU_SHARE * torch.cuda.mem_get_info(device)[0] - logits - block
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return _CPU_SHARE * free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def give_back() -> None:
    """Give back the memory of models and samplers that are gone: reference cycles hold them, and torch their segments."""
    gc.collect()
    torch.cuda.empty_cache()
