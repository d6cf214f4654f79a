"""Tables as text and Markdown, and the failures of a run."""

import json

import pytest
from samples import sample

from nanoredi.common.errors import UserError
from nanoredi.common.flags import read_flags, read_recipe
from nanoredi.config import RediConfig  # noqa: F401 - registers the recipes' tables
from nanoredi.evaluation.samples import read_results
from nanoredi.evaluation.scores import summarise
from nanoredi.report import tables
from nanoredi.report.__main__ import ReportFlags
from nanoredi.report.__main__ import main as report
from nanoredi.report.failures import KINDS, failures
from nanoredi.report.tables import Table, as_markdown, as_text, details, differences, scores, show


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
    assert [line.split() for line in show([details(rows)]).splitlines()[2:]] == [
        ["SFT", "toy", "0.0", "0.0", "0.0", "10.0", "0.0", "-0.500"],
        ["REDI", "toy", "50.0", "35.4", "100.0", "10.0", "0.0", "-0.500"],
        ["4", "more", "columns:", "python", "-m", "nanoredi.report", "RUN", "--wide"],
    ]
    assert details(rows).lines[0] == [
        "model",
        "benchmark",
        "pass@1 %",
        "SEM",
        "pass@2 %",
        "tokens",
        "cut off %",
        "chosen",
        "no answer %",
        "DeepScaleR's %",
        "Wait/response",
        "Wait/1000 tokens",
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert read_results(tmp_path) == rows
    with pytest.raises(UserError, match="cannot read .*results.json"):
        read_results(tmp_path / "nowhere")


def test_an_average_is_over_different_benchmarks():
    row = {"model": "SFT", "benchmark": "b", "pass@1": 0.5, "sem": 0.1}  # duplicated in runs of older versions
    assert [line[1] for line in details([row, row]).lines] == ["benchmark", "b", "b"]
    assert [line[1] for line in details([row, {**row, "benchmark": "c"}]).lines] == ["benchmark", "b", "c", "average"]


def test_several_folders_keep_their_models_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        rows = [{"model": m, "benchmark": "b", "pass@1": 0.5, "sem": 0.1} for m in ("SFT", "REDI")]
        (tmp_path / name / "results.json").write_text(json.dumps(rows))
        compared = {"benchmark": "b", "first": "SFT", "second": "REDI", "difference": 0.1, "low": 0.0, "high": 0.2}
        (tmp_path / name / "differences.json").write_text(json.dumps([compared]))
    report(["x", "y"])
    said = capsys.readouterr().out
    assert "x: SFT" in said and "y: REDI" in said
    assert "x: REDI minus x: SFT" in said and "y: REDI minus y: SFT" in said


def test_columns_are_aligned():
    shown = Table([["model", "%"], ["a", "100.0"], ["through both"], ["bcd", "5"]])
    assert as_text(shown) == "model      %\n------------\na      100.0\nthrough both\nbcd        5"
    shown = Table([["a|b", "%"], ["x", "5"], ["y"]])
    assert as_markdown(shown) == "| a\\|b | % |\n| --- | ---: |\n| x | 5 |\n| y |  |"
    shown = Table([["model", "%"], ["a\r\nb\tc\x1b", "5"]])
    assert as_text(shown).splitlines()[2:] == [r"a b c\x1b  5"]
    assert as_markdown(shown).splitlines()[2:] == [r"| a b c\x1b | 5 |"]


def test_a_narrow_terminal():
    shown = Table([["model", "b", "one", "two"], ["a long name", "x", "1", "2"], ["a long name", "y", "3", "4"]], 2, 3)
    assert as_text(shown, 24) == as_text(shown) and max(map(len, as_text(shown).splitlines())) == 24
    more = "1 more columns: python -m nanoredi.report RUN --wide"
    assert as_text(shown, 23).splitlines()[2:] == ["a long name  x    1", "a long name  y    3", more]
    # Rather than drop the first columns to compare, the names move to a line above.
    assert as_text(shown, 18).splitlines() == [
        "model  b  one  two",
        "------------------",
        "a long name",
        "       x    1    2",
        "       y    3    4",
    ]


@pytest.mark.parametrize("names", [("SFT", "REDI"), ("runs/sft/final", "runs/" + "x" * 90 + "/final")])
@pytest.mark.parametrize("benchmarks", [("toy",), ("aime24", "math500"), tuple(tables.PAPER)])
def test_all_tables_fit_80_columns(names, benchmarks, tmp_path):
    rows = rows_of([(name, True) for name in names], benchmarks)
    rows = [{**row, "mean_tokens": 12_345.6, "pass@4": 0.5, "pass@16": 1.0} for row in rows]
    compared = [
        {"benchmark": b, "first": names[0], "second": names[1], "difference": -1.0, "low": -1.0, "high": 1.0}
        for b in benchmarks
    ]
    text = tables.write(tmp_path, rows, compared, paper=True)
    assert max(map(len, text.splitlines())) <= 80
    for heading in ("pass@1 %", "SEM", "pass@16 %", "tokens", "cut off %"):
        assert heading in text
    assert "Wait/response" not in text and "Wait/response" in (tmp_path / "results.md").read_text()
    assert "Wait/response" in tables.write(tmp_path, rows, compared, paper=True, wide=True)


def test_average_and_the_paper_s_rows():
    rows = rows_of([("m", True)], ("math500", "aime24"))
    assert [line[:3] for line in details(rows).lines] == [
        ["model", "benchmark", "pass@1 %"],
        ["m", "math500", "50.0"],
        ["m", "aime24", "50.0"],
        ["m", "average", "50.0"],
    ]
    assert scores(rows).lines == [
        ["pass@1 %", "math500", "aime24", "mean"],
        ["m", "50.0 ± 35.4", "50.0 ± 35.4", "50.0 ± 25.0"],
    ]
    paper = {line[0]: line[1:] for line in scores(rows, paper=True).lines}
    assert paper["REDI (*)"] == ["83.1", "28.1", "55.6"]
    assert paper["DPO 0.001, 2e-7 (*-dpo)"] == ["81.3 ± 0.2", "24.6 ± 1.7", "53.0"]
    # The averages over the paper's five benchmarks: 49.5 for REDI, 45.8 for SFT, and table 2's with their errors.
    five = {line[0]: line for line in scores(rows_of([("m", True)], tables.PAPER), paper=True).lines}
    assert five["REDI (*)"][-1] == "49.5" and five["SFT, 5 epochs (*)"][-1] == "45.8"
    assert five["REDI 0.8, 1e-6 (*-3-epochs)"][-1] == "48.3 ± 0.3"
    assert scores(rows_of([("m", True)], ("mine",)), paper=True).lines[6] == ["SFT, 5 epochs (*)", "-"]


def test_pass_at_16_beside_the_paper_s():
    lines = scores(rows_of([("m", True)], tables.PAPER), "pass@16", paper=True).lines
    assert lines[0] == ["pass@16 %", "math500", "aime24", "amc23", "minerva", "olympiad", "mean"]
    assert lines[1] == ["m", *"------"]  # with two samples there is no pass@16
    assert lines[2] == ["the paper's table 3, from SFT of 3 epochs (*: qwen2.5-math-1.5b)"]
    assert lines[-1] == ["REDI, from 5 epochs (*)", "95.0", "66.7", "90.4", "57.0", "65.8", "75.0"]
    assert len(lines) == 2 + 1 + 5 + 1 + 3


def test_every_recipe_beside_the_paper_s_rows_is_there():
    recipes = {recipe for part in tables._PAPER.values() for rows in part.values() for _, recipe, _ in rows if recipe}
    assert len(recipes) == 5
    for recipe in recipes:
        assert read_recipe(recipe)["redi"]


def test_table_2_s_means_are_its_rows():
    for _, _, figures in tables._PAPER["pass@1"]["table 2, from SFT of 3 epochs"]:
        *five, mean = [float(figure.split("±")[0]) for figure in figures.split()]
        assert sum(five) / 5 == pytest.approx(mean, abs=0.06)


def test_differences():
    of = {"difference": 0.02, "low": -0.015, "high": 0.05}
    compared = [{"benchmark": b, "first": f, "second": "y", **of} for b, f in (("b", "x"), ("c", "x"), ("b", "z"))]
    own = ["+2.0", "-1.5 to +5.0"]
    assert differences(compared).lines == [
        ["pass@1", "points", "95 % interval"],
        ["y minus x"],
        ["b", *own],
        ["c", *own],
        ["y minus z"],
        ["b", *own],
    ]


@pytest.mark.parametrize(
    "argv, want",
    [
        (["a", "--paper", "b", "--out", "x.png", "c"], {"runs": ["a", "b", "c"], "paper": True, "out": "x.png"}),
        (["--paper", "true", "b", "--wide", "false"], {"runs": ["b"], "paper": True, "wide": False}),
        (["--runs", "a", "b"], {"runs": ["a", "b"]}),
        (["a", "--papre"], r"there is no flag --papre \(did you mean '--paper'"),
        (["--runs", "a", "--paper", "b"], "'b' follows no flag"),
    ],
)
def test_folders_may_come_anywhere_among_the_flags(argv, want):
    if isinstance(want, dict):
        assert read_flags("", argv, "report", ReportFlags, positional="runs") == (None, {"report": want})
    else:
        with pytest.raises(UserError, match=want):
            read_flags("", argv, "report", ReportFlags, positional="runs")


def test_failures(tmp_path):
    rows = [
        sample(0, 0, True, model="m", benchmark="b", gold=["1"], response="fine"),
        sample(0, 1, False, answer="2", model="m", benchmark="b", gold=["1", "one"], response="x" * 2_000 + "the end"),
        sample(1, 0, False, answer=None, model="m", benchmark="b", gold=["1"], response="\x1b[31mred\x9b \udc80"),
        sample(
            1,
            1,
            False,
            answer=None,
            tokens=1,
            finish_reason="length",
            model="m",
            benchmark="b",
            gold=["1"],
            response="on",
        ),
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, wrong, none, cut = failures(tmp_path)
    assert head == f"{tmp_path}: 1 right, 1 wrong, 1 cut off, 1 no answer"
    assert wrong.startswith(
        "--- m, b, problem 1, sample 1: wrong after 10 tokens\nanswer  2\ngold    1 or one\n\n...xx"
    )
    assert wrong.endswith("xthe end") and len(wrong) < 750
    assert none.endswith("\x1b[31mred\x9b \udc80")  # run_script and the pager show these escaped
    assert "cut off after 1 token\n" in cut
    assert [list(failures(tmp_path, kind))[1:] for kind in KINDS] == [[wrong], [cut], [none]]
    (tmp_path / "samples.jsonl").write_text('{"model": "m"}\n')
    with pytest.raises(UserError, match="line 1: the object has no field"):
        list(failures(tmp_path))
