"""bench.device: a row for every part, whatever becomes of it, and a table that is there after each."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import device

STEPS = {"kind": "steps", "size": "toy pairs", "method": "nanoredi", "attention": "FlashAttention 2"}


@pytest.mark.parametrize(
    "code, row",
    [
        ("print('{\"seconds\": 2.0}')", {"seconds": 2.0}),
        ("raise MemoryError('all of it')", {"note": "MemoryError: all of it"}),
        ("import time; time.sleep(60)", {"note": "ended after 1 s"}),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {"note": "killed"}),
    ],
)
def test_a_part_ends_in_a_row(code, row, monkeypatch):
    run = device.in_time
    monkeypatch.setattr(device, "in_time", lambda command, limit: run([sys.executable, "-c", code], min(limit, 1.0)))
    monkeypatch.setattr(device, "PART_TAKES", 1)
    got = device.row_of(STEPS, "", True, 1000.0)
    assert got.pop("took") < 10
    assert got == {**STEPS, **row}


def test_a_part_for_which_no_time_is_left_is_a_row():
    assert device.row_of(STEPS, "", True, -1.0) == {**STEPS, "note": "no time was left"}


def test_the_tables_hold_every_row(tmp_path):
    done = {"seconds": 2.0, "floor": 1.0, "tokens": 4_000, "bytes": 3e9}
    rows = [{**STEPS, **done}, {**STEPS, "attention": "FlashAttention 3", "note": "no | such module"}]
    device.write(tmp_path, {"device": "H100", "torch": "2.13"}, rows)
    assert json.loads((tmp_path / "device.json").read_text())["rows"] == rows
    first, second = (tmp_path / "device.md").read_text().splitlines()[-2:]
    assert first == "| steps | toy pairs | nanoredi | 2 | 2,000 | 1 | 50% | 3.00 |  |"
    assert second == "| steps | toy pairs | nanoredi, FlashAttention 3 |  |  |  |  |  | no / such module |"


def test_what_matters_most_comes_first():
    kinds = [(part["kind"], "nanoredi" in part.get("method", "")) for part in device.parts(dry=False)]
    assert kinds[0] == ("tests", False) and kinds[1:] == sorted(kinds[1:], key=lambda kind: not kind[1])


@pytest.mark.slow
def test_all_of_it_runs_dry(tmp_path):
    command = [sys.executable, "-m", "bench.device", "--dry", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "device.json").read_text())["rows"]
    own = [row for row in rows if "nanoredi" in row.get("method", "") and row["attention"] == "FlashAttention 2"]
    assert {row["kind"] for row in own} == {"kernels", "steps", "sampling"}
    assert all("seconds" in row for row in own), own
