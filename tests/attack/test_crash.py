"""Killed at any write or rename, the same command ends with the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FLAGS = """--cache OUT/cache --sft.cache OUT/cache --toy.sft_rows 12 --toy.pairs 4 --toy.watch_pairs 1 --toy.heldout 1
    --toy.num_layers 1 --toy.hidden_size 16 --batch_size 4 --sft.batch_size 6 --sft.epochs 1 --epochs 2 --evaluate.n 2
    --evaluate.max_tokens 4 --dtype float32 --sft.dtype float32 --evaluate.dtype float32 --save_every 1
    --sft.save_every 1 --log_every 1 --sft.log_every 1""".split()
CLOCK = ("tokens_per_s", "peak_memory_gb", "matrix_share")


def contents(folder: Path) -> dict[str, object]:
    """{file: content} of a run, less what tells the time, the process or the folder's own name."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "config.toml")):
        name = str(path.relative_to(folder))
        if name.startswith("cache/digests"):
            continue
        if path.name in ("metrics.jsonl", "samples.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = sorted(json.dumps({k: v for k, v in row.items() if k not in CLOCK}) for row in rows)
        else:
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_write_a_run_ends_with_the_same_bytes(stride, tmp_path):
    """Stage 1, stage 2 and the evaluation of the toy."""
    command = [sys.executable, str(ROOT / "tests/attack/crash.py"), "train_redi", ".", str(stride), "--out", "OUT"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *FLAGS], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = contents(tmp_path / "whole")
    assert {"final/model.safetensors", "sft/final/model.safetensors", "results.json", "samples.jsonl"} <= whole.keys()
    killed = [folder for folder in tmp_path.iterdir() if folder.name.isdigit()]
    assert len(killed) >= 40 // stride
    for folder in killed:
        assert contents(folder) == whole, f"killed at place {folder.name}"
