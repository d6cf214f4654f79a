"""Flags by each field's declared type and range, valid and not, one or two at a time: the command does its work, or ends in
one sentence."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from mutation import TooLong, end, limits, snapshot

import evaluate
import sample
import train_redi
import train_sft
from nanoredi import prepare
from nanoredi.common.flags import TABLES, kind_of
from nanoredi.config import RediConfig, SftConfig
from nanoredi.report import __main__ as report

# The command, the dataclass of its own flags, the tables whose flags have a name in front, flags that make it small.
SMALL = "--model model --max_steps 1 --batch_size 2 --dtype float32 --out out --cache cache"
DRAWN = "--model model --max_tokens 1 --dtype float32 --batch_size 2 --cache_gb 0.001"
COMMANDS: dict[str, tuple[Any, type, tuple[str, ...], str]] = {
    "train_sft": (train_sft, SftConfig, ("evaluate", "toy"), f"{SMALL} --data sft.jsonl"),
    "train_redi": (train_redi, RediConfig, ("evaluate", "sft", "toy"), f"{SMALL} --data pairs.jsonl"),
    "sample": (sample, sample.SampleFlags, (), f"{DRAWN} --prompts prompts.jsonl"),
    "evaluate": (evaluate, evaluate.EvaluateFlags, (), f"{DRAWN} --benchmarks toy.jsonl --n 1 --think own --out out"),
    "prepare": (prepare, prepare.PrepareFlags, (), "--raw prompts.jsonl --tokenizer model --out out --grade"),
    "report": (report, report.ReportFlags, (), "--runs run"),
}
WORK = {"--n", "--epochs", "--max_steps"}  # of which one may ask for as much as one likes
ROWS = {"sft": 4, "pairs": 4, "prompts": 2, "toy": 2}
KEPT = {
    "model",
    "run",
    "empty",
    "locked",
    "broken.jsonl",
    "out.png",
    "loop",
    "pipe",
    *(f"{name}.jsonl" for name in ROWS),
}
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "0.5",
    "1e-300",
    "1e300",
    "1e400",
    "nan",
    "-inf",
    "1" + "0" * 30,
    "9" * 5000,
    "2147483647",
]
NUMBERS += ["2147483648", "0x10", "1_000", "\u0663", " 7", "1e3", "2000000000", "999999999999.5"]
PATHS = [
    "model",
    "sft.jsonl",
    "missing",
    "sft.jsonl/x",
    "x" * 300,
    "x/" * 2000,
    "empty",
    ".",
    "/proc",
    "/dev/null",
    "/dev/full",
]
PATHS += [
    "/proc/self/mem",
    "/dev/zero",
    "pipe",
    "loop",
    "\udcff",
    "a\nb",
    "\x1b[2J",
    "-",
    "--",
    "{problem}",
    "~",
    "*.jsonl",
]
PATHS += ["broken.jsonl", "run", "out.png", "model/config.json", "https://x.org/a/b", "locked/x"]


def values(f: dataclasses.Field, rng: random.Random) -> list[str]:
    """Words for a field: of its range, at and beyond its ends, of other types, and none at all."""
    kind, m = kind_of(f), f.metadata
    ends = [m[name] for name in ("low", "above", "high") if m[name] is not None]
    near = [str(kind(bound + more)) for bound in ends for more in (-1, 0, 1)] if kind in (int, float) else []
    own = {int: NUMBERS, float: NUMBERS, bool: ["true", "false", "1", "TRUE"], str: PATHS, list: PATHS}[kind]
    word = rng.choice([*m["choices"]] * 4 + near + own * (1 + bool(rng.randrange(2))) + ["", "x", "[]", *NUMBERS[:3]])
    if kind is list:
        return [word, *rng.choices(PATHS, k=rng.randrange(3))]
    return [] if rng.random() < 0.03 else [word]


@pytest.fixture
def folder(tmp_path, toy_data, monkeypatch) -> Path:
    """Everything that the commands' small flags name, and a few things that are in nobody's way but might be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(toy_data / "model", "model")
    for name, count in ROWS.items():
        lines = (toy_data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        Path(f"{name}.jsonl").write_text("".join(lines[:count]))
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    said = (f"<think>a=1;</think>\\boxed{{{row['answer']}}}" for row in rows)
    own = [json.dumps({**row, "completion": text}) + "\n" for row, text in zip(rows, said)]
    Path("prompts.jsonl").write_text("".join(own))
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "update_norm": 1.0}\n')
    Path("empty").mkdir()
    Path("locked").touch()
    Path("broken.jsonl").write_bytes(b"\xff{")
    Path("out.png").write_bytes(b"a photograph")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_is_obeyed_or_refused_in_a_sentence(command, share, folder, hasty, capfd):
    module, own, tables, small = COMMANDS[command]
    fields = [(f"--{f.name}", f) for f in dataclasses.fields(own)]
    fields += [(f"--{table}.{f.name}", f) for table in tables for f in dataclasses.fields(TABLES[table])]
    rng, ends = random.Random(command), []
    whole = snapshot(folder)
    for number in range(share * max(50, len(fields))):
        flag, f = fields[number % len(fields)]
        argv = [*small.split(), flag, *values(f, rng)]
        if rng.random() < 0.2:
            other, g = rng.choice(fields)
            argv += [other, *values(g, rng)]
        try:
            with limits():
                ends.append(end(lambda: module.main(argv)))
        except TooLong:
            assert WORK & set(argv), argv  # it does what it was asked to do
        except BaseException as error:
            error.add_note(f"{command} {' '.join(word[:80] for word in argv)!r}")
            raise
        now = snapshot(folder)
        changed = [path for path, content in whole.items() if now.get(path) != content]
        assert not changed, (argv, changed)
        for path in now.keys() - whole.keys():
            Path(path).unlink(missing_ok=True)
        for path in [p for p in folder.iterdir() if p.name not in KEPT]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    capfd.readouterr()
    refused = [text for text in ends if text]
    print(f"{command}: {len(ends)} tried, {len(refused)} ended in a sentence")
    assert 0 < len(refused) < len(ends)
