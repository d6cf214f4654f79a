"""Tables as text and Markdown, and the failures of a run."""

import json

import pytest
from samples import sample

from nanoredi.common.errors import UserError
from nanoredi.evaluation.scores import summarise
from nanoredi.report import tables
from nanoredi.report.failures import KINDS, failures
from nanoredi.report.tables import as_markdown, as_text, details, differences, read_results, scores, table


def rows_of(names, benchmarks=("toy",)):
    return [
        {
            "model": name,
            "benchmark": benchmark,
            **summarise([sample(0, 0, right, waits=1), sample(0, 1, False)], 2),
            "chosen_logp": -0.5,
            "rejected_logp": None,
        }
        for name, right in names
        for benchmark in benchmarks
    ]


def test_table(tmp_path):
    rows = rows_of((("SFT", False), ("REDI", True)))
    assert [line.split() for line in table(rows).splitlines()[2:]] == [
        ["SFT", "toy", "0.0", "0.0", "0.0", "0.0", "10.0", "0.0", "0.0", "0.50", "50.00", "-0.500"],
        ["REDI", "toy", "50.0", "35.4", "100.0", "50.0", "10.0", "0.0", "0.0", "0.50", "50.00", "-0.500"],
    ]
    assert details(rows)[0] == [
        "model",
        "benchmark",
        "pass@1 %",
        "SEM",
        "pass@2 %",
        "DeepScaleR's %",
        "mean tokens",
        "no answer %",
        "cut off %",
        "Wait/response",
        "Wait/1000 tokens",
        "logp chosen",
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert read_results(tmp_path) == rows
    with pytest.raises(UserError, match="cannot read .*results.json"):
        read_results(tmp_path / "nowhere")


def test_columns_in_step():
    lines = [["model", "%"], ["a", "100.0"], ["bcd", "5"]]
    assert as_text(lines, 1) == "model      %\n------------\na      100.0\nbcd        5"
    assert as_markdown([["a|b", "%"], ["x", "5"]], 1) == "| a\\|b | % |\n| --- | ---: |\n| x | 5 |"


def test_average_and_the_paper_s_rows():
    rows = rows_of([("m", True)], ("math500", "aime24"))
    assert [line[:3] for line in details(rows)] == [
        ["model", "benchmark", "pass@1 %"],
        ["m", "math500", "50.0"],
        ["m", "aime24", "50.0"],
        ["m", "average", "50.0"],
    ]
    assert scores(rows) == [
        ["pass@1 %", "math500", "aime24", "average"],
        ["m", "50.0 ± 35.4", "50.0 ± 35.4", "50.0 ± 25.0"],
    ]
    paper = {line[0]: line[1:] for line in scores(rows, paper=True)}
    assert paper["REDI (paper)"] == ["83.1", "28.1", "55.6"] and paper["SFT, 5 epochs (paper)"] == [
        "80.4",
        "21.9",
        "51.2",
    ]
    # The averages of the five that the paper gives: 49.5 for REDI, 45.8 for SFT.
    five = {line[0]: line for line in scores(rows_of([("m", True)], tables.PAPER), paper=True)}
    assert five["REDI (paper)"][-1] == "49.5" and five["SFT, 5 epochs (paper)"][-1] == "45.8"
    assert scores(rows_of([("m", True)], ("mine",)), paper=True)[-1] == ["REDI (paper)", "-"]


def test_differences():
    compared = [{"benchmark": "b", "first": "x", "second": "y", "difference": 0.02, "low": -0.015, "high": 0.05}]
    assert differences(compared) == [["y less x", "points", "95 % interval"], ["b", "+2.0", "-1.5 to +5.0"]]


def test_failures(tmp_path):
    rows = [
        sample(0, 0, True, model="m", benchmark="b", gold=["1"], response="fine"),
        sample(0, 1, False, answer="2", model="m", benchmark="b", gold=["1", "one"], response="x" * 2_000 + "the end"),
        sample(1, 0, False, answer=None, model="m", benchmark="b", gold=["1"], response="\x1b[31mred\x9b \udc80"),
        sample(1, 1, False, answer=None, finish_reason="length", model="m", benchmark="b", gold=["1"], response="on"),
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, wrong, none, cut = failures(tmp_path)
    assert head == f"{tmp_path}: 1 right, 1 wrong, 1 cut off, 1 no answer"
    assert wrong.startswith(
        "--- m, b, problem 1, sample 1: wrong after 10 tokens\nanswer  2\ngold    1 or one\n\n...xx"
    )
    assert wrong.endswith("xthe end") and len(wrong) < 750
    assert none.endswith("\ufffd[31mred\ufffd \ufffd")  # no escape sequence reaches the terminal
    assert "cut off" in cut
    assert [list(failures(tmp_path, kind))[1:] for kind in KINDS] == [[wrong], [cut], [none]]
    (tmp_path / "samples.jsonl").write_text('{"model": "m"}\n')
    with pytest.raises(UserError, match="line 1 is no sample"):
        list(failures(tmp_path))
