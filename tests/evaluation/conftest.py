"""The benchmarks that other engines' completions answer."""

import json

import pytest
from completions import PROBLEMS

from nanoredi.data.benchmarks import Benchmark, load


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in PROBLEMS))
    return load(str(path), "")


@pytest.fixture
def many(tmp_path):
    """Twelve problems, the answer of each its number."""
    path = tmp_path / "many.jsonl"
    rows = [{"problem": f"Which is number {i:02}?", "answer": i, "id": f"a/{i * i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(str(path), "")
