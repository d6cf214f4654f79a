"""An evaluation's samples on disk: whole lines, a torn one cut off, another evaluation refused, only the missing made."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT

from nanoredi.benchmarks import load
from nanoredi.config import EvaluateConfig
from nanoredi.errors import UserError
from nanoredi.samples import Samples

CONFIG = EvaluateConfig(n=3, max_tokens=10)


@pytest.fixture
def claimed(tmp_path, toy_data):
    samples = Samples(tmp_path)
    samples.claim({"SFT": toy_data / "model"}, [load(str(toy_data / "toy.jsonl"), "", 4)], CONFIG)
    return samples


def test_a_torn_last_line_is_cut_off(claimed, toy_data):
    whole = "".join(json.dumps({"n": n, "response": "é" * 50_000}) + "\n" for n in range(3))
    for torn in ("", '{"n": 3', '{"n": 3, "response": "' + "é" * 80_000):
        claimed.path.write_bytes((whole + torn).encode()[: -1 if torn.endswith("é") else None])
        claimed.claim({"SFT": toy_data / "model"}, [load(str(toy_data / "toy.jsonl"), "", 4)], CONFIG)
        assert claimed.path.read_text() == whole
        assert list(claimed.rows()) == [{"n": 0}, {"n": 1}, {"n": 2}]
    claimed.path.write_text('{"n"')
    claimed.claim({"SFT": toy_data / "model"}, [load(str(toy_data / "toy.jsonl"), "", 4)], CONFIG)
    assert claimed.path.read_text() == ""
    claimed.append({"response": "half a pair \ud83d"})
    assert len(list(claimed.rows())) == 1


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


def test_another_model_or_benchmark_is_refused(claimed, toy_data, tmp_path):
    model, tests = toy_data / "model", [load(str(toy_data / "toy.jsonl"), "", 4)]
    with pytest.raises(UserError, match="the benchmark toy has changed since"):
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
    with pytest.raises(UserError, match="no evaluation.json that says of what"):
        claimed.claim({"SFT": model}, tests, CONFIG)


def test_a_killed_evaluation_goes_on_to_the_same_samples(run, tmp_path, toy_data):
    """Two ranks, killed in the middle; then one rank does what is missing. The samples are those of one start."""
    words = ["evaluate.py", "--model", str(toy_data / "model"), "--benchmarks", str(toy_data / "toy.jsonl")]
    words += "--n 5 --max_tokens 60 --batch_size 2 --dtype float32 --seed 3 --think own".split()
    whole = run(*words, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [str(ROOT / words[0]), *words[1:], "--out", "broken"]
    killed = subprocess.Popen(
        [*launcher, *script], cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    path, deadline = tmp_path / "broken" / "samples.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") >= 3):
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = path.read_text()
    assert 3 <= before.count("\n") < 30
    path.write_text(before + '{"model": "half a li')
    done = run(*words, "--out", "broken", "--batch_size", "7")
    assert done.returncode == 0, done.stderr
    assert f"{before.count(chr(10))} samples are there" in done.stdout
    assert path.read_text().startswith(before)
    rows = [sorted(map(json.loads, (tmp_path / out / "samples.jsonl").open()), key=lambda r: (r["problem"], r["sample"]))
            for out in ("whole", "broken")]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 30
    assert (tmp_path / "whole/results.json").read_text() == (tmp_path / "broken/results.json").read_text()
    said = run(*words, "--out", "broken", "--n", "6")
    assert said.returncode == 2 and "the setting n is 5 there and 6 here" in said.stderr
