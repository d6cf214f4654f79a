"""Training curves: what is read of runs, and the figure."""

import json
import math
import sys

import pytest

from nanoredi.common.errors import UserError
from nanoredi.report import __main__ as report
from nanoredi.report import figures


def metrics(step, **more):
    return {"step": step, "chosen_logp": -0.5 - step / 10, "rejected_logp": -0.7 - step / 5, "update_norm": 0.1} | more


def result(model, benchmark, accuracy):
    return {"model": model, "benchmark": benchmark, "n": 4, "pass@1": accuracy, "sem": 0.01, "pass@4": 1.0}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a run's folder, relative to an empty one."""
    monkeypatch.chdir(tmp_path)

    def make(name, rows, tail="", results=()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        if results:
            (folder / "results.json").write_text(json.dumps(results))
        return name

    return make


@pytest.fixture
def lines(monkeypatch):
    """The points of every line drawn, by panel."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = {}
    set_title = Axes.set_title

    def keep(self, title, **more):
        drawn[title] = [(list(line.get_xdata()), list(line.get_ydata())) for line in self.lines]
        return set_title(self, title, **more)

    monkeypatch.setattr(Axes, "set_title", keep)
    return drawn


def test_series_and_their_gaps(make):
    make("run", [metrics(1), metrics(2, rejected_logp=None), {"step": 3}])
    (run,) = figures.read_runs(["run"])
    assert run.series("chosen_logp")[0] == [1, 2, 3]
    chosen, rejected = run.series("chosen_logp")[1], run.series("rejected_logp")[1]
    assert chosen[:2] == [-0.6, -0.7] and math.isnan(chosen[2])
    assert rejected[0] == pytest.approx(-0.9) and all(map(math.isnan, rejected[1:]))


@pytest.mark.parametrize("tail", ['{"step": 3, "chosen_l', '{"step": 3, "chosen_logp": -1', "{", "\n\n"])
def test_a_truncated_last_line_is_ignored(make, tail):
    make("run", [metrics(1), metrics(2)], tail)
    assert [row["step"] for row in figures.read_runs(["run"])[0].rows] == [1, 2]


def test_a_complete_last_line_needs_no_line_break(make):
    make("run", [metrics(1)], json.dumps(metrics(2)))
    assert [row["step"] for row in figures.read_runs(["run"])[0].rows] == [1, 2]


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"step": 3, "chos\n', "line 2 is not JSON"),
        ("[3]\n", r"line 2: it is \[3\]; it must be an object"),
        ('{"step": "3"}\n', "line 2: step is '3'; it must be a whole number"),
        ('{"step": 3, "loss": "low"}\n', "line 2: loss is 'low'; it must be a number"),
    ],
)
def test_a_broken_line_is_named(make, line, words):
    make("run", [metrics(1)], line)
    with pytest.raises(UserError, match=words):
        figures.read_runs(["run"])


def test_runs_get_distinct_names(make):
    for name in ("a/redi", "b/redi", "b/c/redi", "sft"):
        make(name, [metrics(1)])
    names = [run.name for run in figures.read_runs(["a/redi", "b/redi", "b/c/redi", "sft"])]
    assert names == ["a/redi", "b/redi", "c/redi", "sft"]


def test_accuracy_is_drawn_at_its_model_s_step(make):
    models = ["SFT", "REDI", "step-000200", "runs/x/step-000400"]
    make("run", [metrics(i) for i in range(1, 501)], results=[result(m, "toy", i / 10) for i, m in enumerate(models)])
    (run,) = figures.read_runs(["run"])
    assert run.accuracy == {"toy": [(0, 0.0, 0.01), (200, 0.2, 0.01), (400, 0.3, 0.01), (500, 0.1, 0.01)]}


def test_a_second_sft_is_the_end(make):
    """A stage-2 run with the objective sft names both of its models SFT."""
    rows = [result(m, b, a) for m, a in (("SFT", 0.1), ("SFT", 0.2)) for b in ("x", "y")]
    rows[0]["sem"] = None  # of one sample a problem
    make("run", [metrics(1), metrics(2)], results=rows)
    (run,) = figures.read_runs(["run"])
    assert run.accuracy == {b: [(0, 0.1, sem), (2, 0.2, 0.01)] for b, sem in (("x", 0.0), ("y", 0.01))}


def test_malformed_results_are_refused(make):
    make("run", [metrics(1)], results=[{"model": "SFT", "benchmark": "toy"}])
    with pytest.raises(UserError, match=r"results.json: \[0\] has no field 'pass@1'"):
        figures.read_runs(["run"])


def test_summary(make):
    make("run", [metrics(1, loss=2.0), metrics(2, loss=None), metrics(3, loss=0.5), metrics(4, loss=1.0)])
    make("new", [])
    run, new = figures.read_runs(["run", "new"])
    loss = next(line for line in figures.summary(run).splitlines() if "loss" in line)
    assert loss.split() == ["loss", "2.0000", "1.0000", "0.5000", "2.0000"]
    assert "margin" not in figures.summary(run)
    wide = dict.fromkeys((key for key, *_ in figures.SERIES), -1234.5)
    make("wide", [metrics(1, **wide)])
    assert max(map(len, figures.summary(*figures.read_runs(["wide"])).splitlines())) <= 80
    assert figures.summary(new) == "new: no steps yet"


def test_the_four_panels(make, lines):
    make("redi", [metrics(1), metrics(2)], results=[result("SFT", "toy", 0.5), result("REDI", "toy", 0.75)])
    make("sft", [metrics(i, rejected_logp=None) for i in (1, 2, 3)])
    make("new", [])
    figures.draw(figures.read_runs(["redi", "sft", "new"]), "out.png")
    assert lines["Accuracy on toy"][0] == ([0, 2], [50.0, 75.0])
    redi, sft = lines["Log-prob of chosen traces"]
    assert redi == ([1, 2], [-0.6, -0.7]) and sft[0] == [1, 2, 3]
    redi, sft = lines["Log-prob of rejected traces"]
    assert redi[1] == pytest.approx([-0.9, -1.1]) and all(map(math.isnan, sft[1]))
    assert lines["Size of the parameter update"] == [([1, 2], [0.1, 0.1]), ([1, 2, 3], [0.1, 0.1, 0.1])]


def test_entropy_and_the_change_since_the_start_on_request(make, lines):
    def looks(when, change):
        return {f"{when}_{side}_{what}": change for side in ("chosen", "rejected") for what in ("logp", "entropy")}

    entropies = {"chosen_entropy": 0.5, "rejected_entropy": 0.75}
    make("redi", [metrics(1, **entropies, **looks("start", -1.0)), metrics(2, **entropies, **looks("watch", -1.5))])
    make("before", [metrics(1), metrics(2, watch_chosen_logp=-3.0)])  # started before these columns existed
    runs = figures.read_runs(["redi", "before"])
    figures.draw(runs, "out.png")
    assert not [title for title in lines if "entropy" in title or "Change" in title]
    assert lines["Log-prob of chosen traces"][1] == ([0, 2], [-1.0, -1.5])
    figures.draw(runs, "out.png", entropy=True)
    redi, watched, before = lines["Token entropy on rejected traces"]
    assert redi == ([1, 2], [0.75, 0.75]) and watched == ([0, 2], [-1.0, -1.5]) and all(map(math.isnan, before[1]))
    for side in ("chosen", "rejected"):
        assert lines[f"Change of {side} log-prob (watched pairs)"] == [([0, 2], [0.0, -0.5])]
    assert "watched pairs' rejected entropy" in figures.summary(runs[0])


def test_the_command(make, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    make("redi", [metrics(1), metrics(2)], '{"st', results=[result("SFT", "toy", 0.5), result("REDI", "toy", 0.75)])
    make("sft", [metrics(1, rejected_logp=None, update_norm=0.0)])
    report.main(["redi", "sft", "--out", "figure.png"])
    out = capsys.readouterr().out
    assert "redi: steps 1 to 2" in out and "sft: steps 1 to 1" in out and "pass@1 %" in out
    first = (tmp_path / "figure.png").read_bytes()
    assert first.startswith(b"\x89PNG\r\n\x1a\n") and len(first) > 10_000
    # Its own figure is overwritten.
    report.main(["sft", "--out=figure.png"])
    second = (tmp_path / "figure.png").read_bytes()
    assert second not in (b"", first)
    report.main(["--entropy", "sft", "--out", "figure.png"])
    assert len((tmp_path / "figure.png").read_bytes()) > len(second)


def test_dollars_in_names_begin_no_formula(make, lines):
    for name, benchmarks in ((r"$\a$", [r"$\b$"]), (r"$\c$", [r"$\d$", r"$\e$"])):
        make(name, [metrics(1)], results=[result("SFT", benchmark, 0.5) for benchmark in benchmarks])
        figures.draw(figures.read_runs([name]), "out.png")
    assert r"Accuracy on \$\b\$" in lines


def test_a_results_folder_needs_no_run(make, capsys, tmp_path):
    """evaluate.py's folders have results but no metrics."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps([result("m", "toy", 0.5)]))
    report.main(["one"])
    assert "run" not in capsys.readouterr().out
    report.main(["one", "two"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["one:", "two:"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["redi", "--out", "figure.pdf"], "give --out a name that ends in .png, not figure.pdf"),
        (["redi", "--out"], "--out: expected one argument"),
        (["redi", "--out", "nowhere/figure.png"], "there is no folder nowhere"),
        (["redi", "--out", "mine.png"], "mine.png exists and is no figure of nanoredi's"),
        (["redi", "--out", "folder.png"], "folder.png exists and is no figure"),
        (["--out", "figure.png"], "give the folders of runs"),
        (["redi", "--entropy"], "--entropy says what is drawn: give --out FIGURE.png"),
        (["new", "--out", "figure.png"], "there is nothing to draw"),
        (["redi", "--ot", "figure.png"], "there is no flag --ot"),
        (["nowhere"], "nowhere holds no run"),
        (["redi", "new/../redi"], "--runs names redi twice"),
        (["evaluated", "./evaluated"], "--runs names evaluated twice"),
        (["redi", "--max_prompt_tokens", "3"], "--max_prompt_tokens goes with --lengths"),
        (["--tokenizer", "x"], "--tokenizer goes with --lengths"),
        (["--lengths", "x", "--paper"], "--lengths takes one folder and makes a report of its own: leave out --paper"),
        (["--failures", "x", "--lengths", "y"], "--lengths takes one .*: leave out --failures"),
    ],
)
def test_bad_input_is_refused(make, tmp_path, words, message):
    make("redi", [metrics(1)])
    make("new", [])
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated/results.json").write_text('[{"model": "m", "benchmark": "b", "pass@1": 0.5, "sem": 0.1}]')
    (tmp_path / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\n IHDR of a cat")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        report.main(words)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "mine.png").read_bytes().endswith(b"cat")


def test_without_matplotlib(make, monkeypatch):
    make("redi", [metrics(1)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        report.main(["redi", "--out", "figure.png"])
    report.main(["redi"])
