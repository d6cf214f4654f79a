"""Two starts at once on one folder, or on one cache: both are right, or the second ends in one sentence."""

import pytest
from forks import ended
from mutation import contents

TRAIN = """--out OUT --cache CACHE --toy.sft_rows 12 --toy.pairs 4 --toy.watch_pairs 1 --toy.heldout 1 --toy.num_layers 1
    --toy.hidden_size 16 --dtype float32 --save_every 1"""
DRAW = "--model DATA/model --n 2 --max_tokens 4 --dtype float32"
RUNS = {
    "train_sft": f"{TRAIN} --epochs 1 --batch_size 6",
    "train_redi": f"""{TRAIN} --sft.cache CACHE --sft.epochs 1 --sft.batch_size 12 --sft.dtype float32 --sft.save_every 1
        --batch_size 2 --evaluate.n 1 --evaluate.max_tokens 4 --evaluate.dtype float32""",
    "sample": f"{DRAW} --prompts DATA/toy.jsonl --out OUT/drawn.jsonl",
    "evaluate": f"{DRAW} --benchmarks DATA/toy.jsonl --think own --out OUT",
    "nanoredi.prepare": "--raw RAW --tokenizer DATA/model --grade --out OUT",
}


@pytest.mark.parametrize(
    "script, times",
    [("train_redi", 2), ("evaluate", 4), *(pytest.param(script, 50, marks=pytest.mark.slow) for script in RUNS)],
)
def test_two_at_once(script, times, toy_data, forks, tmp_path):
    (tmp_path / "raw.jsonl").write_text(RAW)
    flags = RUNS[script].replace("RAW", str(tmp_path / "raw.jsonl")).replace("DATA", str(toy_data)).split()
    job = forks.start(tmp_path, "tests/attack/twice.py", script, ".", str(times), *flags, OMP_NUM_THREADS="1")
    done = ended(job, seconds=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{script}: {done.stdout.splitlines()[-1]}")
    whole = contents(tmp_path / "whole")
    assert whole
    for folder in [*tmp_path.glob("*/a"), *tmp_path.glob("*/b")]:
        found = contents(folder)
        differ = [name for name in sorted({*whole, *found}) if found.get(name) != whole.get(name)]
        assert not differ, folder


RAW = '{"problem": "a=1", "generations": ["<think>b=1;</think>\\\\boxed{1}", "\\\\boxed{2}"], "answer": "1"}\n' * 3
