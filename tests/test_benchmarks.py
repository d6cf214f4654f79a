"""Benchmark files, and the figures of a table's row worked out by hand."""

import json
import math

import pytest

from nanoredi.benchmarks import PAPER, load
from nanoredi.errors import UserError
from nanoredi.evaluation import summarise
from nanoredi.grader import grade
from nanoredi.report import read_results, table


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_files(name, shared):
    benchmark = load(name, str(shared / "benchmarks"))
    assert len(benchmark.questions) == len(benchmark.golds) == PAPER[name]
    assert benchmark.name == name and "Think step by step before answering.\n\n" in benchmark.questions[0]
    assert load(name, str(shared / "benchmarks"), limit=2).golds == benchmark.golds[:2]
    assert all(grade(f"\\boxed{{{gold}}}", gold) for golds in benchmark.golds for gold in golds)


def test_the_paper_s_answers_in_their_formats(shared):
    folder = str(shared / "benchmarks")
    assert load("amc23", folder).golds[0] == ["142"]
    assert load("minerva", folder).golds[0] == ["9.6"]
    assert load("aime24", folder).golds[1] == ["025"]
    assert load("olympiad_bench", folder).golds[1] == ["$\\frac{1}{2 n+2}$"]


def test_one_s_own_rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "1+1?", "answer": 2}\n{"problem": "half?", "answer": ["0.5", "1/2"], "more": 1}\n')
    benchmark = load(str(path), "")
    assert (benchmark.name, benchmark.questions, benchmark.golds) == (
        "mine",
        ["1+1?", "half?"],
        [["2"], ["0.5", "1/2"]],
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"answer": 2}\n', "line 1 has no text in 'problem'"),
        ('{"problem": "x", "answer": null}\n', "line 1 has no 'answer'"),
        ('{"problem": "x", "answer": []}\n', "line 1 has no 'answer'"),
        ('{"problem": "x", "answer": true}\n', "line 1 has no 'answer'"),
        ("", "holds no problems"),
        ("{\n", "line 1 is not JSON"),
    ],
)
def test_malformed_rows_are_named(tmp_path, text, words):
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        load(str(tmp_path / "b.jsonl"), "")


def test_what_is_missing_or_of_another_length(tmp_path):
    with pytest.raises(UserError, match=r"no benchmark 'math50' \(did you mean 'math500'\?\)"):
        load("math50", "")
    with pytest.raises(UserError, match="give --data DIR"):
        load("math500", "")
    with pytest.raises(UserError, match="holds neither aime24.json nor aime24.jsonl"):
        load("aime24", str(tmp_path))
    (tmp_path / "aime24.json").write_text(json.dumps([{"problem": "x", "answer": "1"}]))
    with pytest.raises(UserError, match="holds 1 problems; aime24 has 30"):
        load("aime24", str(tmp_path))


def sample(problem, number, correct, answer="1", tokens=10, finish_reason="stop"):
    return {
        "problem": problem,
        "sample": number,
        "correct": correct,
        "answer": answer,
        "tokens": tokens,
        "finish_reason": finish_reason,
    }


def test_summary_by_hand():
    # 3 problems, 2 samples each. Accuracies by sample number: 2/3 and 1/3; their standard deviation (ddof 0) is 1/6.
    samples = [
        sample(0, 0, True),
        sample(0, 1, True, tokens=20),
        sample(1, 0, True),
        sample(1, 1, False),
        sample(2, 0, False, answer=None, tokens=40, finish_reason="length"),
        sample(2, 1, False),
    ]
    row = summarise(samples, 2)
    assert row["problems"] == 3 and row["n"] == 2
    assert row["pass@1"] == pytest.approx(1 / 2)
    assert row["sem"] == pytest.approx(1 / 6 / math.sqrt(2))
    assert row["pass@2"] == pytest.approx(2 / 3)
    assert row["mean_tokens"] == pytest.approx(100 / 6)
    assert row["no_answer"] == row["cut_off"] == pytest.approx(1 / 6)


def test_table(tmp_path):
    rows = [
        {
            "model": name,
            "benchmark": "toy",
            **summarise([sample(0, 0, right), sample(0, 1, False)], 2),
            "chosen_logp": -0.5,
            "rejected_logp": None,
        }
        for name, right in (("SFT", False), ("REDI", True))
    ]
    assert table(rows).splitlines() == [
        "model  benchmark  pass@1 %   SEM  pass@2 %  mean tokens  no answer %  cut off %  logp chosen",
        "-" * 92,
        "SFT    toy             0.0   0.0       0.0         10.0          0.0        0.0       -0.500",
        "REDI   toy            50.0  35.4     100.0         10.0          0.0        0.0       -0.500",
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert read_results(tmp_path) == rows
    with pytest.raises(UserError, match="cannot read .*results.json"):
        read_results(tmp_path / "nowhere")
