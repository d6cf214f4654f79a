"""The benches run at small sizes, so that every figure can be measured again; their output is checked only roughly."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from bench import kernels

COMMANDS = [
    "kernels.py --n 200 --d 32 --v 512 --rounds 1 --times 1",
    "kernels.py --chunks --n 3000 --d 32 --v 4096 --times 1",
    "train_step.py --pairs 1 --steps 1 --rounds 1 --dtypes float32",
    "sampler.py --prompts 1 --generate_prompts 1 --methods nanoredi --dtypes float32",
    "packing.py",
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bench_ends_with_a_table(command):
    script, *flags = command.split()
    run = subprocess.run([sys.executable, f"bench/{script}", *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [row for row in run.stdout.splitlines() if row.startswith("|")][2:]
    ours = rows if "--chunks" in flags else [row for row in rows if "nanoredi" in row]
    assert ours, run.stdout
    assert not any("Error" in row or "failed" in row for row in ours), run.stdout


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the bench reads its memory from Linux's /proc")
def test_the_kernels_methods_are_measured():
    size = (300, 32, 512, "float32")
    assert all(seconds > 0 for seconds in kernels.products(size, 1).values())
    for method in ("nanoredi weighted_cross_entropy", "nanoredi linear_logprob", "log_softmax over full logits"):
        figures = kernels.measure(method, size, 1, True)
        assert figures["seconds"][0] > 0 and figures["error_hidden"] < 1e-5 and figures["error_head"] < 1e-5
