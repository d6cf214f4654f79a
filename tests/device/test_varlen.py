"""A GPU's way through variable-length attention, with real numbers: torch's own operation gets a kernel for the CPU, so
that what surrounds it, keeping and recomputation included, can be compared with the plain way."""

from functools import partial

import pytest
import tiny
import torch
from torch import Tensor

from nanoredi.kernels import dispatch
from nanoredi.model import attention
from nanoredi.model.attention import causal_attention


class SingleAsHalf:
    """torch, but for fp32 in bf16's place: the way of half precision, in numbers that can be compared closely."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str):
        return getattr(torch, name)


def shares(q: Tensor, k: Tensor) -> Tensor:
    """Of a sequence's queries (H, n, E) in its keys (H, n, E), up to their own: (H, n, n)."""
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return (q @ k.mT * q.shape[2] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)


def heads_first(q: Tensor, *others: Tensor) -> list[Tensor]:
    """(n, H, E) or (n, K, E) each -> (H, n, E)."""
    return [x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], dim=0) for x in (q, *others)]


def one_sequence(*qkv: Tensor) -> Tensor:
    q, k, v = heads_first(*qkv)
    return (shares(q, k) @ v).transpose(0, 1)


def one_sequence_backward(gradient: Tensor, *qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With p the shares and g the gradient of out = p v:  dv = p' g,  dp = g v',  ds = p (dp - sum of p dp)."""
    (g,), (q, k, v) = heads_first(gradient), heads_first(*qkv)
    p = shares(q, k)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
    num_kv_heads = qkv[1].shape[1]
    dk, dv = (x.unflatten(0, (num_kv_heads, -1)).sum(1) for x in (ds.mT @ q, p.mT @ g))
    return (ds @ k).transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


def forward(q, k, v, ends, ends_k, longest, longest_k, causal=False, scale=None, window=None, grouped=True, *others):
    """What the kernel is promised is checked here."""
    assert ends is ends_k or torch.equal(ends, ends_k)
    assert ends.dtype == torch.int32 and longest == longest_k == int(ends.diff().max())
    assert (causal or list(window) == [-1, 0]) and grouped and all(x.stride(-1) == 1 for x in (q, k, v))
    parts = zip(*(x.split(ends.diff().tolist()) for x in (q, k, v)))
    out = torch.cat([one_sequence(*part) for part in parts])
    return out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


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
    monkeypatch.setattr(attention, "torch", SingleAsHalf())
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


def _counted(computed: list, compute, *inputs: Tensor) -> Tensor:
    computed.append(len(inputs[0]))
    return compute(*inputs)
