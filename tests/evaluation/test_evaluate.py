"""Whole evaluations: resumed, of several models and of a run's checkpoints, with long problems, templates and paths."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate
import train_redi
from nanoredi.common.errors import UserError
from nanoredi.common.flags import write_recipe
from nanoredi.common.runs import recipe_of
from nanoredi.config import EvaluateConfig, RediConfig
from nanoredi.model.qwen2 import Qwen2
from nanoredi.report.figures import read_runs
from nanoredi.trainer.distributed import world

FLAGS = "--n 2 --max_tokens 8 --dtype float32 --think own --limit 3".split()


@pytest.fixture
def models(tmp_path, toy_data, monkeypatch):
    """Two equal models and a benchmark in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(toy_data / "model", tmp_path / name)
    shutil.copy(toy_data / "toy.jsonl", tmp_path)
    return tmp_path


def start(capsys, *flags):
    evaluate.main([*FLAGS, *([] if "--benchmarks" in flags else ["--benchmarks", "toy.jsonl"]), *flags])
    return capsys.readouterr().out


def test_nothing_missing_ends_at_once_with_the_same_table(models, capsys, monkeypatch):
    first = start(capsys, "--model", "a", "b", "--out", "out")
    samples = (models / "out/samples.jsonl").read_bytes()
    monkeypatch.setattr("nanoredi.evaluation.evaluate.evaluate", None)  # no model is loaded
    again = start(capsys, "--model", "a", "b", "--out", "out")
    assert again.strip() == first[first.index("model  benchmark") :].strip()
    assert (models / "out/samples.jsonl").read_bytes() == samples


def test_the_last_model_is_gone_when_the_next_one_is_loaded(models, capsys, monkeypatch):
    held = []

    def load(*args, load=Qwen2.from_pretrained, **settings):
        assert not any(last() for last in held), "a model is still held"
        model = load(*args, **settings)
        model.held_by = [model]  # a reference cycle
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Qwen2, "from_pretrained", load)
    gc.disable()
    try:
        start(capsys, "--model", "a", "b")
    finally:
        gc.enable()
    assert len(held) == 2


def test_a_table_lost_by_a_kill_is_rewritten(models, capsys):
    first = start(capsys, "--model", "a", "--out", "out")
    for left in (None, "", "[{"):
        (models / "out/results.json").unlink()
        if left is not None:
            (models / "out/results.json").write_text(left)
        again = start(capsys, "--model", "./a/", "--out", "out")
        assert "a: 6 samples are there, 0 are missing" in again and first.splitlines()[-3:] == again.splitlines()[-3:]


def test_only_the_second_of_two_models_is_resumed(models, capsys):
    start(capsys, "--model", "a", "b", "--out", "out")
    path = models / "out/samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    out = start(capsys, "--model", "a", "b", "--out", "out")
    assert "a: " not in out and "b: 4 samples are there, 2 are missing" in out
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.fixture
def a_run(models, toy_data):
    """A run of stage 2 with two checkpoints, its final model and the model it started from."""
    for seed, name in enumerate(("step-000002", "step-000010", "final")):
        model = Qwen2.from_pretrained(toy_data / "model").init_weights(seed)
        model.save_pretrained(models / "run" / name)
    (models / "run/step-000012").mkdir()  # nothing was saved in it yet
    (models / "run/metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 14))
    )
    evaluation = EvaluateConfig(benchmarks=["toy.jsonl"], n=2, max_tokens=8, dtype="float32", think="own", limit=3)
    write_recipe(models / "run/config.toml", {"redi": RediConfig(model="a", out="run"), "evaluate": evaluation})
    return models / "run"


ALONG = ["SFT", "step-000002", "step-000010", "REDI"]


def along(capsys, *flags):
    """Evaluate all checkpoints of the run. Returns the output, and from results.json the models and the best ones."""
    evaluate.main(["--model", "run", "--along", *flags])
    rows = json.loads(Path("run/results.json").read_text())
    return capsys.readouterr().out, [row["model"] for row in rows], [row["model"] for row in rows if row.get("best")]


def make_right(a_run, model, number):
    """Mark the first `number` samples of a model as correct, and its others as wrong."""
    path, lines = a_run / "samples.jsonl", []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["model"] == model:
            row["correct"], number = number > 0, number - 1
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def test_all_checkpoints_of_a_run(a_run, capsys, monkeypatch):
    out, models, best = along(capsys)
    assert models == ALONG and len(best) == 1 and f"{best[0]} (best)" in out
    make_right(a_run, "SFT", 6)  # the start is shown for comparison, but is no candidate for the best
    make_right(a_run, "REDI", 2)
    make_right(a_run, "step-000010", 4)
    (a_run / "results.json").write_text("[{")
    out, models, best = along(capsys)
    assert models == ALONG and best == ["step-000010"] and "step-000010 (best)" in out
    assert "by pass@1 over the benchmarks the best is step-000010, 66.7%; the last is REDI, 33.3%" in out
    monkeypatch.setattr("nanoredi.evaluation.evaluate.evaluate", None)
    again, *_ = along(capsys)  # no model is loaded
    assert again == out[out.index("model  ") :]
    (read,) = read_runs(["run"])
    assert [(step, round(share, 3)) for step, share, _ in read.accuracy["toy"]] == [
        (0, 1.0),
        (2, read.accuracy["toy"][1][1]),
        (10, 0.667),
        (13, 0.333),
    ]


def test_all_checkpoints_of_a_run_that_resumes(a_run, capsys):
    """Earlier evaluations are kept: of an interrupted command, of the training itself, and of a deleted checkpoint."""
    (a_run / "final").rename(a_run / "later")
    assert along(capsys)[1] == ALONG[:3]
    lines = (a_run / "samples.jsonl").read_text().splitlines(keepends=True)
    (a_run / "samples.jsonl").write_text("".join(lines[:-2]))
    out, models, _ = along(capsys)
    assert models == ALONG[:3] and "step-000010: 4 samples are there, 2 are missing" in out and "SFT: " not in out
    assert sorted((a_run / "samples.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    (a_run / "later").rename(a_run / "final")
    shutil.rmtree(a_run / "step-000002")
    shutil.rmtree("a")
    before = (a_run / "samples.jsonl").read_text()
    out, models, _ = along(capsys)
    assert models == ALONG and "the model that run started from does not exist" in out
    assert (a_run / "samples.jsonl").read_text().startswith(before)
    with pytest.raises(UserError, match="the setting n is 2 there and 3 here; give another --out"):
        along(capsys, "--n", "3")
    Qwen2.from_pretrained("b").init_weights(9).save_pretrained("other")
    shutil.copy("other/model.safetensors", a_run / "final")
    with pytest.raises(UserError, match="the model REDI has changed since"):
        along(capsys)


def test_a_run_whose_checkpoints_were_evaluated_shows_them_all(a_run, capsys):
    """The training's table has only its two models; it is made only if one of them is not evaluated yet."""
    (a_run / "final").rename(a_run / "later")
    along(capsys)
    (a_run / "later").rename(a_run / "final")
    tables = recipe_of("run/final")
    config, evaluation = RediConfig(**tables["redi"]), EvaluateConfig(**tables["evaluate"])
    with world() as ranks:
        train_redi.show_results(config, evaluation, ranks)
        out = capsys.readouterr().out
        assert all(f"{name} " in out for name in ALONG)
        (a_run / "samples.jsonl").unlink()
        train_redi.show_results(config, replace(evaluation, think="forced"), ranks)
    assert capsys.readouterr().out in out


def test_a_run_whose_model_does_not_think_is_warned(a_run, capsys, monkeypatch):
    tables = recipe_of("run/final")
    evaluation = EvaluateConfig(**{**tables["evaluate"], "think": "forced"})
    # A prompt opens <think> with a line break, which the toy's vocabulary lacks.
    monkeypatch.setattr("nanoredi.evaluation.evaluate.Tokenizer.prompt", lambda *_, **__: "1<think>")
    monkeypatch.setattr("nanoredi.evaluation.evaluate.Tokenizer.decode", lambda *_: "\\boxed{1}")
    with world() as ranks:
        train_redi.show_results(RediConfig(**tables["redi"]), evaluation, ranks)
    out = capsys.readouterr().out
    assert "REDI: over half of the responses with a boxed answer have no </think>" in out
    assert "give --think own to evaluate.py, or --evaluate.think own to a new run" in out


def test_two_ranks_with_nothing_missing(models, run):
    words = ["evaluate.py", *FLAGS, "--benchmarks", "toy.jsonl", "--model", "a", "--out", "out"]
    for ranks in (0, 2):
        done = run(*words, ranks=ranks, gpus=2)
        assert done.returncode == 0, done.stderr
        (models / "out/results.json").unlink()
    assert "6 samples are there, 0 are missing" in done.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "a", "b", "./a/"], "--model names a twice"),
        (["--model", "a", "--benchmarks", "toy.jsonl", "./toy.jsonl"], "--benchmarks names toy.jsonl twice"),
        (["--model", "a", "--out", "toy.jsonl/x"], "toy.jsonl/x"),
        (["--model", "Qwen/Qwen2.5-Math-1.5B"], "hf download Qwen/Qwen2.5-Math-1.5B"),
        (["--model", "."], "is not a model's folder: give "),
        (["--model", "a", "--along"], "a is not a run's folder: it has no config.toml"),
        (["--model", "a", "b", "--along"], "--along takes one run"),
        (["--along"], "there is no model under runs/ yet"),
        (["--model", "a", "--template", "Solve it"], "--template takes paper, plain, or a text with {problem} where"),
    ],
)
def test_what_is_refused(models, flags, words):
    with pytest.raises(UserError) as error:
        evaluate.main([*FLAGS, "--benchmarks", "toy.jsonl", *flags])
    assert words in str(error.value)


def test_a_problem_that_is_too_long_counts_as_cut_off(models, capsys):
    rows = [json.loads(line) for line in (models / "toy.jsonl").read_text().splitlines()]
    rows[1]["problem"] = "1+" * 200
    (models / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for again in (False, True):  # reported once, counted always
        out = start(capsys, "--model", "a", "--out", "out")
        samples = [json.loads(line) for line in (models / "out/samples.jsonl").read_text().splitlines()]
        assert [(s["tokens"], s["finish_reason"], s["correct"]) for s in samples if s["problem"] == 1] == [
            (0, "length", False)
        ] * 2
        assert len(samples) == 6
        said = "1 problem with no room in the context of 256 tokens counted as cut off; the first: problem 2 of toy"
        assert (said in out) == (not again)


def test_template_and_system(models, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "nanoredi.evaluation.evaluate.Tokenizer.prompt", lambda self, messages, think: asked.append(messages) or "1"
    )
    out = start(capsys, "--model", "a")
    assert "toy.jsonl: asked as they are; --template paper" in out and len(asked[0]) == 1
    out = start(capsys, "--model", "a", "--template", "In \\boxed{}: {problem}?", "--system", "Be brief.", "--out", "x")
    assert "asked without" not in out
    assert asked[-1][0] == {"role": "system", "content": "Be brief."}
    assert asked[-1][1]["content"] == f"In \\boxed{{}}: {asked[2][0]['content']}?"
    with pytest.raises(UserError, match="the setting system is 'Be brief.' there and '' here"):
        start(capsys, "--model", "a", "--template", "In \\boxed{}: {problem}?", "--out", "x")


def test_two_files_of_one_stem(models, capsys):
    problem = json.loads((models / "toy.jsonl").read_text().splitlines()[0])
    for name in ("one", "two"):
        (models / name).mkdir()
        (models / name / "test.jsonl").write_text(json.dumps({**problem, "answer": name}) + "\n")
    out = start(capsys, "--model", "a", "--benchmarks", "one/test.jsonl", "two/test.jsonl", "--out", "out")
    assert "one/test" in out and "two/test" in out
    samples = [json.loads(line) for line in (models / "out/samples.jsonl").read_text().splitlines()]
    assert {(s["benchmark"], *s["gold"]) for s in samples} == {("one/test", "one"), ("two/test", "two")}


def test_a_model_that_does_not_think(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [*(f"\\boxed{{{i}}}" for i in range(3)), *["I do not know."] * 9]  # few have a box
    rows = [{"prompt": f"What is {i}+0?", "answer": i, "output": text} for i, text in enumerate(texts)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["--completions", "c.jsonl", "--out", "forced"])
    assert "c: over half of the responses with a boxed answer have no </think>" in (out := capsys.readouterr().out)
    assert "give --think own" in out
    evaluate.main(["--completions", "c.jsonl", "--out", "own", "--think", "own"])
    assert "no </think>" not in capsys.readouterr().out
    with pytest.raises(UserError, match="--completions names ./c.jsonl twice|--completions names c.jsonl twice"):
        evaluate.main(["--completions", "c.jsonl", "./c.jsonl"])


def test_settings_that_an_older_evaluation_did_not_have(models, capsys):
    start(capsys, "--model", "a", "--out", "out")
    path = models / "out/evaluation.json"
    about = json.loads(path.read_text())
    del about["setting"]["system"], about["setting"]["template"]
    path.write_text(json.dumps(about))
    start(capsys, "--model", "a", "--out", "out")
    with pytest.raises(UserError, match="the setting system is '' there"):
        start(capsys, "--model", "a", "--out", "out", "--system", "x")


def test_a_run_s_own_paths_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, elsewhere = tmp_path / "work/runs/r", tmp_path / "elsewhere"
    for folder in (run / "data", tmp_path / "work/files", elsewhere):
        folder.mkdir(parents=True)
    for file in (run / "data/toy.jsonl", run / "metrics.jsonl", tmp_path / "work/files/watch.jsonl"):
        file.write_text("")
    configs = {
        "redi": RediConfig(out="runs/r", watch="files/watch.jsonl", data="gone.jsonl"),
        "evaluate": EvaluateConfig(benchmarks=["runs/r/data/toy.jsonl", "math500", str(elsewhere / "x.jsonl")]),
    }
    write_recipe(run / "config.toml", configs)
    for here, above in ((tmp_path, "work/"), (tmp_path / "work", ""), (elsewhere, "../work/")):
        monkeypatch.chdir(here)
        tables = recipe_of(f"{above}runs/r/final")
        assert tables["evaluate"]["benchmarks"] == [
            f"{above}runs/r/data/toy.jsonl",
            "math500",
            str(elsewhere / "x.jsonl"),
        ]
        assert (tables["redi"]["watch"], tables["redi"]["data"]) == (f"{above}files/watch.jsonl", "gone.jsonl")
    # A run that was moved has its data in the new place.
    shutil.copytree(run, elsewhere / "moved")
    assert recipe_of("moved/final")["evaluate"]["benchmarks"][0] == "moved/data/toy.jsonl"
