"""The weighted cross-entropy and the log-probs against float64 and against autograd: the plain versions, and the Triton
kernels, in Triton's interpreter or on the GPU where there is one."""

import pytest
import torch
from conftest import DEVICE, use_triton

from nanoredi.kernels import linear_logprob, logits, weighted_cross_entropy
from nanoredi.kernels.logits import logprobs_


@pytest.fixture(params=["plain", "fastest", "triton"], autouse=True)
def version(request, monkeypatch):
    """The plain versions, those for the machine's device, and Triton's."""
    if request.param == "plain":
        request.getfixturevalue("plain")
    elif request.param == "triton":
        use_triton(monkeypatch, logprobs_)
    return request.param


def set_chunk(monkeypatch, elements):
    for name in ("MAX_CPU_ELEMENTS", "MAX_GPU_ELEMENTS"):
        monkeypatch.setattr(logits, name, elements)


def case(n, v, d=16, dtype=torch.float32, scale=1.0, seed=0):
    """Inputs whose weights have mixed signs and sizes, a third of them 0."""
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, d, generator=g)).to(DEVICE, dtype).requires_grad_()
    lm_head = torch.randn(v, d, generator=g).to(DEVICE, dtype).requires_grad_()
    weights = torch.randn(n, generator=g) / n
    weights[1::3] = 0
    return hidden, lm_head, torch.randint(0, v, (n,), generator=g).to(DEVICE), weights.to(DEVICE)


def reference(hidden, lm_head, targets, weights):
    """loss, logps and the gradients of hidden and lm_head in float64, by autograd through whole logits."""
    h, m = (x.detach().double().requires_grad_() for x in (hidden, lm_head))
    logps = (h @ m.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    loss = (weights.double() * logps).sum()
    loss.backward()
    return loss.detach(), (logps * (weights != 0)).detach(), h.grad, m.grad


def by_cross_entropy(hidden, lm_head, targets, weights):
    loss, logps = weighted_cross_entropy(hidden, lm_head, targets, weights)
    loss.backward()
    return loss.detach(), logps, hidden.grad, lm_head.grad


def by_logprob(hidden, lm_head, targets, weights):
    """The same by the log-probs, where the weights arrive as the upstream gradient."""
    logps = linear_logprob(hidden, lm_head, targets, weights.nonzero().squeeze(1))
    loss = (weights * logps).sum()
    loss.backward()
    return loss.detach(), logps.detach(), hidden.grad, lm_head.grad


def entropies_of(way, hidden, lm_head, targets, rows):
    entropies = torch.full((len(hidden),), 7.0, device=DEVICE)
    if way is by_cross_entropy:
        weighted_cross_entropy(hidden, lm_head, targets, torch.ones(len(hidden), device=DEVICE), rows, entropies)
    else:
        linear_logprob(hidden, lm_head, targets, rows, entropies)
    return entropies


BOTH = pytest.mark.parametrize("way", [by_cross_entropy, by_logprob])


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


@BOTH
@pytest.mark.parametrize("n, v", [(1, 123), (2, 7), (5, 1), (50, 123), (37, 1000), (9, 9001), (6, 16384)])
@pytest.mark.parametrize("chunk_elements", [1, 5000, 1 << 24])
@pytest.mark.filterwarnings("ignore:divide by zero")  # V = 1: there is no other column, and log 0 is intended
def test_equals_float64(way, n, v, chunk_elements, monkeypatch):
    set_chunk(monkeypatch, chunk_elements)
    inputs = case(n, v)
    loss, logps, grad_hidden, grad_head = got = way(*inputs)
    for ours, want in zip(got, reference(*inputs)):
        assert (ours.double() - want).norm() <= 1e-5 * want.norm()
    masked = inputs[3] == 0
    assert not logps[masked].any() and not grad_hidden[masked].any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, v, scale", [(2, 2, 1.0), (31, 123, 1.0), (9, 9001, 1.0), (9, 50, 1e-4), (40, 50, 1e3)])
def test_entropies_equal_float64(way, n, v, scale, dtype, monkeypatch):
    """Over all chunks, and only in the rows asked for. The logits are exact, so that their rounding does not count."""
    set_chunk(monkeypatch, 4 * v)
    hidden, lm_head, targets, _ = case(n, v, d=1, scale=scale, dtype=dtype)
    with torch.no_grad():  # powers of 2: the products are exact
        hidden.copy_(2 ** hidden.abs().log2().round() * hidden.sign())
    logps = (hidden.detach().double() @ lm_head.detach().double().T).log_softmax(-1)
    targets[::2] = logps.argmax(1)[::2]  # where the model is sure of the target, as well as where it is not
    want = torch.special.entr(logps.exp()).sum(1)
    rows = torch.arange(0, n, 3, device=DEVICE)
    got = entropies_of(way, hidden, lm_head, targets, rows)
    assert (got[rows].double() - want[rows]).abs().max() <= 1e-5 * want.max() + 1e-30
    got[rows] = 7.0
    assert (got == 7.0).all()


@BOTH
@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("gap", [20.0, 9.0, 2.0])
def test_entropy_keeps_its_digits_where_the_model_is_sure(way, gap, target):
    hidden = torch.tensor([[gap]], device=DEVICE)
    lm_head = torch.tensor([[1.0], [0.0], [0.0]], device=DEVICE)
    (got,) = entropies_of(way, hidden, lm_head, torch.tensor([target], device=DEVICE), None)
    p = torch.tensor([gap, 0.0, 0.0], dtype=torch.float64).softmax(0)
    # If the model is sure of a token other than the target, the error is about a unit of fp32 beside 1.
    assert got.item() == pytest.approx(torch.special.entr(p).sum().item(), rel=2e-6, abs=1e-7 if target else 0)


@BOTH
@pytest.mark.parametrize("n, v", [(50, 123), (60, 4099)])
def test_bfloat16_is_no_worse_than_the_plain_way(way, n, v, monkeypatch):
    set_chunk(monkeypatch, 20 * v)
    hidden, lm_head, targets, weights = case(n, v, d=64, dtype=torch.bfloat16)
    _, want_logps, want_hidden, want_head = reference(hidden, lm_head, targets, weights)
    h, m = (x.detach().clone().requires_grad_() for x in (hidden, lm_head))
    plain = (h @ m.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1) * (weights != 0)
    (plain * weights).sum().backward()
    _, logps, grad_hidden, grad_head = way(hidden, lm_head, targets, weights)
    assert relative(logps, want_logps) <= 1.05 * relative(plain.detach(), want_logps)
    assert relative(grad_hidden, want_hidden) <= 1.05 * relative(h.grad, want_hidden)
    assert relative(grad_head, want_head) <= 1.05 * relative(m.grad, want_head)


def test_a_bfloat16_head_takes_its_gradient_in_fp32_if_allowed(monkeypatch):
    set_chunk(monkeypatch, 20 * 123)
    hidden, lm_head, targets, weights = case(50, 123, d=64, dtype=torch.bfloat16)
    lm_head.grad_dtype = torch.float32
    weighted_cross_entropy(hidden, lm_head, targets, weights)[0].backward()
    grad = lm_head.grad
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


def test_the_upstream_gradient_scales_and_backward_runs_once():
    hidden, lm_head, targets, weights = case(20, 30)
    loss, _ = weighted_cross_entropy(hidden, lm_head, targets, weights)
    (-3 * loss).backward(retain_graph=True)
    _, _, want_hidden, want_head = reference(hidden, lm_head, targets, weights)
    assert relative(hidden.grad, -3 * want_hidden) < 1e-5 and relative(lm_head.grad, -3 * want_head) < 1e-5
    with pytest.raises(RuntimeError, match="second forward"):
        loss.backward()


def test_logprob_s_backward_may_run_twice():
    hidden, lm_head, targets, _ = case(20, 30)
    logps = linear_logprob(hidden, lm_head, targets)
    loss = -torch.nn.functional.logsigmoid(logps[:10].sum() - logps[10:].sum())  # DPO's shape
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * first)
    h = hidden.detach().double().requires_grad_()
    want = (h @ lm_head.detach().double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (-torch.nn.functional.logsigmoid(want[:10].sum() - want[10:].sum())).backward()
    assert relative(first, h.grad) < 1e-5


@BOTH
def test_all_rows_masked(way):
    hidden, lm_head, targets, _ = case(5, 11)
    for x in way(hidden, lm_head, targets, torch.zeros(5, device=DEVICE)):
        assert not x.any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits(way, scale, dtype):
    """Logits of +-1e4 and beyond, which are exact, so that their rounding does not count."""
    hidden, lm_head, targets, weights = case(40, 50, d=1, scale=scale, dtype=dtype)
    with torch.no_grad():  # powers of 2: the products are exact
        hidden.copy_(2 ** hidden.abs().log2().round() * hidden.sign())
    got = way(hidden, lm_head, targets, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, want in zip(got, reference(hidden, lm_head, targets, weights)):
        assert ours.isfinite().all() and (ours.double() - want).norm() <= tolerance * want.norm()


@BOTH
@pytest.mark.parametrize("gap", [20.0, 9.0, 2.0])
def test_nothing_cancels_where_the_model_is_sure(way, gap):
    # At 20, p(target) = 1 - 2e-9: in fp32, softmax - 1 would be 0, and z - logsumexp(z) too.
    hidden = torch.tensor([[gap]], device=DEVICE, requires_grad=True)
    lm_head = torch.tensor([[1.0], [0.0]], device=DEVICE, requires_grad=True)
    _, logp, _, grad_head = way(hidden, lm_head, torch.tensor([0], device=DEVICE), torch.ones(1, device=DEVICE))
    missing = 1 / (1 + torch.tensor(gap, dtype=torch.float64).exp())
    # A GPU's exp is accurate to a few units in the last place.
    assert logp.item() == pytest.approx(torch.log1p(-missing).item(), rel=3e-6)
    assert grad_head[0].item() == pytest.approx(gap * missing.item(), rel=3e-6)


@BOTH
def test_non_contiguous_input(way):
    hidden, lm_head, targets, weights = case(12, 9)
    _, want_logps, want_hidden, want_head = reference(hidden, lm_head, targets, weights)
    strided = torch.stack((hidden.detach(), hidden.detach()), 1)[:, 0].requires_grad_()
    across = lm_head.detach().T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous() and not across.is_contiguous()
    _, logps, grad_hidden, grad_head = way(strided, across, targets, weights)
    for got, want in ((logps, want_logps), (grad_hidden, want_hidden), (grad_head, want_head)):
        assert relative(got, want) < 1e-5


def test_frozen_head_and_no_grad():
    hidden, lm_head, targets, weights = case(12, 9)
    _, want_logps, want_hidden, _ = reference(hidden, lm_head, targets, weights)
    for fused in (
        lambda h: weighted_cross_entropy(h, lm_head.detach(), targets, weights)[0],
        lambda h: (linear_logprob(h, lm_head.detach(), targets) * weights).sum(),
    ):
        h = hidden.detach().clone().requires_grad_()
        fused(h).backward()
        assert relative(h.grad, want_hidden) < 1e-5
    with torch.no_grad():
        loss, logps = weighted_cross_entropy(hidden, lm_head, targets, weights)
        assert not loss.requires_grad and relative(logps, want_logps) < 1e-5
        logps = linear_logprob(hidden, lm_head, targets)
        assert not logps.requires_grad and relative(logps * (weights != 0), want_logps) < 1e-5


def test_the_kernel_stays_inside_its_rows(version):
    """A target outside the vocabulary is refused with the batch; if one got through, only its own row would be wrong."""
    if version == "plain" or DEVICE.type not in logprobs_.faster:
        pytest.skip("the plain version raises")
    around = torch.randn(5, 40, device=DEVICE)
    inside, before = around[1:4, :33], around.clone()
    logps, *_ = logprobs_(inside, torch.tensor([33, -1, 40], device=DEVICE), torch.ones(3, device=DEVICE))
    assert logps.isnan().all()
    outside = torch.ones_like(around, dtype=torch.bool)
    outside[1:4, :33] = False
    assert torch.equal(around[outside], before[outside])
