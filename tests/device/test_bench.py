"""bench.device: a row for every part, whether or not it succeeds, and a table that is written after each."""

import importlib.metadata
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import ended

from bench import device
from nanoredi.cuda.graphs import Graphs

STEPS = {"kind": "steps", "size": "toy pairs", "method": "nanoredi", "attention": "FlashAttention-2"}


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch):
    """As it was, after a part that chose one for its process."""
    monkeypatch.setattr(device.attention, "flash_attention", device.attention.flash_attention)


@pytest.mark.parametrize(
    "code, row",
    [
        ("print('{\"seconds\": 2.0}')", {"seconds": 2.0}),
        ("print('{\"seconds\": 2.0}\\n(EngineCore) stopped')", {"seconds": 2.0}),
        ("raise MemoryError('all of it')", {"note": "MemoryError: all of it"}),
        (
            "raise RuntimeError('CUDA error: lost\\nCompile with TORCH_USE_CUDA_DSA')",
            {"note": "RuntimeError: CUDA error: lost"},
        ),
        ("import sys; sys.exit('error: no such model')", {"note": "error: no such model"}),
        ("import time; time.sleep(60)", {"note": "ended after 1 s"}),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {"note": "killed"}),
    ],
)
def test_a_part_ends_in_a_row(code, row, monkeypatch, tmp_path):
    run = device.in_time
    monkeypatch.setattr(device, "in_time", lambda command, limit: run([sys.executable, "-c", code], limit))
    monkeypatch.setattr(device, "PART_TAKES", 0.8)
    (tmp_path / "model").mkdir()
    got = device.row_of(STEPS, tmp_path / "model", False, 1000.0)
    assert got.pop("took") < 10
    assert got == {**STEPS, **row}
    errors = tmp_path / "errors.txt"  # all that a part said that did not come to figures
    assert errors.exists() == ("note" in row) and (not errors.exists() or json.dumps(STEPS) in errors.read_text())


def test_a_part_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "ON_GPU", True)  # there it is one, dry or not
    part = next(part for part in device.parts(dry=True) if part["kind"] == "kernels")
    row = device.row_of(part, tmp_path / "model", True, 1000.0)
    assert row["tokens"] == 200 and row["seconds"] > 0 and row["floor"] > 0, row


def test_a_part_that_fails_or_has_no_time_left_is_a_row(tmp_path):
    assert device.row_of(STEPS, tmp_path / "model", True, -1.0) == {**STEPS, "note": "no time was left"}
    part = {"kind": "sampling", "size": "toy", "method": "no such", "attention": "FlashAttention-2"}
    assert device.row_of(part, tmp_path / "model", True, 1000.0)["note"] == "KeyError: 'no such'"
    (tmp_path / "file").touch()
    assert device.row_of(part, tmp_path / "file" / "model", True, 1000.0)["note"].startswith("UserError: ")


def test_what_is_not_installed_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_is_installed", lambda package: package == "torch")
    monkeypatch.setattr(device, "in_time", None)
    for part, package in (
        ({"kind": "sampling", "method": "vllm", "attention": "FlashAttention-2"}, "vllm"),
        ({**STEPS, "attention": "FlashAttention-3"}, "flash-attn-3"),
    ):
        note = f"{package} is not installed"
        assert device.row_of(part, tmp_path / "model", False, 1000.0) == {**part, "note": note}


@pytest.mark.parametrize("wanted", device.ATTENTION)
def test_a_row_s_flash_attention_is_the_one_that_it_names(wanted, tmp_path, monkeypatch):
    """nanoredi uses FlashAttention-3 if it is installed; if it cannot be loaded, there is no row for it."""
    said = []
    monkeypatch.setattr(device.attention, "flash_attention", lambda: "FlashAttention-3")
    monkeypatch.setattr(device.train_step, "measure", lambda *_: said.append(device.attention.flash_attention()))
    with pytest.raises(TypeError):  # no figures
        device.measured({**STEPS, "size": "toy, mixed pairs", "attention": wanted}, "", True)
    assert said == [wanted]
    monkeypatch.setattr(device.attention, "flash_attention", lambda: "FlashAttention-2, since 3 cannot be loaded")
    with pytest.raises(RuntimeError, match="since 3 cannot be loaded"):
        device.measured({**STEPS, "attention": "FlashAttention-3"}, "", True)


def test_the_floor_is_that_of_the_tokens_that_were_sampled(monkeypatch):
    """transformers' `generate` is timed on some of the prompts."""
    size = device.sizes(dry=True)["sampling"]
    number = sum(request.max_tokens for request in device.sampler.requests_of(size))
    monkeypatch.setattr(device, "allowance", lambda *_: 6.0)
    monkeypatch.setattr(device.sampler, "measure", lambda *_: {"tokens": number / 3, "seconds": 4.0, "bytes": 1})
    part = {"kind": "sampling", "size": "toy", "method": "any", "attention": "FlashAttention-2"}
    assert device.measured(part, "", True)["floor"] == pytest.approx(2.0)


def test_tests_that_take_too_long_leave_what_they_said(tmp_path, monkeypatch):
    code = "import time; print('1 failed', flush=True); time.sleep(60)"
    run = device.in_time
    monkeypatch.setattr(device, "in_time", lambda command, limit: run([sys.executable, "-c", code], limit))
    monkeypatch.setattr(device, "TESTS_TAKE", 0.8)
    row = device.row_of({"kind": "tests"}, tmp_path / "model", False, 1000.0)
    assert row["note"] == "ended after 1 s: 1 failed"
    # What was under way is said, too: they are ended as by Ctrl-C.
    assert re.match("1 failed\n(.|\n)*KeyboardInterrupt", (tmp_path / "tests.txt").read_text())


def test_tests_that_cannot_begin_say_why(tmp_path, monkeypatch):
    run = device.in_time
    monkeypatch.setattr(device, "in_time", lambda command, limit: run([sys.executable, "-m", "no_pytest"], limit))
    row = device.row_of({"kind": "tests"}, tmp_path / "model", False, 1000.0)
    assert row["note"].endswith("No module named no_pytest")


@pytest.mark.parametrize("full_size, expected", [(True, 1), (False, 11)])
def test_no_graph_is_left_to_be_captured_while_it_is_timed(full_size, expected, monkeypatch):
    def capture(self, num_rows, _):
        static = torch.zeros(2, num_rows, dtype=torch.int64)
        return SimpleNamespace(replay=lambda: None), static, None

    monkeypatch.setattr(Graphs, "_capture", capture)
    graphs = Graphs(torch.zeros(2), None, (100, 16, 256), full_size)
    device.sampler.capture_all(graphs, 2_848)
    rows = {len(graphs.padded(np.zeros(n, dtype=np.int64))) for n in range(1, 101)}
    assert graphs.captured.keys() == {(n, graphs.columns(m)) for n in rows for m in range(1, 2_849)}
    assert len(rows) == expected and len(graphs.captured) == 3 * expected


def test_the_tables_hold_every_row(tmp_path):
    done = {"seconds": 2.0, "floor": 1.0, "tokens": 4_000, "bytes": 3e9}
    rows = [{**STEPS, **done}, {**STEPS, "attention": "FlashAttention-3", "note": "no | such module"}]
    device.write(tmp_path, {"device": "H100", "torch": "2.13"}, rows)
    assert json.loads((tmp_path / "device.json").read_text())["rows"] == rows
    first, second = (tmp_path / "device.md").read_text().splitlines()[-2:]
    assert first == "| steps | toy pairs | nanoredi | 2 | 2,000 | 1 | 50% | 3.00 |  |"
    assert second == "| steps | toy pairs | nanoredi, FlashAttention-3 |  |  |  |  |  | no / such module |"


def test_what_matters_most_comes_first():
    kinds = [(part["kind"], "nanoredi" in part.get("method", "")) for part in device.parts(dry=False)]
    assert kinds[0] == ("tests", False) and kinds[1:] == sorted(kinds[1:], key=lambda kind: not kind[1])


def test_the_version_of_a_peer_stands_in_its_row(tmp_path):
    part = {"kind": "kernels", "size": [1, 2, 3, "float32"], "method": "torch linear_cross_entropy"}
    row = device.row_of(part, tmp_path / "model", True, -1.0)
    version = importlib.metadata.version("torch")  # torch's own word may have the CUDA that it was built for, too
    assert row["version"] == f"torch {version}"
    assert f"| torch linear_cross_entropy (torch {version}) |" in device.markdown({}, [row])


def test_all_of_it_runs_dry(forks, tmp_path):
    done = ended(forks.start(tmp_path, "bench/device.py", "--dry", "--out", "out"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/device.json").read_text())["rows"]
    # A GPU would have another way of sampling; forks have none.
    parts = [part for part in json.loads(json.dumps(device.parts(dry=True))) if "batch" not in part.get("method", "")]
    assert all(part.items() <= row.items() for row, part in zip(rows, parts, strict=True))
    assert "passed" in rows[0]["note"] and "passed" in (tmp_path / "out/tests.txt").read_text()
    own = [row for row in rows if "nanoredi" in row.get("method", "") and row["attention"] == "FlashAttention-2"]
    assert {row["kind"] for row in own} == {"kernels", "steps", "sampling"}
    assert all("seconds" in row for row in own), own
    # What is not installed says so.
    assert all("seconds" in row or re.search("Error|is not installed", row["note"]) for row in rows[1:]), rows
    assert (tmp_path / "out/device.md").read_text().count("\n| ") == 2 + len(rows) == done.stdout.count("\n") + 2
