"""A GPU's path through variable-length attention, with real numbers: torch's operation gets a kernel for the CPU, so that
the code around it, activation checkpointing included, can be compared with the plain version."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from dense import qkv
from torch import Tensor
from torch.torch_version import TorchVersion

from nanoredi.kernels import dispatch
from nanoredi.model import attention, qwen2
from nanoredi.model.attention import causal_attention
from nanoredi.sampler import kv_cache


class SingleAsHalf:
    """torch with fp32 in place of bf16: the path of half precision, in numbers that can be compared closely."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str):
        return getattr(torch, name)


def shares(q: Tensor, k: Tensor) -> Tensor:
    """The causal attention weights of a sequence's queries (H, n, E) and keys (H, n, E): (H, n, n)."""
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return (q @ k.mT * q.shape[2] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)


def heads_first(q: Tensor, *others: Tensor) -> list[Tensor]:
    """(n, H, E) or (n, K, E) each -> (H, n, E)."""
    return [x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], dim=0) for x in (q, *others)]


def one_sequence(*qkv: Tensor) -> Tensor:
    q, k, v = heads_first(*qkv)
    return (shares(q, k) @ v).transpose(0, 1)


def one_sequence_backward(gradient: Tensor, *qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With p the attention weights and g the gradient of out = p v:  dv = p' g,  dp = g v',  ds = p (dp - sum of p dp)."""
    (g,), (q, k, v) = heads_first(gradient), heads_first(*qkv)
    p = shares(q, k)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
    num_kv_heads = qkv[1].shape[1]
    dk, dv = (x.unflatten(0, (num_kv_heads, -1)).sum(1) for x in (ds.mT @ q, p.mT @ g))
    return (ds @ k).transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


def forward(q, k, v, ends, ends_k, longest, longest_k, causal=False, scale=None, window=None, grouped=True, *paged):
    """Checks what the kernel requires of its arguments."""
    if any(x is not None for x in paged):
        return paged_forward(q, k, v, ends, ends_k, longest, longest_k, causal, list(window), grouped, *paged)
    assert ends is ends_k or torch.equal(ends, ends_k)
    assert ends.dtype == torch.int32 and longest == longest_k == int(ends.diff().max())
    assert (causal or list(window) == [-1, 0]) and grouped and all(x.stride(-1) == 1 for x in (q, k, v))
    parts = zip(*(x.split(ends.diff().tolist()) for x in (q, k, v)))
    out = torch.cat([one_sequence(*part) for part in parts])
    return out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def paged_forward(q, keys, values, ends, ends_k, longest, longest_k, causal, window, grouped, lengths, table, splits):
    """The last tokens of rows over pages (P, page, K, E). It also checks what fixes the order of a row's sums: one split, and
    never a single query a row, as in a decode step."""
    assert (causal or window == [-1, 0]) and grouped and splits == 1 and longest > 1
    assert ends.dtype == lengths.dtype == table.dtype == torch.int32 and keys.shape[1] % 256 == 0
    assert ends_k.dtype == torch.int32 and torch.equal(ends_k.diff(), lengths)
    assert longest >= ends.diff().max() and longest_k >= lengths.max() and len(q) == ends[-1]
    out = []
    for part, length, pages in zip(q.split(ends.diff().tolist()), lengths.tolist(), table.tolist()):
        k, v = (x[pages].flatten(0, 1)[:length] for x in (keys, values))
        whole = torch.cat((torch.zeros(length - len(part), *q.shape[1:]), part))
        out.append(one_sequence(whole, k, v)[length - len(part) :])
    return torch.cat(out), q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def backward(gradient, q, k, v, out, lse, ends, *others, **more):
    sizes = ends.diff().tolist()
    parts = zip(*(x.split(sizes) for x in (gradient, q, k, v)))
    return tuple(map(torch.cat, zip(*(one_sequence_backward(*part) for part in parts))))


@pytest.fixture
def flash(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not (hasattr(varlen, "_varlen_attn") and hasattr(varlen, "_varlen_attn_backward")):
        pytest.skip("torch's variable-length attention is no operation of its own in this release")
    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    for module in (attention, kv_cache):
        monkeypatch.setattr(module, "torch", SingleAsHalf())
    dispatch._import_package("cpu")  # it registers its own once
    calls = []

    def way(*args):
        calls.append(args)
        return causal_attention.faster["cuda"](*args)

    monkeypatch.setitem(causal_attention.faster, "cpu", way)
    return calls


def gradients(kept: str) -> list[Tensor]:
    model = tiny.tiny_model(tied=True)
    for block in model.model.layers:
        block.activation_checkpointing = kept
    ids, positions, ends = tiny.packed(tiny.sequences())
    weights = torch.linspace(-1, 1, len(ids))
    model.loss(ids, positions, ends, ids, weights)[0].backward()
    return [p.grad for p in model.parameters()]


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.operation, "__call__", lambda self, *args, **kwargs: self.plain(*args, **kwargs))
        return gradients("off")


@pytest.mark.parametrize("kept, calls", [("off", 2), ("attention", 4), ("products", 4)])
def test_gradients_through_the_kernel_are_those_of_dense_attention(kept, calls, plain, flash, monkeypatch):
    computed = []
    monkeypatch.setitem(globals(), "one_sequence", partial(_counted, computed, one_sequence))
    got = gradients(kept)
    assert len(flash) == calls  # two blocks, gone through once more in backward
    assert len(computed) == 2 * len(tiny.LENGTHS)  # its result is kept, so no sequence is computed again
    for ours, wanted in zip(got, plain, strict=True):
        assert (ours - wanted).norm() <= 5e-6 * wanted.norm()


def prefilled(chunks: list[list[tuple[int, int, int]]], page_size: int) -> dict[tuple[int, int], Tensor]:
    """Attention of the tokens of two rows in passes of chunks (row, start, end): (row, position) -> (H, E)."""
    num_pages = -(-700 // page_size)
    cache = kv_cache.PagedCache((1, 2 * num_pages, 2, page_size, 8), torch.float32, torch.device("cpu"))
    cache.token_by_token = not kv_cache._reads_pages(torch.float32, page_size, 8)
    pages = torch.randperm(2 * num_pages, generator=torch.Generator().manual_seed(0)).view(2, -1).tolist()
    rows = [[x.detach() for x in qkv(700, seed=row)] for row in range(2)]
    rope = qwen2.rotary_angles(torch.arange(700), SimpleNamespace(head_dim=8, rope_theta=1e4), torch.float32)
    found = {}
    for some in chunks:
        # The padding is longer than a page.
        attend, positions = cache.prefill([(pages[row], start, end) for row, start, end in some], 300)
        places = [(row, p) for row, start, end in some for p in range(start, end)]
        assert positions.tolist() == [p for _, p in places] + list(range(300))
        given = [
            torch.cat([rows[row][i][start:end] for row, start, end in some] + [torch.ones(300, n, 8)]) for i, n in HEADS
        ]
        out = attend(0, *given, tuple(x[positions] for x in rope))
        assert len(out) == len(places) + 300
        found |= dict(zip(places, out))
    return found


HEADS = [(0, 6), (1, 2), (2, 2)]  # of queries, keys and values
WHOLE = [[(0, 0, 700), (1, 0, 300)]]
IN_CHUNKS = [[(0, 0, 1), (1, 0, 1)], [(0, 1, 257), (1, 1, 300)], [(0, 257, 258)], [(0, 258, 700)]]


def test_a_prompt_s_chunks_attend_by_one_call_of_the_kernel(flash, monkeypatch):
    if not kv_cache._reads_pages(torch.float32, 256, 8):
        pytest.skip("torch's variable-length attention reads no pages in this release")
    calls = []
    paged = kv_cache.paged_prefill
    monkeypatch.setattr(kv_cache, "paged_prefill", lambda *args: calls.append(args) or paged(*args))
    plain = prefilled(WHOLE, 16)
    assert not calls  # flash attention cannot read such pages
    for chunks in (WHOLE, IN_CHUNKS):
        computed = []
        monkeypatch.setitem(globals(), "one_sequence", partial(_counted, computed, one_sequence))
        got = prefilled(chunks, 256)
        assert len(computed) == sum(len(some) + 1 for some in chunks) and got.keys() == plain.keys()
        assert len(calls) == len(chunks)
        calls.clear()
        for place, out in got.items():
            torch.testing.assert_close(out, plain[place], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "version, reads", [("2.11.0", False), ("2.12.1", False), ("2.13.0", True), ("2.14.1+cu130", True)]
)
def test_pages_are_read_where_the_kernel_may_be_told_not_to_split_rows(version, reads, monkeypatch):
    """torch 2.12 has pages, but its FlashAttention-2 raises "num_splits requires FA3"."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert kv_cache._reads_pages(torch.bfloat16, 256, 64) == reads


def _counted(computed: list, compute, *inputs: Tensor) -> Tensor:
    computed.append(len(inputs[0]))
    return compute(*inputs)


@pytest.fixture
def interface(monkeypatch):
    """interface(capability, error) makes a GPU with FlashAttention-3's package, whose activation is recorded, or fails."""
    asked: list[str] = []

    def install(capability: tuple[int, int], error: Exception | None = None) -> list[str]:
        def activate(name: str) -> None:
            asked.append(name)
            if error:
                raise error

        monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(__spec__=object()))
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        return asked

    attention.flash_attention.cache_clear()
    yield install
    attention.flash_attention.cache_clear()


def test_flash_attention_3_is_taken_where_it_can_run(interface):
    asked = interface((9, 0))
    assert attention.flash_attention() == attention.flash_attention() == "FlashAttention-3"
    assert asked == ["FA3"]


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_keep_flash_attention_2(capability, interface):
    asked = interface(capability)
    assert attention.flash_attention() == "FlashAttention-2" and not asked


def test_a_package_that_does_not_load_is_said(interface):
    interface((9, 0), ImportError("undefined symbol"))
    assert attention.flash_attention() == "FlashAttention-2, since 3 cannot be loaded: undefined symbol"


def test_without_its_package_it_is_flash_attention_2(interface, monkeypatch):
    asked = interface((9, 0))
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    assert attention.flash_attention() == "FlashAttention-2" and not asked
