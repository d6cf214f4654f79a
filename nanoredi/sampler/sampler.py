"""Sampling: a model, a scheduler and a paged key-value cache.

A sample depends only on the seed, its prompt and its number, not on what else is in the batch. A hash of these three is
the key (scheduler.requests_for) by which a counter-based generator gives it one uniform number a token. Its logits stay
the same to the last bit if their sums are taken in the same order in any batch. Attention adds up each row by itself, in
spans of a fixed length. Matrix products on a CPU have one order from two rows on. On a GPU it depends on the number of
rows: with batch_invariant every step has all rows, padding included, and a preempted row samples its completion again.

What a decode step reads and writes stays on the device: each row's newest token, its length and its page table. The
host reads a step's tokens while the next step runs, so the device never waits for the host; a row that sampled a stop
token runs one step more, which is discarded. On a GPU a step is a CUDA graph, one for each of a few sizes.
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

# Tokens prefilled between two decode steps.
_PREFILL_TOKENS = 1_024
# The share of the free memory that the cache takes; on a CPU other processes need some, too.
_GPU_SHARE, _CPU_SHARE = 0.9, 0.5
# The default batch size and page size. torch's flash attention can read pages of the GPU's size. On a GPU the batch
# size is halved until the cache has room for _ROOM tokens of each row.
_GPU_SIZES, _CPU_SIZES, _ROOM = (256, 256), (64, 32), 2_048

# A decode step that runs: its rows, their new tokens (B,) int64 on the host, and the event after which these are there.
_InFlight = tuple[list[Row], Tensor, torch.cuda.Event | None]


class Sampler:
    """Completes requests, up to batch_size of them at once.

    Call step() while num_held is above 0, or iterate over run().
    """

    def __init__(self, model: Qwen2, stop_ids: list[int], config: SamplingConfig):
        """Raises a UserError when the memory has no room for a single page."""
        self.model, self.config = model, config
        self.stop_ids = set(stop_ids)
        self.device = model.lm_head_weight.device
        self.head = prepare_for_sampling(model.lm_head_weight, for_linear=True)
        self.cache, self.batch_size = _cache(model, config, self.device)
        context, page_size, batch_size = model.config.max_position_embeddings, self.cache.page_size, self.batch_size
        self.full_size = config.batch_invariant and self.device.type == "cuda"
        pages = Pages(self.cache.num_pages, page_size)
        self.scheduler = Scheduler(pages, batch_size, config.max_tokens, context, _PREFILL_TOKENS, self.full_size)
        # The state of each slot on the device; the last slot is for padding rows.
        self.newest, self.lengths = torch.zeros(2, batch_size + 1, dtype=torch.int64, device=self.device)
        num_columns = -(-context // page_size)
        self.page_table = torch.full((batch_size + 1, num_columns), self.cache.num_pages, device=self.device)
        self.in_flight: _InFlight | None = None
        self.graphs = decode_graphs(self.newest, self._advance, (batch_size, num_columns, page_size), self.full_size)

    @property
    def num_held(self) -> int:
        """Requests that wait or are being completed."""
        return len(self.scheduler.waiting) + len(self.scheduler.rows)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise a UserError that names a request which cannot be completed."""
        self.scheduler.check(requests, self.model.config.vocab_size)

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests: all of them, or none when check raises a UserError."""
        requests = list(requests)
        self.check(requests)
        self.scheduler.waiting.extend(requests)

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Complete requests; each is yielded when it ends."""
        self.add(requests)
        while self.num_held:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Admit and prefill waiting requests, then decode a token of every row. Returns the requests that ended.

        Raises:
            UserError: when a row's logits are not finite.
        """
        self._prefill()
        ended = self._append_pages()
        rows = self.scheduler.decoding()
        in_flight = self._decode(rows) if rows else None
        ended += self._read_tokens()
        self.in_flight = in_flight
        return ended

    def end(self, request: Request) -> None:
        """End a request that is being completed, with the tokens that it has."""
        for row in list(self.scheduler.rows.values()):
            if row.request is request:
                self._end(row, "stop")

    def _prefill(self) -> None:
        prefill = self.scheduler.admit()
        if prefill.chunks:
            ids = np.concatenate([row.tokens[start:end] for row, start, end in prefill.chunks])
            padding = self._num_padding(len(ids), _PREFILL_TOKENS)
            chunks = [(row.pages, start, end) for row, start, end in prefill.chunks]
            attend, positions = self.cache.prefill(chunks, padding)
            self.model.hidden_states(upload(np.pad(ids, (0, padding)), self.device), positions, attend)
        if prefill.copies:
            self.cache.copy(*zip(*prefill.copies))
        if not prefill.rows:
            return
        pages = np.full((len(prefill.rows), self.page_table.shape[1]), self.cache.num_pages)
        for row, line in zip(prefill.rows, pages):
            line[: len(row.pages)] = row.pages
        state = np.array([(row.slot, row.tokens[-1], row.num_cached) for row in prefill.rows])
        slots, newest, lengths = upload(state, self.device).T
        self.newest[slots], self.lengths[slots] = newest, lengths
        self.page_table[slots] = upload(pages, self.device)

    def _append_pages(self) -> list[Request]:
        """Give every row a page for its next token, preempting rows if need be. Returns requests that ended before."""
        ended = []
        while (new := self.scheduler.append_pages()) is None:
            if self.in_flight:
                ended += self._read_tokens()
            else:
                self.scheduler.preempt()
        if new:
            slots, numbers, pages = upload(np.array(new), self.device).T
            self.page_table[slots, numbers] = pages
        return ended

    def _decode(self, rows: list[Row]) -> _InFlight:
        """Start a decode step."""
        slots, keys = np.array([row.slot for row in rows]), np.array([row.request.key for row in rows])
        uniforms = uniform(keys, np.array([row.num_sampled for row in rows]))
        for row in rows:
            row.num_cached += 1
        if not self.graphs:
            padding = self._num_padding(len(slots), self.batch_size)
            padded = np.pad(slots, (0, padding), constant_values=self.batch_size)
            tokens = self._advance(upload(padded, self.device), upload(uniforms, self.device))
            return rows, tokens.cpu(), None
        tokens = self.graphs(slots, uniforms, max(row.num_cached for row in rows))
        on_host = torch.empty(len(slots), dtype=torch.int64, pin_memory=True)
        on_host.copy_(tokens[: len(slots)], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return rows, on_host, copied

    def _advance(self, slots: Tensor, uniforms: Tensor, num_columns: int | None = None) -> Tensor:
        """Run the model on the newest tokens of the rows in these slots, and sample the next ones by uniforms (B,):
        (B,) int64. Slots beyond the first B are padding. No row has more pages than num_columns."""
        lengths = self.lengths[slots]
        attend = self.cache.decode(self.page_table[slots, :num_columns], lengths)
        logits = linear(self.model.hidden_states(self.newest[slots], lengths, attend), self.head)
        slots, lengths, logits = (x[: len(uniforms)] for x in (slots, lengths, logits))
        c = self.config
        tokens = choose(logits, uniforms, c.temperature, c.top_p, c.top_k)
        self.newest[slots] = tokens.clamp(min=0)
        self.lengths[slots] = (lengths + 1) * (slots < self.batch_size)  # a padding row stays empty
        return tokens

    def _num_padding(self, num_tokens: int, full_size: int) -> int:
        """The padding of a step. On a CPU each new number of tokens may cost a kernel for every product, half a MB and
        a millisecond or two; and a single row is multiplied by other code, which sums in another order."""
        if self.full_size:
            return full_size - num_tokens
        if self.device.type != "cpu":
            return 0
        return max(2 - num_tokens, -num_tokens % (1 if num_tokens <= 4 else 8 if num_tokens <= 128 else 64))

    def _read_tokens(self) -> list[Request]:
        """Read the tokens of the decode step in flight. Returns the requests that ended."""
        in_flight, self.in_flight = self.in_flight, None
        if not in_flight:
            return []
        rows, tokens, copied = in_flight
        if copied:
            copied.synchronize()
        ended = []
        for row, token in zip(rows, tokens.tolist()):
            if self.scheduler.rows.get(row.slot) is not row:
                continue  # it has ended or was preempted since
            if token < 0:
                raise UserError("the model's logits over the temperature are not finite: its weights are broken")
            request, stream, stops = row.request, row.request.stream, token in self.stop_ids
            if not stops:
                row.tokens.append(token)
                # A preempted row that samples again: its stream has the first tokens already.
                if stream and len(row.tokens) > len(request.prompt) + len(request.tokens):
                    stream.push(token)
                    stops = stream.stopped
            if stops or len(row.tokens) == row.max_length:
                ended.append(self._end(row, "stop" if stops else "length"))
        return ended

    def _end(self, row: Row, reason: str) -> Request:
        row.request.tokens, row.request.finish_reason = row.tokens[len(row.request.prompt) :], reason
        if row.request.stream:
            row.request.stream.finish()
        self.scheduler.release(row)
        return row.request


def _cache(model: Qwen2, config: SamplingConfig, device: torch.device) -> tuple[PagedCache, int]:
    """A cache of the size that the user gives or that the device has memory for, but no larger than the batch can use;
    and the batch size."""
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
        # A forward pass also needs memory for the logits, with copies in fp32 and fp64, and for a block's activations.
        logits = num_rows * c.vocab_size * (size + 24)
        block = _PREFILL_TOKENS * (8 * c.hidden_size + 4 * c.intermediate_size) * size
        return _GPU_SHARE * torch.cuda.mem_get_info(device)[0] - logits - block
    try:
        text = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
        free, own = (1024 * int(text.split(f"{name}:")[1].split()[0]) for name in ("MemAvailable", "RssAnon"))
        # A container or a batch job may have less: its control group or a group around that has a limit.
        groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
        folders = [f for kind, path in groups for f in Path("/sys/fs/cgroup", kind, path[1:], "_").parents]
        files = [f / name for f in folders for name in ("memory.max", "memory.limit_in_bytes") if (f / name).exists()]
        limits = [file.read_text().strip() for file in files]
        free = min([free, *(int(limit) - own for limit in limits if limit != "max")])
    except (OSError, IndexError):  # this is not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return _CPU_SHARE * free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def give_back() -> None:
    """Free the memory of deleted models and samplers, which reference cycles and torch's allocator still hold."""
    gc.collect()
    torch.cuda.empty_cache()
