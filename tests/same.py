"""Compare runs that must be equal: bit for bit on a CPU; a GPU's attention adds its gradients in no fixed order."""

import json
from pathlib import Path

import torch
from conftest import DEVICE
from safetensors.torch import load_file

CLOCK = ("tokens_per_s", "peak_memory_gb", "matrix_share")
TOLERANCE = 0.0 if DEVICE.type == "cpu" else 1e-4


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a: Path, b: Path, tolerance: float = TOLERANCE) -> None:
    """Compare the final models of two runs."""
    one, other = (load_file(run / "final" / "model.safetensors") for run in (a, b))
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_same_run(a: Path, b: Path, tolerance: float = TOLERANCE) -> None:
    """Compare also the metrics of all steps, except times and memory."""
    for one, other in zip(steps_of(a), steps_of(b), strict=True):
        assert one.keys() == other.keys()
        figures = (
            [torch.tensor(value or 0.0) for name, value in row.items() if name not in CLOCK] for row in (one, other)
        )
        torch.testing.assert_close(*figures, rtol=tolerance, atol=tolerance)
    assert_same_weights(a, b, tolerance)
