"""The benchmark that other engines' completions answer."""

import json

import pytest
from completions import PROBLEMS

from nanoredi.data.benchmarks import Benchmark, load


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in PROBLEMS))
    return load(str(path), "")
