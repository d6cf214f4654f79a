"""The weights of the losses, on examples worked out by hand."""

import pytest

from nanoredi.objectives import redi, sft


def test_sft_is_the_mean_over_tokens():
    assert sft([2, 6]) == [-1 / 8, -1 / 8]


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
