"""The embedded task: the teacher's rules, the shape of the data, and that it is reproducible."""

import json
import random
import re

import pytest

from nanoredi import toy
from nanoredi.common.errors import UserError
from nanoredi.config import ToyConfig


def test_one_problem_step_by_step():
    problem = toy.Problem(3, (("+", 5), ("-", 6), ("+", 6), ("-", 6), ("*", 2), ("-", 6)))
    assert problem.text == "a=3b+5c-6d+6e-6f*2g-6"
    # 3, 8, 2, 8, 2, 4, -2 = 8 modulo 10
    assert [problem.apply(3, 0, i) for i in range(7)] == [3, 8, 2, 8, 2, 4, 8]
    assert problem.answer == 8


def test_traces_follow_the_rules():
    rng = random.Random(0)
    right = steps = slips = leaps = lucky = wrong = repaired = 0
    for _ in range(3000):
        problem = toy.draw_problem(rng)
        trace, value = toy.teach(problem, rng)
        assert re.fullmatch(r"<think>(Wait[a-f]=\d;|~[c-g]=\d;|[b-g][-+*][2-6]=\d;)+</think>\\boxed\{\d\}", trace)
        assert trace.endswith(f"{{{value}}}")
        right += value == problem.answer
        at, now = before = 0, problem.start
        for word in re.findall(r"Wait[a-f]=\d;|~[c-g]=\d;|[b-g][-+*][2-6]=\d;", trace):
            result = int(word[-2])
            if word.startswith("Wait"):
                repaired += 1
                at, now = before
                assert word == f"Wait{toy.LETTERS[at]}={now};"
                continue
            to = "abcdefg".index(word[1] if word[0] == "~" else word[0])
            if word[0] == "~":
                assert to - at in (2, 3)
                leaps += 1
                lucky += result == problem.apply(now, at, to)
                wrong += result != problem.apply(now, at, to)
                before = at, now
            else:
                assert to == at + 1 and word[1:3] == "".join(map(str, problem.ops[at]))
                steps += 1
                slips += result != problem.apply(now, at, to)
            at, now = to, result
        assert (at, now) == (6, value)
    assert 0.58 < right / 3000 < 0.66
    assert 0.47 < lucky / leaps < 0.53
    assert 0.26 < repaired / wrong < 0.34
    assert 0.004 < slips / steps < 0.015


def test_data(toy_data, tmp_path):
    sft, pairs, watch, heldout = (
        [json.loads(line) for line in (toy_data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "pairs", "watch", "toy")
    )
    assert [len(rows) for rows in (sft, pairs, watch, heldout)] == [120, 60, 8, 6]
    learned = {(row["messages"][0]["content"], row["messages"][1]["content"]) for row in sft}
    assert len({problem for problem, _ in learned}) == 120
    assert {(p["prompt"], p["chosen"]) for p in pairs + watch} <= learned
    assert not {row["problem"] for row in heldout} & {problem for problem, _ in learned}
    assert not {p["prompt"] for p in pairs} & {p["prompt"] for p in watch}
    for p in pairs:
        assert p["chosen"][-2] != p["rejected"][-2]
    toy.make(
        tmp_path / "again",
        ToyConfig(sft_rows=120, pairs=60, watch_pairs=8, heldout=6, num_layers=2, hidden_size=32),
        seed=1,
    )
    for path in toy_data.glob("*.jsonl"):
        assert (tmp_path / "again" / path.name).read_text() == path.read_text()
    assert (tmp_path / "again/model/model.safetensors").read_bytes() == (
        toy_data / "model/model.safetensors"
    ).read_bytes()


def test_sizes_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="toy.sft_rows 10 gives . pairs; toy.pairs and toy.watch_pairs ask for 50"):
        toy.make(tmp_path / "d", ToyConfig(sft_rows=10, pairs=40, watch_pairs=10), seed=0)
    with pytest.raises(UserError, match="hidden_size 10, num_attention_heads 4"):
        toy.make(tmp_path / "d", ToyConfig(sft_rows=100, pairs=20, watch_pairs=10, hidden_size=10), seed=0)
