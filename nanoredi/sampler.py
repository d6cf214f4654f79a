"""Batched sampling with a key-value cache: rows that end make room for waiting ones.

Every sample has a key of its own, made from the seed, the prompt and the sample's number, and draws one uniform number
a token from a counter-based generator. So a sample depends neither on what else is in the batch nor on the order of
the work.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanoredi.attention import KVCache
from nanoredi.config import SamplingConfig
from nanoredi.errors import UserError
from nanoredi.model import Qwen2

# Prompt tokens of one prefill, unless a single prompt is longer.
_PREFILL_TOKENS = 16_384
# The first guess at how many tokens hold the nucleus of top-p; it grows until they do.
_NUCLEUS = 64


@dataclass
class Request:
    """A prompt to be completed.

    Attributes:
        prompt: token ids.
        sample: which of a prompt's samples this is.
        key: what the sample's random numbers depend on (sample_keys makes it).
        tokens: the completion so far, without the stop token.
        finish_reason: "stop", or "length" when max_tokens or the end of the context came first; None until it ends.
    """

    prompt: list[int]
    sample: int = 0
    key: int = 0
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Sampler:
    """Completes requests, up to config.batch_size of them at once.

    Call step() until `busy` is false, or iterate over run().
    """

    def __init__(self, model: Qwen2, stop_ids: list[int], config: SamplingConfig):
        self.model, self.config = model, config
        self.stop_ids = frozenset(stop_ids)
        self.device = model.lm_head_weight.device
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []  # row i of the cache is live[i]'s
        c = model.config
        dtype = model.lm_head_weight.dtype
        self.cache = KVCache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, dtype, self.device)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.live)

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
            UserError: when a prompt leaves no room in the context.
        """
        for request in requests:
            context = self.model.config.max_position_embeddings
            if len(request.prompt) >= context:
                raise UserError(f"a prompt of {len(request.prompt):,} tokens fills the context of {context:,}")
            self.waiting.append(request)

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Complete requests; each is given when it ends."""
        self.add(requests)
        while self.busy:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Start waiting requests where rows are free, else add a token to every live row. Returns the requests that
        ended."""
        first = len(self.live)
        if self.waiting and first < self.config.batch_size:
            hidden = self._prefill()
        else:
            first = 0
            hidden = self._decode()
        rows = self.live[first:]
        logits = (hidden @ self.model.lm_head_weight.T).float()  # (B, V)
        uniforms = uniform(torch.tensor([r.key for r in rows]), torch.tensor([len(r.tokens) for r in rows])).to(
            self.device
        )
        # The one wait for the device a token.
        tokens = choose(logits, uniforms, self.config.temperature, self.config.top_p, self.config.top_k).tolist()
        for request, token in zip(rows, tokens):
            self._extend(request, token)
        return self._release()

    def _prefill(self) -> Tensor:
        """Take waiting requests in; the last hidden state (B, D) of each of their prompts."""
        first = len(self.live)
        tokens = 0
        while self.waiting and len(self.live) < self.config.batch_size:
            tokens += len(self.waiting[0].prompt)
            if tokens > _PREFILL_TOKENS and len(self.live) > first:
                break
            self.live.append(self.waiting.popleft())
        prompts = [r.prompt for r in self.live[first:]]
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        ends = lengths.cumsum(0)
        self.cache.reserve(len(self.live), longest)
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int().to(self.device)
        input_ids = torch.tensor([t for p in prompts for t in p]).to(self.device)
        position_ids = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(self.device)
        hidden = self.model.hidden_states(input_ids, position_ids, self.cache.prefill(first, cu_seqlens, longest))
        return hidden[(ends - 1).to(self.device)]

    def _decode(self) -> Tensor:
        """Put each live row's newest token through the model; the hidden states (B, D)."""
        lengths = [len(r.prompt) + len(r.tokens) - 1 for r in self.live]  # the newest token is not in the cache yet
        longest = max(lengths)
        self.cache.reserve(len(self.live), longest + 1)
        places = torch.tensor(lengths).to(self.device)
        newest = torch.tensor([r.tokens[-1] for r in self.live]).to(self.device)
        return self.model.hidden_states(newest, places, self.cache.decode(places, longest))

    def _extend(self, request: Request, token: int) -> None:
        if token in self.stop_ids:
            request.finish_reason = "stop"
            return
        request.tokens.append(token)
        context = self.model.config.max_position_embeddings
        if len(request.tokens) >= self.config.max_tokens or len(request.prompt) + len(request.tokens) >= context:
            request.finish_reason = "length"

    def _release(self) -> list[Request]:
        """Take out the requests that ended; the last live rows move into their places, so live rows stay the first
        ones."""
        ended = [row for row, request in enumerate(self.live) if request.finish_reason]
        finished = [self.live[row] for row in ended]
        for row in reversed(ended):
            last = self.live.pop()
            if row < len(self.live):
                self.cache.move(len(self.live), row)
                self.live[row] = last
        return finished


def requests_for(prompts: list[list[int]], n: int, seed: int) -> list[Request]:
    """n samples of each prompt, in order. A prompt that comes again gets further samples, not the same ones."""
    requests = []
    before: Counter[tuple[int, ...]] = Counter()
    for prompt in prompts:
        for sample in range(n):
            requests.append(Request(prompt, sample, _key(seed, prompt, sample + n * before[tuple(prompt)])))
        before[tuple(prompt)] += 1
    return requests


def _key(seed: int, prompt: list[int], sample: int) -> int:
    """64 bits of what a sample's random numbers depend on, as a signed integer."""
    text = ",".join(map(str, (seed, sample, *prompt)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Draw a token from each row.

    Args:
        logits: (B, V) fp32.
        uniforms: (B,) fp64 from [0, 1), one a row.
        temperature: 0 takes the likeliest token.
        top_p: keep the fewest likeliest tokens that together have this probability, after top_k.
        top_k: keep the k likeliest tokens; 0 keeps all.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    ids = None
    if top_k or top_p < 1:
        probs, ids = _likeliest(probs, top_p, top_k)
    sums = probs.double().cumsum(-1)
    # Invert the cumulative distribution: the first place whose sum exceeds the uniform's share of the total.
    place = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)
    place = (
        place.minimum((probs > 0).sum(-1, keepdim=True) - 1) if ids is not None else place.clamp(max=probs.shape[1] - 1)
    )
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def _likeliest(probs: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The tokens that top-k and top-p keep, likeliest first: probabilities (B, C), 0 beyond the kept, and ids (B,
    C)."""
    size = min(top_k or _NUCLEUS, probs.shape[1])
    while True:
        best, ids = probs.topk(size)
        if top_k:
            best = best / best.sum(-1, keepdim=True)
        sums = best.double().cumsum(-1)
        # Without top-k the nucleus may be longer than the guess; a full sort is hardly ever needed.
        if top_k or size == probs.shape[1] or bool((sums[:, -1] >= top_p).all()):
            return best.masked_fill(sums - best >= top_p, 0.0), ids
        size = min(8 * size, probs.shape[1])


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """One number from [0, 1) for each key and counter: (B,) int64, (B,) int64 -> (B,) fp64.

    A counter-based generator (the finaliser of SplitMix64, Steele et al. 2014): no state, so any order gives the same
    numbers.
    """
    z = keys + (counters + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 11).double() / 2**53


def _signed(constant: int) -> int:
    """A 64-bit constant as the int64 of the same bits; int64 products wrap around as the generator wants."""
    return constant - 2**64


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift fills with the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
