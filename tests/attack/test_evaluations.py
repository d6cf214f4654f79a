"""The files of an evaluation by mutation: the same command ends with a whole table, or in one sentence; so do the reports."""

import json
import random
import shutil
from pathlib import Path

import pytest
from mutation import break_file, end, limits, snapshot

import evaluate
import sample
import train_redi
from nanoredi.common.flags import write_recipe
from nanoredi.config import EvaluateConfig, RediConfig
from nanoredi.report import __main__ as report

EVALUATE = """--model model other --benchmarks toy.jsonl toy2.jsonl --n 2 --limit 2 --max_tokens 2 --think own --dtype float32
    --out out""".split()
SAMPLE = "--model model --prompts prompts.jsonl --n 2 --max_tokens 2 --dtype float32 --out out/drawn.jsonl".split()
COMMANDS = {
    "evaluate": (evaluate, EVALUATE),
    "sample": (sample, SAMPLE),
    "report": (report, ["out", "--paper"]),
    "failures": (report, ["--failures", "out"]),
    "completions": (evaluate, ["--completions", "out/samples.jsonl", "--out", "graded"]),
    "train_redi": (train_redi, ["--model", "model", "--data", "pairs.jsonl", "--out", "out", "--evaluate"]),
}
NAMES = (
    "model",
    "benchmark",
    "problem",
    "sample",
    "correct",
    "tokens",
    "setting",
    "pass@1",
    "pass@16",
    "sem",
    "n",
    "step",
)


@pytest.fixture
def folder(tmp_path, toy_data, hasty, monkeypatch) -> Path:
    """Two models, two benchmarks and prompts; out/ holds their evaluation, and what train_redi leaves of a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        shutil.copytree(toy_data / "model", name)
    for name in ("toy", "toy2", "prompts", "pairs"):
        lines = (toy_data / f"{name.removesuffix('2')}.jsonl").read_text().splitlines(keepends=True)
        Path(f"{name}.jsonl").write_text("".join(lines[:2]))
    evaluate.main(EVALUATE)
    sample.main(SAMPLE)
    shutil.copytree("model", "out/final")
    rows = [{"step": step, "loss": 0.5, "chosen_logp": -1.5, "update_norm": 1.0} for step in (1, 2)]
    Path("out/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RediConfig(model="model", data="pairs.jsonl", out="out", evaluate=True, cache="cache")
    write_recipe(Path("out/config.toml"), {"redi": config, "evaluate": EvaluateConfig(benchmarks=["toy.jsonl"])})
    return tmp_path


def test_a_mutated_evaluation_is_read_or_ends_in_a_sentence(share, folder, capsys, monkeypatch):
    rng, ends = random.Random(0), {name: [] for name in COMMANDS}
    given = {path: content for path, content in snapshot(folder).items() if "/out/" not in path}
    files = [path.name for path in sorted(Path("out").iterdir()) if path.is_file() and path.name != ".lock"]
    for number in range(share * 24):
        name = files[number % len(files)]
        whole = Path("out", name).read_bytes()
        Path("whole").mkdir()
        shutil.copytree("out", "whole/out")
        break_file(Path("out", name), rng, NAMES)
        for command, (module, argv) in COMMANDS.items():
            if command in ("evaluate", "sample", "train_redi") and rng.random() < 0.5:
                continue  # else the others would see nothing but what these have mended
            more = ["--out", "figure.png"] if command == "report" and rng.random() < 0.02 else []
            try:
                with limits():
                    ends[command].append(end(lambda: module.main([*argv, *more])))
            except BaseException as error:
                error.add_note(f"{command} {number}: {name} {Path('out', name).read_bytes()[:1500]}, was {whole[:300]}")
                raise
        capsys.readouterr()
        assert given.items() <= snapshot(folder).items(), f"{number}: a file was changed"
        for path in ("out", "graded", "runs", "cache"):
            shutil.rmtree(path, ignore_errors=True)
        Path("whole/out").rename("out")
        Path("whole").rmdir()
        Path("figure.png").unlink(missing_ok=True)
    for command, texts in ends.items():
        print(f"{command}: {len(texts)} tried, {sum(map(bool, texts))} ended in a sentence")
    assert all(any(texts) for texts in ends.values())
