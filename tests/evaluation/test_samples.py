"""An evaluation's samples on disk: a torn line is removed, another evaluation refused, only what is missing drawn."""

import errno
import fcntl
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from forks import ended

from nanoredi.common.errors import UserError
from nanoredi.config import EvaluateConfig
from nanoredi.data.benchmarks import load
from nanoredi.evaluation.samples import Samples

CONFIG = EvaluateConfig(n=3, max_tokens=10)


@pytest.fixture
def claimed(tmp_path, toy_data):
    samples = Samples(tmp_path)
    samples.claim({"SFT": toy_data / "model"}, [load(str(toy_data / "toy.jsonl"), "", 4)], CONFIG)
    samples.append(row(0))
    return samples


def row(sample: int, **more) -> dict:
    return (
        {"model": "SFT", "benchmark": "toy", "problem": 0, "sample": sample, "correct": False}
        | {"correct_deepscaler": False, "answer": None, "gold": ["1"], "tokens": 3, "finish_reason": "stop", "waits": 0}
        | {"response": "é" * 50_000, **more}
    )


def claim_again(claimed, toy_data):
    claimed.claim({"SFT": toy_data / "model"}, [load(str(toy_data / "toy.jsonl"), "", 4)], CONFIG)


def test_a_torn_last_line_is_cut_off(claimed, toy_data, capsys):
    whole = "".join(json.dumps(row(n)) + "\n" for n in range(3))
    for torn in ("", '{"n": 3', '{"n": 3, "response": "' + "é" * 80_000):
        claimed.path.write_bytes((whole + torn).encode()[: -1 if torn.endswith("é") else None])
        claim_again(claimed, toy_data)
        assert claimed.path.read_text() == whole
        assert [r["sample"] for r in claimed.rows()] == [0, 1, 2]
    claimed.path.write_text('{"n"')
    claim_again(claimed, toy_data)
    assert claimed.path.read_text() == "" and not capsys.readouterr().out
    claimed.append(row(0, response="half a pair \ud83d"))
    assert len(list(claimed.rows())) == 1


@pytest.fixture
def again(claimed, toy_data):
    tests = [load(str(toy_data / "toy.jsonl"), "", 4)]
    return lambda **change: claimed.claim({"SFT": toy_data / "model"}, tests, replace(CONFIG, **change))


def test_an_evaluation_resumes_in_its_dtype_and_old_ones_get_defaults(claimed, again):
    dtype = json.loads(claimed.about.read_text())["setting"]["dtype"]
    assert dtype in ("float32", "bfloat16") and again() == again(dtype=dtype) == dtype
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    with pytest.raises(UserError, match=f"the setting dtype is '{dtype}' there and '{other}' here"):
        again(dtype=other)
    claimed.about.write_text(claimed.about.read_text().replace(f'"{dtype}"', f'"{other}"'))
    assert again() == other  # although auto would choose another on this machine
    about = json.loads(claimed.about.read_text())
    about["setting"]["dtype"] = "auto"
    del about["setting"]["template"], about["setting"]["system"]
    claimed.about.write_text(json.dumps(about))
    assert again() == dtype
    with pytest.raises(UserError, match="the setting template is '' there and 'plain' here"):
        again(template="plain")


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{}", "line 2: the object has no field 'model'"),
        ("\0\0\0", "line 2 is not JSON"),
        (json.dumps(row(1, tokens="3")), "line 2: tokens is '3'"),
        (json.dumps(row(0)), "line 2 holds a second sample of this evaluation"),
        (json.dumps(row(3)), "line 2 holds no sample of this evaluation"),
        (json.dumps(row(1, model="other")), "line 2 holds no sample of this evaluation"),
        (json.dumps(row(1, problem=4)), "line 2 holds no sample of this evaluation"),
    ],
)
def test_a_damaged_row_is_reported_and_dropped(claimed, toy_data, bad, words, capsys):
    claimed.path.write_text(json.dumps(row(0)) + "\n" + bad + "\n" + json.dumps(row(2)) + "\n")
    claim_again(claimed, toy_data)
    assert [r["sample"] for r in claimed.rows()] == [0, 2]
    assert words in capsys.readouterr().out


def test_an_empty_description_is_rewritten_unless_there_are_samples(claimed, toy_data):
    whole = claimed.about.read_text()
    claimed.about.write_text("")
    claimed.path.write_text("")
    claim_again(claimed, toy_data)
    assert claimed.about.read_text() == whole
    claimed.about.write_text("")
    claimed.path.write_text(json.dumps(row(0)) + "\n")
    with pytest.raises(UserError, match="evaluation.json is not JSON"):
        claim_again(claimed, toy_data)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n": 4}, "the setting n is 3 there and 4 here"),
        ({"seed": 1}, "the setting seed is 42 there and 1 here"),
        ({"temperature": 0.0}, "the setting temperature is 0.6 there and 0.0 here"),
        ({"batch_size": 1, "cache_gb": 1.0, "page_size": 16}, None),
    ],
)
def test_another_config_is_refused(claimed, toy_data, change, words):
    def again():
        tests = [load(str(toy_data / "toy.jsonl"), "", 4)]
        claimed.claim({"SFT": toy_data / "model"}, tests, replace(CONFIG, **change))

    if words is None:
        return again()
    with pytest.raises(UserError, match=words):
        again()


def test_a_disk_without_locks_will_do(claimed, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    claimed.append(row(1))
    assert len(list(claimed.rows())) == 2


@pytest.mark.parametrize("end", [Path.unlink, lambda path: path.write_text("")])  # as a full disk leaves it
def test_an_evaluation_that_ended_before_its_first_sample_may_be_followed_by_another(claimed, again, end):
    end(claimed.path)
    results = claimed.path.with_name("results.json")
    results.write_text("[]")  # samples may be deleted to save space; their results must not be overwritten
    with pytest.raises(UserError, match="the setting seed is 42 there and 1 here"):
        again(seed=1)
    results.unlink()
    again(seed=1)
    assert json.loads(claimed.about.read_text())["setting"]["seed"] == 1
    claimed.about.write_text('{"accuracy": 0.5}')  # another program's
    with pytest.raises(UserError, match="evaluation.json: the object has no field 'setting'"):
        again()
    assert claimed.about.read_text() == '{"accuracy": 0.5}'


def test_another_model_or_benchmark_is_refused(claimed, toy_data, tmp_path):
    model, tests = toy_data / "model", [load(str(toy_data / "toy.jsonl"), "", 4)]
    with pytest.raises(UserError, match="the benchmark toy has changed since, or --limit"):
        claimed.claim({"SFT": model}, [load(str(toy_data / "toy.jsonl"), "", 5)], CONFIG)
    with pytest.raises(UserError, match="the model REDI is not part of it and is asked for"):
        claimed.claim({"SFT": model, "REDI": model}, tests, CONFIG)
    with pytest.raises(UserError, match="the model SFT is part of it and is not asked for"):
        claimed.claim({}, tests, CONFIG)
    other = tmp_path / "model"
    other.mkdir()
    for file in model.iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= file.suffix == ".safetensors"  # one weight's last bit
        (other / file.name).write_bytes(data)
    with pytest.raises(UserError, match="the model SFT has changed since"):
        claimed.claim({"SFT": other}, tests, CONFIG)
    claimed.about.unlink()
    claimed.path.write_text("{}\n")
    with pytest.raises(UserError, match="lacks the evaluation.json that describes it"):
        claimed.claim({"SFT": model}, tests, CONFIG)


def test_a_killed_evaluation_resumes_to_the_same_samples(forks, run, tmp_path, toy_data):
    """Two ranks are killed in the middle, and leave half a line; then two ranks under torchrun draw what is missing, in
    other batches. The samples are those of one uninterrupted rank."""
    words = "evaluate.py --n 5 --max_tokens 60 --batch_size 2 --dtype float32 --seed 3 --think own --model MODEL"
    words = [*words.replace("MODEL", str(toy_data / "model")).split(), "--benchmarks", toy_data / "toy.jsonl", "--out"]
    path = tmp_path / "broken/samples.jsonl"
    ranks = forks.start_ranks(2, tmp_path, *words, "broken", NANOREDI_CRASH_AT="12")
    assert ended(*ranks).returncode == -signal.SIGKILL
    before = path.read_text()
    path.write_text(before + '{"model": "half a li')
    rest = run(*words, "broken", "--batch_size", "7", torchrun=["--standalone", "--nproc_per_node=2"])
    undisturbed = run(*words, "whole")
    assert rest.returncode == undisturbed.returncode == 0, rest.stderr + undisturbed.stderr
    whole, broken = ((tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "broken"))
    there = before.count("\n")
    assert 3 <= there < 30 and broken.startswith(before)
    assert f"{there} samples are there, {30 - there} are missing" in rest.stdout
    assert sorted(whole.splitlines()) == sorted(broken.splitlines()) and whole.count("\n") == 30
    assert (tmp_path / "whole/results.json").read_text() == (tmp_path / "broken/results.json").read_text()
