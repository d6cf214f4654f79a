"""The figures of the table, on examples worked out on paper."""

import math

import pytest
from samples import sample

from nanoredi.data.benchmarks import Benchmark
from nanoredi.evaluation.scores import average, compare, graded, mark_best, pass_at_k, summarise


def test_summary_of_an_example():
    # 3 problems, 2 samples each. Accuracies by sample number: 2/3 and 1/3; their standard deviation (ddof 0) is 1/6.
    samples = [
        sample(0, 0, True, waits=3),
        sample(0, 1, True, tokens=20),
        sample(1, 0, True, correct_deepscaler=False),
        sample(1, 1, False, waits=1),
        sample(2, 0, False, answer=None, tokens=40, finish_reason="length"),
        sample(2, 1, False),
    ]
    row = summarise(samples, 2)
    assert row == {
        "problems": 3,
        "n": 2,
        "pass@1": pytest.approx(1 / 2),
        "sem": pytest.approx(1 / 6 / math.sqrt(2)),
        "pass@2": pytest.approx(2 / 3),
        "pass@1_deepscaler": pytest.approx(1 / 3),
        "mean_tokens": pytest.approx(100 / 6),
        "no_answer": pytest.approx(1 / 6),
        "cut_off": pytest.approx(1 / 6),
        "waits_per_response": pytest.approx(4 / 6),
        "waits_per_1000_tokens": pytest.approx(40),
    }


def test_scores_that_lack_their_fields_are_none():
    row = summarise([sample(0, 0, True, tokens=None, finish_reason=None, waits=2)], 1)
    assert row["mean_tokens"] is row["cut_off"] is row["waits_per_1000_tokens"] is None
    assert row["sem"] is None  # over samples, of which there is one
    assert row["waits_per_response"] == 2 and "pass@4" not in row


@pytest.mark.parametrize(
    "n, c, k, chance",
    [(4, 1, 1, 1 / 4), (4, 2, 2, 5 / 6), (4, 1, 4, 1), (4, 0, 4, 0), (16, 2, 4, 1 - 1001 / 1820), (16, 13, 4, 1)],
)
def test_pass_at_k_of_examples(n, c, k, chance):
    # With 2 right samples of 4, a pair misses both in 1 of 6 cases; C(14, 4) = 1001 of C(16, 4) = 1820.
    assert pass_at_k(n, c, k) == pytest.approx(chance)


def test_pass_at_k_of_a_summary():
    # One problem with 4 of 16 right, one with none: 1 - C(12, 4) / C(16, 4) = 1 - 495 / 1820.
    row = summarise([sample(p, i, p == 0 and i < 4) for p in range(2) for i in range(16)], 16)
    assert row["pass@1"] == pytest.approx(1 / 8)
    assert row["pass@4"] == pytest.approx((1 - 495 / 1820) / 2)
    assert row["pass@16"] == pytest.approx(1 / 2)


def test_average_of_benchmarks():
    rows = [
        {"model": "m", "benchmark": b, "problems": p, "n": 2, "pass@1": x, "sem": e, "mean_tokens": t}
        for b, p, x, e, t in (("one", 10, 0.2, 0.03, 5.0), ("other", 1000, 0.6, 0.04, None))
    ]
    assert average(rows) == {
        "model": "m",
        "benchmark": "average",
        "pass@1": pytest.approx(0.4),
        "sem": pytest.approx(0.025),
        "mean_tokens": None,
    }
    assert average([rows[0], {**rows[1], "sem": None}])["sem"] is None


def test_paired_difference_of_two_models():
    def samples_of(benchmark, first, second):
        for model, right in (("a", first), ("b", second)):
            for problem, values in enumerate(right):
                for number, correct in enumerate(values):
                    yield sample(problem, number, correct, model=model, benchmark=benchmark)

    same = list(samples_of("same", [[1, 0]] * 9, [[0, 1]] * 9))
    (row,) = compare(same, "a", "b")
    assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)  # no problem differs: paired, there is no spread
    # Of 100 problems the second model gets 20 more right: 0.2, standard error sqrt(0.2 * 0.8 / 100) = 0.04.
    apart = list(samples_of("apart", [[0]] * 100, [[1]] * 20 + [[0]] * 80))
    (row,) = compare(apart, "a", "b")
    assert row["difference"] == pytest.approx(0.2)
    assert row["low"] == pytest.approx(0.2 - 1.96 * 0.04, abs=0.015)
    assert row["high"] == pytest.approx(0.2 + 1.96 * 0.04, abs=0.015)
    assert compare(apart, "a", "b") == [row]  # the seed is fixed
    rows = compare(same + apart, "a", "b")
    assert [r["benchmark"] for r in rows] == ["apart", "same", "average"]
    assert rows[2]["difference"] == pytest.approx(0.1) and rows[2]["high"] == pytest.approx(row["high"] / 2)
    assert compare(apart, "b", "a")[0]["difference"] == pytest.approx(-0.2)
    assert compare(apart[::-1], "a", "b") == [row]  # whatever the order in which samples were finished
    # Two benchmarks of one size are drawn independently: the error of their mean is smaller by sqrt(2), not the same.
    both = apart + [{**s, "benchmark": "alike"} for s in apart]
    rows = compare(both, "a", "b")
    assert compare(both[::-1], "a", "b") == rows
    assert rows[2]["high"] - 0.2 == pytest.approx(1.96 * 0.04 / math.sqrt(2), abs=0.01)


def test_a_graded_response():
    benchmark = Benchmark("b", ["p"], ["p"], [["1/4", "x"]])
    row = graded("m", benchmark, 0, 3, r"<think>Wait, wait. Wait: Waiter</think>\boxed{\frac{3}{12}}", 7, "stop")
    assert row["correct"] and not row["correct_deepscaler"]
    assert (row["answer"], row["gold"], row["waits"]) == (r"\frac{3}{12}", ["1/4", "x"], 2)


@pytest.mark.parametrize(
    "figures, best",
    [
        (
            {"start": (0.9, 0.9), "step-000100": (0.2, 0.4), "step-000020": (0.4, 0.1), "final": (0.3, 0.2)},
            "step-000020",
        ),
        ({"SFT": (0.1, 0.1), "step-000007": (0.4, 0.1), "REDI": (0.4, 0.9)}, "step-000007"),  # in a tie the earliest
        ({"SFT": (0.1, 0.1), "REDI": (0.0, 0.0)}, "REDI"),
    ],
)
def test_the_best_of_a_run_is_by_math500(figures, best):
    rows = [
        {"model": model, "benchmark": benchmark, "pass@1": share, "best": True}
        for model, shares in figures.items()
        for benchmark, share in zip(("math500", "aime24"), shares)
    ]
    marked, text = mark_best(rows[::-1])
    assert {row["model"] for row in marked if row["best"]} == {best}
    last, (share, _) = list(figures.items())[-1]
    assert text == f"by pass@1 on MATH-500 the best is {best}, {figures[best][0]:.1%}; the last is {last}, {share:.1%}"
    steps = list(dict.fromkeys(row["model"] for row in marked))
    assert steps[0] == next(iter(figures)) and steps[1:-1] == sorted(steps[1:-1])
    # Without math500 the mean over the benchmarks present counts.
    for row in rows:
        row["benchmark"] = row["benchmark"].replace("math500", "amc23")
    means = {model: sum(shares) for model, shares in figures.items() if model not in ("start", "SFT")}
    assert {row["model"] for row in mark_best(rows)[0] if row["best"]} == {max(means, key=means.get)}
