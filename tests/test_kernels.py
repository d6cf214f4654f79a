"""The weighted cross-entropy against float64 and against autograd."""

import pytest
import torch

from nanoredi.kernels import cross_entropy, weighted_cross_entropy


def case(n, v, d=16, dtype=torch.float32, scale=1.0, seed=0):
    """Inputs with weights of mixed signs and sizes, a third of them 0."""
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, d, generator=g)).to(dtype).requires_grad_()
    lm_head = torch.randn(v, d, generator=g).to(dtype).requires_grad_()
    weights = torch.randn(n, generator=g) / n
    weights[1::3] = 0
    return hidden, lm_head, torch.randint(0, v, (n,), generator=g), weights


def reference(hidden, lm_head, targets, weights):
    """loss, logps and the gradients of hidden and lm_head in float64, by autograd through whole logits."""
    h, m = (x.detach().double().requires_grad_() for x in (hidden, lm_head))
    logps = (h @ m.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    loss = (weights.double() * logps).sum()
    loss.backward()
    return loss, logps * (weights != 0), h.grad, m.grad


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("n, v", [(1, 123), (2, 7), (50, 123), (257, 1000), (64, 4096)])
@pytest.mark.parametrize("chunk_logits", [1, 5000, 1 << 24])
def test_equals_float64(n, v, chunk_logits, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_CHUNK_LOGITS", chunk_logits)
    hidden, lm_head, targets, weights = case(n, v)
    loss, logps = weighted_cross_entropy(hidden, lm_head, targets, weights)
    loss.backward()
    want = reference(hidden, lm_head, targets, weights)
    for got, expected in zip((loss, logps, hidden.grad, lm_head.grad), want):
        assert relative(got.detach(), expected.detach()) < 1e-5
    assert not logps[weights == 0].any() and not hidden.grad[weights == 0].any()


@pytest.mark.parametrize("n, v", [(50, 123), (200, 4096)])
def test_bfloat16_is_no_worse_than_the_plain_way(n, v):
    hidden, lm_head, targets, weights = case(n, v, d=64, dtype=torch.bfloat16)
    loss, _ = weighted_cross_entropy(hidden, lm_head, targets, weights)
    loss.backward()
    _, _, want_hidden, want_head = reference(hidden, lm_head, targets, weights)
    h, m = (x.detach().clone().requires_grad_() for x in (hidden, lm_head))
    ((h @ m.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1) * weights).sum().backward()
    assert relative(hidden.grad, want_hidden) <= 1.05 * relative(h.grad, want_hidden)
    assert relative(lm_head.grad, want_head) <= 1.05 * relative(m.grad, want_head)


def test_upstream_gradient_scales_and_comes_once():
    hidden, lm_head, targets, weights = case(20, 30)
    loss, _ = weighted_cross_entropy(hidden, lm_head, targets, weights)
    (-3 * loss).backward(retain_graph=True)
    _, _, want_hidden, want_head = reference(hidden, lm_head, targets, weights)
    assert relative(hidden.grad, -3 * want_hidden) < 1e-5 and relative(lm_head.grad, -3 * want_head) < 1e-5
    with pytest.raises(RuntimeError, match="second forward"):
        loss.backward()


def test_all_rows_masked():
    hidden, lm_head, targets, _ = case(5, 11)
    loss, logps = weighted_cross_entropy(hidden, lm_head, targets, torch.zeros(5))
    loss.backward()
    for x in (loss, logps, hidden.grad, lm_head.grad):
        assert not x.detach().any()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits_stay_finite(scale):
    hidden, lm_head, targets, weights = case(40, 50, scale=scale)
    loss, logps = weighted_cross_entropy(hidden, lm_head, targets, weights)
    loss.backward()
    want = reference(hidden, lm_head, targets, weights)
    for got, expected in zip((loss, logps, hidden.grad, lm_head.grad), want):
        assert got.isfinite().all() and relative(got.detach(), expected.detach()) < 1e-4


def test_the_target_s_gradient_does_not_cancel_where_the_model_is_sure():
    # p(target) = 1 - 2e-9: in fp32, softmax - 1 would be 0.
    hidden, lm_head = torch.tensor([[20.0]], requires_grad=True), torch.tensor([[1.0], [0.0]], requires_grad=True)
    weighted_cross_entropy(hidden, lm_head, torch.tensor([0]), torch.ones(1))[0].backward()
    torch.testing.assert_close(lm_head.grad[0], torch.tensor([20 * 2.0611536e-09]), rtol=1e-5, atol=0)


def test_frozen_head_non_contiguous_input_and_no_grad():
    hidden, lm_head, targets, weights = case(12, 9)
    _, want_logps, want_hidden, _ = reference(hidden, lm_head, targets, weights)
    strided = torch.stack((hidden.detach(), hidden.detach()), 1)[:, 0].requires_grad_()
    loss, logps = weighted_cross_entropy(strided, lm_head.detach(), targets, weights, weights.nonzero().squeeze(1))
    loss.backward()
    assert relative(strided.grad, want_hidden) < 1e-5 and relative(logps, want_logps.detach()) < 1e-5
    with torch.no_grad():
        assert not weighted_cross_entropy(hidden, lm_head, targets, weights)[0].requires_grad
