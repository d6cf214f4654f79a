"""The scripts as a user runs them: the main job on a shrunken toy, sampling and evaluation after it, and bad input."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ended
from same import assert_same_weights

import nanoredi
from nanoredi.common.runs import dtype_of_run

ROOT = Path(__file__).parent.parent
SMALL = [
    "--toy.sft_rows",
    "200",
    "--toy.pairs",
    "64",
    "--toy.watch_pairs",
    "8",
    "--toy.heldout",
    "10",
    "--toy.num_layers",
    "1",
    "--toy.hidden_size",
    "32",
    "--sft.epochs",
    "2",
    "--evaluate.n",
    "2",
    "--log_every",
    "1",
]


def said_no(done, *words):
    """One sentence on stderr, exit code 2, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_system_message_that_the_template_refuses_is_named_before_training(run, toy_data, tmp_path):
    flags = ["--data", toy_data / "pairs.jsonl", "--out", "run", "--evaluate", "--evaluate.system", "S"]
    done = run("train_redi.py", "--model", toy_data / "model", *flags, "--evaluate.benchmarks", toy_data / "toy.jsonl")
    said_no(done, "the toy knows the roles user and assistant")
    assert not (tmp_path / "run").exists()


def test_the_main_job_on_a_shrunken_toy(run, tmp_path):
    done = run("train_redi.py", *SMALL)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "toy"
    assert {p.name for p in out.iterdir()} - {".lock"} == {
        "config.toml",
        "data",
        "sft",
        "metrics.jsonl",
        "final",
        "evaluation.json",
        "results.json",
        "samples.jsonl",
    }
    assert "stage 1: saved runs/toy/sft/final" in done.stdout and "stage 2: saved runs/toy/final" in done.stdout
    assert len((out / "sft" / "metrics.jsonl").read_text().splitlines()) == 26
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    results = json.loads((out / "results.json").read_text())
    assert [(row["model"], row["benchmark"]) for row in results] == [("SFT", "toy"), ("REDI", "toy")]
    for row in results:
        assert set(row) == {
            "model",
            "benchmark",
            "problems",
            "n",
            "pass@1",
            "sem",
            "pass@2",
            "pass@1_deepscaler",
            "mean_tokens",
            "no_answer",
            "cut_off",
            "waits_per_response",
            "waits_per_1000_tokens",
            "chosen_logp",
            "rejected_logp",
        }
        assert 0 <= row["pass@1"] <= row["pass@2"] <= 1 and row["chosen_logp"] < 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert (
        len(samples) == 2 * 10 * 2
        and sum(s["correct"] for s in samples if s["model"] == "REDI") / 20 == results[1]["pass@1"]
    )
    table = done.stdout[done.stdout.index("model  benchmark") :]

    # The same command again does nothing and shows the same; another recipe is refused.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    again = run("train_redi.py", *SMALL)
    assert again.returncode == 0 and "finished" in again.stdout and again.stdout.endswith(table)
    said_no(
        run("train_redi.py", *SMALL, "--alpha", "0.5"),
        "runs/toy holds another run",
        "redi.alpha is 0.8 there and 0.5 here",
    )
    said_no(run("train_redi.py"), "runs/toy holds another run")
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}

    # With no arguments the newest model is sampled and evaluated.
    sampled = run("sample.py")
    assert sampled.returncode == 0 and sampled.stdout.startswith(
        "runs/toy/final: 3 samples at temperature 0.6, top-p 0.95"
    )
    assert sampled.stdout.count("--- a=") == 3
    evaluated = run("evaluate.py")
    assert evaluated.returncode == 0, evaluated.stderr
    (folder,) = (tmp_path / "runs" / "evaluate").iterdir()
    (row,) = json.loads((folder / "results.json").read_text())
    assert {**row, "model": "REDI"} == pytest.approx(results[1])

    # A run that lost its final model is completed again, with the same result.
    (tmp_path / "before").mkdir()
    (out / "final").rename(tmp_path / "before" / "final")
    again = run("train_redi.py", *SMALL)
    assert again.returncode == 0, again.stderr
    assert_same_weights(out, tmp_path / "before")
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_sample_writes_rows(run, tmp_path, toy_data):
    prompts = [{"prompt": "a=1b+2", "id": 7}, {"messages": [{"role": "user", "content": "a=1b+2c+3"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    flags = [
        "--model",
        toy_data / "model",
        "--prompts",
        "prompts.jsonl",
        "--n",
        "2",
        "--max_tokens",
        "9",
        "--out",
        "samples.jsonl",
    ]
    done = run("sample.py", *flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        given = {k: row.pop(k) for k in ("prompt", "messages", "id") if k in row}
        assert given in prompts
        assert set(row) == {"completion", "finish_reason", "tokens", "sample"} and row["finish_reason"] in (
            "stop",
            "length",
        )
        assert row["tokens"] <= 9 and isinstance(row["tokens"], int)
    assert sorted(row["sample"] for row in rows) == [0, 0, 1, 1]


def test_stage_1_alone(run, tmp_path):
    done = run(
        "train_sft.py",
        "--toy.sft_rows",
        "100",
        "--toy.pairs",
        "10",
        "--toy.watch_pairs",
        "4",
        "--toy.hidden_size",
        "16",
        "--max_steps",
        "2",
        "--dtype",
        "auto",
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/toy-sft/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rejected_logp"] is None and row["loss"] == -row["chosen_logp"] for row in rows)
    assert (tmp_path / "runs/toy-sft/final/tokenizer.json").exists()
    assert dtype_of_run(str(tmp_path / "runs/toy-sft"), "sft") in ("float32", "bfloat16")  # what auto resolved to


BAD_INPUT = [
    ("train_redi.py", ["--alhpa", "1"], ["there is no flag --alhpa", "--alpha"]),
    ("train_redi.py", ["--recipe", "nowhere.toml"], ["there is no recipe nowhere.toml"]),
    ("train_redi.py", ["--data", "pairs.jsonl"], ["--data has no effect on the toy"]),
    (
        "train_redi.py",
        ["--model", "nowhere", "--data", "x.jsonl", "--out", "o"],
        ["there is no folder nowhere; give the one that holds the model's config.json"],
    ),
    (
        "train_redi.py",
        ["--model", "MODEL", "--data", "broken.jsonl", "--out", "o"],
        ["broken.jsonl, line 2 is not JSON"],
    ),
    ("train_redi.py", ["--model", "MODEL", "--data", "empty.jsonl", "--out", "o"], ["empty.jsonl holds no rows"]),
    ("train_redi.py", ["--model", "MODEL", "--data", "broken.jsonl"], ["--out"]),
    ("train_redi.py", ["--out", "full"], ["full is not an empty folder and holds no nanoredi run"]),
    ("train_redi.py", ["--out", "gone"], ["gone is not an empty folder and holds no nanoredi run"]),
    ("train_redi.py", ["--watch", "x.jsonl"], ["--watch has no effect on the toy", "give --model DIR"]),
    ("train_redi.py", ["--evaluate.benchmarks", "x.jsonl"], ["--evaluate.benchmarks has no effect on the toy"]),
    ("train_redi.py", ["--sft.seed", "3"], ["--sft.seed has no effect on the toy"]),
    ("train_redi.py", ["--model", "MODEL", "--sft.seed", "3"], ["--sft.seed has no effect with --model"]),
    ("train_redi.py", ["--model", "MODEL", "--sft.lr", "1"], ["--sft.lr has no effect with --model"]),
    ("train_sft.py", ["--model", "MODEL", "--toy.pairs", "1"], ["--toy.pairs has no effect with --model"]),
    ("train_redi.py", ["--model", "MODEL", "--watch_every", "1"], ["--watch_every needs the pairs", "--watch FILE"]),
    ("train_sft.py", ["--alpha", "1"], ["there is no flag --alpha"]),
    ("train_sft.py", ["--epochs", "many"], ["--epochs takes a whole number, not 'many'"]),
    ("sample.py", [], ["there is no model under runs/ yet"]),
    ("sample.py", ["--model", "MODEL"], ["give a prompt, --prompts FILE or --chat"]),
    ("sample.py", ["--model", "Qwen/Qwen2-7B", "Hi"], ["hf download Qwen/Qwen2-7B"]),
    ("sample.py", ["--model", "MODEL", "--prompt", "xyz"], ["cannot encode"]),
    ("sample.py", ["--model", "MODEL", "--prompt", "a" * 300], ["fills the context of 256"]),
    ("sample.py", ["--model", "MODEL", "--prompts", "broken.jsonl"], ["broken.jsonl, line 2 is not JSON"]),
    ("evaluate.py", ["--model", "MODEL", "--benchmarks", "math50"], ["math50", "math500"]),
    (
        "evaluate.py",
        ["--model", "MODEL", "--benchmarks", "math500", "--data", "full"],
        ["full holds no file math500 that ends in"],
    ),
    ("evaluate.py", ["--model", "MODEL", "--benchmarks", "one.jsonl", "--out", "full"], ["full is not empty"]),
    ("evaluate.py", ["--completions", "x.jsonl", "--model", "MODEL"], ["--model has no effect on --completions"]),
    ("evaluate.py", ["--completions", "x.jsonl", "--data", "d"], ["--data has no effect without --benchmarks"]),
    ("evaluate.py", ["--completions", "broken.jsonl"], ["broken.jsonl, line 1 is in no known layout"]),
    ("nanoredi/report/__main__.py", ["--failures", "full"], ["cannot read full/samples.jsonl"]),
    (
        "nanoredi/report/__main__.py",
        ["--failures", "full", "--only", "wrnog"],
        ["--only takes wrong or cut_off or no_answer"],
    ),
]


@pytest.fixture(scope="module")
def outcomes(forks, toy_data, tmp_path_factory):
    """The result of each bad input, and the folder it ran in."""
    jobs = []
    for script, flags, _ in BAD_INPUT:
        folder = tmp_path_factory.mktemp("bad")
        (folder / "broken.jsonl").write_text('{"prompt": "a=1", "chosen": "1", "rejected": "2"}\n{"prompt"\n')
        (folder / "empty.jsonl").write_text("")
        (folder / "one.jsonl").write_text('{"problem": "a=1", "answer": "1"}\n')
        (folder / "full").mkdir()
        (folder / "full" / "thesis.txt").write_text("mine")
        (folder / "gone").symlink_to("nowhere")
        words = [toy_data / "model" if flag == "MODEL" else flag for flag in flags]
        jobs.append((folder, ended(forks.start(folder, script, *words))))
    return jobs


@pytest.mark.parametrize("case", range(len(BAD_INPUT)), ids=lambda i: " ".join(BAD_INPUT[i][1])[:40] or "no flags")
def test_bad_input_ends_with_one_sentence(outcomes, case):
    folder, done = outcomes[case]
    # A note on tokenising progress may precede the sentence.
    done.stderr = "\n".join(line.split("\r")[-1] for line in done.stderr.splitlines())
    said_no(done, *BAD_INPUT[case][2])
    assert (folder / "full" / "thesis.txt").read_text() == "mine"


def test_bad_input_without_the_fork_server(tmp_path):
    """In a process that Python itself starts and ends."""
    command, environment = [sys.executable, str(ROOT / "sample.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said_no(done, "there is no model under runs/ yet")


def test_two_ranks_print_one_error(run):
    done = run("train_redi.py", "--alhpa", "1", torchrun=["--standalone", "--nproc_per_node=2"])
    assert done.returncode != 0
    assert done.stderr.count("error: there is no flag --alhpa (did you mean '--alpha'?)") == 1


def test_ctrl_c_leaves_whole_rows(forks, tmp_path, toy_data):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a=1b+2"}\n')
    flags = ["--model", toy_data / "model", "--prompts", "prompts.jsonl", "--out", "samples.jsonl"]
    flags += "--n 3000 --batch_size 8 --max_tokens 40".split()
    job = forks.start(tmp_path, "sample.py", *flags, OMP_NUM_THREADS="1")
    path = tmp_path / "samples.jsonl"
    job.wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 5)
    job.kill(signal.SIGINT)
    assert ended(job).returncode == 130
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert 5 <= len(rows) < 3000 and path.read_text().endswith("\n")
    assert (
        job.stdout.splitlines()[-1]
        == f"samples.jsonl: {len(rows)} of 3000 completions, then interrupted; the same command resumes"
    )


def test_an_older_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    with pytest.raises(SystemExit, match="error: nanoredi runs on Python 3.11 and newer; this is Python "):
        importlib.reload(nanoredi)


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="error: nanoredi runs on Linux and macOS; on Windows"):
        importlib.reload(nanoredi)
