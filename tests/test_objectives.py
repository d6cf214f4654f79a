"""The losses, on examples that were worked out on paper."""

import math

import pytest
import torch

from nanoredi.objectives import dpo, redi, sft, simpo, weighted_redi


def test_sft_is_the_mean_over_tokens():
    assert sft([2, 6]) == [-1 / 8, -1 / 8]
    assert sft([2, 6], [1.0, -0.5]) == [-1 / 8, 0.5 / 8]


def test_redi_divides_by_length_and_pairs():
    chosen, rejected = redi([2, 4], [5, 10], alpha=0.8)
    assert chosen == [-1 / 4, -1 / 8]
    assert rejected == pytest.approx([0.08, 0.04])


def test_redi_equals_the_paper_s_formula():
    # Sums of token log-probs: y_w -6 over 3 tokens and -2 over 4, y_l -8 over 2 and -5 over 5; the mean over the two
    # pairs of -logp(y_w)/|y_w| + 0.5 logp(y_l)/|y_l| is ((2 - 2) + (0.5 - 0.5)) / 2 = 0.
    chosen, rejected = redi([3, 4], [2, 5], alpha=0.5)
    assert sum(w * s for w, s in zip(chosen + rejected, [-6, -2, -8, -5])) == pytest.approx(0.0)
    # With alpha 1 it is ((2 - 4) + (0.5 - 1)) / 2.
    chosen, rejected = redi([3, 4], [2, 5], alpha=1.0)
    assert sum(w * s for w, s in zip(chosen + rejected, [-6, -2, -8, -5])) == pytest.approx(-1.25)


def test_alpha_0_is_sft_with_each_trace_counting_the_same():
    chosen, rejected = redi([2, 8], [3, 3], alpha=0.0)
    assert rejected == [0, 0]
    assert chosen[0] * 2 == chosen[1] * 8 == -0.5


def gradients(loss, *values):
    """The losses of pairs, and their gradients with respect to each of the values."""
    tensors = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    losses = loss(*tensors)
    losses.sum().backward()
    return losses.tolist(), *(t.grad.tolist() for t in tensors)


def test_dpo():
    # Log-ratios: no difference, then 2 nats in favour of the chosen; sigmoid(-0.5 * 2) = 1 / (1 + e).
    losses, chosen, rejected = gradients(lambda won, lost: dpo(won, lost, 0.5), [-3.0, 1.5], [-3.0, -0.5])
    assert losses == pytest.approx([math.log(2), math.log(1 + math.exp(-1))])
    assert chosen == pytest.approx([-0.5 * 0.5, -0.5 / (1 + math.e)])
    assert rejected == pytest.approx([-g for g in chosen])


def test_simpo():
    # 2 * (-0.5 + 1) - 1 = 0; 2 * (-1 + 0.5) - 1 = -2, where sigmoid(2) = 1 / (1 + e^-2).
    losses, chosen, rejected = gradients(lambda won, lost: simpo(won, lost, 2.0, 1.0), [-0.5, -1.0], [-1.0, -0.5])
    assert losses == pytest.approx([math.log(2), math.log(1 + math.e**2)])
    assert chosen == pytest.approx([-2 * 0.5, -2 / (1 + math.exp(-2))])
    assert rejected == pytest.approx([-g for g in chosen])


def test_weighted_redi_stops_pushing_a_negative_down_at_1_over_gamma():
    values = [-0.5, -0.5, -0.5], [-1.0, -2.0, -4.0]
    losses, chosen, rejected = gradients(lambda won, lost: weighted_redi(won, lost, 0.8, 0.5), *values)
    assert losses == pytest.approx([0.5 - 0.8 * m * math.exp(-m / 2) for m in (1, 2, 4)])
    assert chosen == [-1.0] * 3
    # 0.8 * exp(-m/2) * (1 - m/2): pushed down, not at all, pushed up.
    assert rejected == pytest.approx([0.4 * math.exp(-0.5), 0.0, -0.8 * math.exp(-2)])
    plain, _, alpha = gradients(lambda won, lost: weighted_redi(won, lost, 0.8, 0.0), *values)
    assert plain == pytest.approx([0.5 - 0.8, 0.5 - 1.6, 0.5 - 3.2]) and alpha == pytest.approx([0.8] * 3)
