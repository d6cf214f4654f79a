"""Files of rows by mutation of whole ones: they are read, or end in one sentence."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mutation import break_file, end, limits, snapshot

import evaluate
import sample
from nanoredi import prepare
from nanoredi.data import benchmarks
from nanoredi.data.sequences import load_pairs, load_sft
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.report import __main__ as report

SAID = {"role": "assistant", "content": "<think>\nit is so</think>\\boxed{2}", "reasoning_content": "one and one"}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+1?"}]
PAIR = {"prompt": ASKED, "chosen": [SAID], "rejected": "no", "chosen_weight": 0.5}
LABELS = {"llama_verification": [True, False], "math_verify_reparsed_answer": [True, None]}
RAW = {"problem_is_valid": "yes", "source": "olympiads", "problem": "What is 1+1?", "generations": ["\\boxed{2}", "3"]}
OWN = {"problem": "What is 1+1?", "generations": ["\\boxed{2}", "\\boxed{3}"], "answer": "2", "correct": [True, False]}
ANSWER = {"prompt": "What is 1+1?", "completion": "\\boxed{2}", "answer": ["2"], "sample": 0, "finish_reason": "stop"}
LENGTHS = {"prompt_tokens": 10, "chosen_tokens": 20, "rejected_tokens": 30}
PARTS = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": [{"type": "text", "text": "2"}]}]
LAYOUTS = re.findall(r"```json\n(.*?)\n```", (ROOT / "docs" / "layouts.md").read_text(), re.DOTALL)
# What rows of each kind may look like; the names of their fields are what is added to others.
WHOLE = {
    "sft": [
        {"messages": [*ASKED, SAID], "weight": -0.5},
        {"prompt": "1+1?", "completion": SAID},
        {"conversations": PARTS},
        {"instruction": "Add.", "input": "1+1?", "output": "2", "kto_tag": True, "history": []},
    ],
    "pairs": [
        PAIR,
        {"chosen": [*ASKED, SAID], "rejected": [*ASKED, {**SAID, "content": "3"}]},
        {**PAIR, "chosen": "yes"},
        {"question": "1+1?", "context": "Add.", "chosen": "2", "rejected": "3", "weight": 1},
    ],
    "prompts": [
        {"prompt": "1+1?", "id": 3},
        {"messages": ASKED},
        {"problem": "1+2?", "answer": "3"},
        {"question": "?"},
    ],
    "benchmark": [
        {"problem": "1+1?", "answer": "2", "id": "a"},
        {"question": "?", "context": "c", "solution": "\\boxed{3}"},
    ],
    "raw": [{**RAW, "correctness": LABELS}, {**RAW, "problem": "What is 2+2?", "correctness": LABELS}],
    "own": [OWN, {**OWN, "problem": "What is 2+2?", "finish_reasons": ["stop", "length"]}],
    "answers": [ANSWER, {**ANSWER, "sample": 1, "completion": "3"}, {**ANSWER, "correct": True, "thinking": "so"}],
    "lengths": [{**LENGTHS, "original_index": 0}, LENGTHS],
}
NAMES = {kind: tuple(dict.fromkeys(name for row in rows for name in row)) for kind, rows in WHOLE.items()}
NAMES["completions"] = tuple(dict.fromkeys(name for row in LAYOUTS for name in json.loads(row)))
COUNTS = {"prompts": 30, "completions": 150, "raw": 60, "own": 60, "answers": 60, "lengths": 40}


def attempt(kind: str, file: Path, tiny: Path, rng: random.Random) -> None:
    """Read the rows as whichever program does, to the end."""
    if kind == "sft":
        data = load_sft(str(file), Tokenizer(tiny), rng.choice([10, 500]), "cache")
        assert all(len(side.tokens) > 1 and side.num_learned for i in range(len(data)) for side in data.row(i))
    elif kind == "pairs":
        data = load_pairs(str(file), Tokenizer(tiny), 100, rng.choice([10, 500]), "cache")
        assert all(len(side.tokens) > 1 and side.num_learned for i in range(len(data)) for side in data.row(i))
    elif kind == "prompts":
        sample.main(f"--model {tiny} --prompts {file} --out out.jsonl --max_tokens 1 --dtype float32".split())
    elif kind == "benchmark":
        benchmarks.load(str(file), "")
    elif kind in ("raw", "own", "answers"):
        grade = ["--grade"] * (kind != "raw" and rng.random() < 0.7)
        prepare.main(
            [*f"--raw {file} --tokenizer {tiny} --out out --decontaminate whole/benchmark.jsonl".split(), *grade]
        )
    elif kind == "lengths":
        report.main(["--lengths", str(file)])
    else:
        named = ["--benchmarks", "two.jsonl"] * (rng.random() < 0.7)
        evaluate.main(["--completions", str(file), "--out", "out", *named])


@pytest.mark.parametrize("kind", [*WHOLE, "completions"])
def test_mutated_rows_are_read_or_end_in_a_sentence(kind, share, byte_model, hasty, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, ends = random.Random(kind), []
    Path("whole").mkdir()
    for name, rows in WHOLE.items():
        Path("whole", f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"problem": "What is 1+1?", "answer": "2"}, {"problem": "What is 1+1? And 2+2?", "answer": "4"}]
    Path("two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    for number in range(share * COUNTS.get(kind, 100)):
        suffix = ".jsonl" if rng.random() < 0.9 else rng.choice([".json", ".gz", ".parquet", ".arrow", ".txt"])
        file = tmp_path / f"{number}.jsonl"
        rows = WHOLE.get(kind) or [json.loads(rng.choice(LAYOUTS))] * rng.choice([1, 2])
        text = json.dumps(rows) if rng.random() < 0.1 else "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(text)
        break_file(file, rng, NAMES[kind])
        file = file.rename(file.with_suffix(suffix))
        before = snapshot(tmp_path / "whole") | {str(file): file.read_bytes()}
        try:
            with limits():
                ends.append(end(lambda: attempt(kind, file, byte_model, rng)))
        except BaseException as error:
            error.add_note(f"{kind} {number}: {file.read_bytes()[:2000]}")
            raise
        assert before.items() <= snapshot(tmp_path).items(), f"{kind} {number}: a file was changed"
        for path in tmp_path.glob("out*"):
            path.rename(tmp_path / f"done-{number}-{path.name}")
        file.unlink()
    capsys.readouterr()
    refused = [text for text in ends if text]
    print(f"{kind}: {len(ends)} tried, {len(refused)} ended in a sentence")
    assert len(ends) // 10 < len(refused) < len(ends)


if __name__ == "__main__":  # what is said, to be read
    sys.exit(pytest.main([__file__, "-q", "-s"]))
