"""The files of an evaluation by mutation: the same command ends with a whole table, or in one sentence; so do the reports."""

import random
import shutil
from pathlib import Path

import pytest
from mutation import break_file, end, limits, snapshot

import evaluate
import sample
import train_redi
from nanoredi.report import __main__ as report

EVALUATE = """--model model other --benchmarks toy.jsonl toy2.jsonl --n 2 --limit 2 --max_tokens 2 --think own --dtype float32
    --out out""".split()
SAMPLE = "--model model --prompts prompts.jsonl --n 2 --max_tokens 2 --dtype float32 --out out/drawn.jsonl".split()
TRAIN = """--model model --data pairs.jsonl --max_steps 2 --batch_size 1 --dtype float32 --cache cache --out run --evaluate
    --evaluate.benchmarks toy.jsonl --evaluate.limit 2 --evaluate.n 2 --evaluate.max_tokens 2 --evaluate.think own
    --evaluate.dtype float32""".split()
COMMANDS = {
    "out": {
        "evaluate": (evaluate, EVALUATE),
        "sample": (sample, SAMPLE),
        "report": (report, ["out", "--paper"]),
        "failures": (report, ["--failures", "out"]),
        "completions": (evaluate, ["--completions", "out/samples.jsonl", "--out", "graded"]),
    },
    "run": {
        "train_redi": (train_redi, TRAIN),
        "report of a run": (report, ["run", "out"]),
        "failures of a run": (report, ["--failures", "run"]),
    },
}
GOES_ON = ("evaluate", "sample", "train_redi")
KINDS = (".json", ".jsonl", ".toml")
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
    """Two models, two benchmarks and prompts; out/ holds their evaluation and samples, run/ a run of stage 2."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        shutil.copytree(toy_data / "model", name)
    for name in ("toy", "toy2", "prompts", "pairs"):
        lines = (toy_data / f"{name.removesuffix('2')}.jsonl").read_text().splitlines(keepends=True)
        Path(f"{name}.jsonl").write_text("".join(lines[:2]))
    evaluate.main(EVALUATE)
    sample.main(SAMPLE)
    train_redi.main(TRAIN)
    return tmp_path


def test_a_mutated_evaluation_is_read_or_ends_in_a_sentence(share, folder, capsys):
    rng, ends = random.Random(0), {name: [] for commands in COMMANDS.values() for name in commands}
    given = {path: content for path, content in snapshot(folder).items() if "/out/" not in path and "/run/" not in path}
    files = [path for place in COMMANDS for path in sorted(Path(place).iterdir()) if path.suffix in KINDS]
    for number in range(share * 24):
        path = files[number % len(files)]
        for place in COMMANDS:
            shutil.copytree(place, f"whole-{place}")
        break_file(path, rng, NAMES)
        for command, (module, argv) in COMMANDS[path.parent.name].items():
            if command in GOES_ON and rng.random() < 0.5:
                continue  # else the others would see nothing but what these have mended
            more = ["--out", "figure.png"] if command.startswith("report") and rng.random() < 0.02 else []
            try:
                with limits():
                    ends[command].append(end(lambda: module.main([*argv, *more])))
            except BaseException as error:
                error.add_note(f"{command} {number}: {path} {path.read_bytes()[:1500]}")
                raise
        capsys.readouterr()
        assert given.items() <= snapshot(folder).items(), f"{number}: a file was changed"
        for place in COMMANDS:
            shutil.rmtree(place)
            Path(f"whole-{place}").rename(place)
        shutil.rmtree("graded", ignore_errors=True)
        Path("figure.png").unlink(missing_ok=True)
    for command, texts in ends.items():
        print(f"{command}: {len(texts)} tried, {sum(map(bool, texts))} ended in a sentence")
    assert all(not all(texts) for texts in ends.values()) and any(any(texts) for texts in ends.values())
