"""Killed at any write or rename, the same command ends with the same bytes."""

import pytest
from forks import ended
from mutation import contents
from raw_rows import ROWS, write

TOY = """--cache OUT/cache --toy.sft_rows 12 --toy.pairs 4 --toy.watch_pairs 1 --toy.heldout 1 --toy.num_layers 1
    --toy.hidden_size 16 --batch_size 4 --dtype float32 --save_every 1 --log_every 1"""
RUNS = {
    "train_redi": f"""{TOY} --sft.cache OUT/cache --sft.batch_size 6 --sft.epochs 1 --epochs 2 --evaluate.n 2
        --evaluate.max_tokens 4 --sft.dtype float32 --evaluate.dtype float32 --sft.save_every 1 --sft.log_every 1""",
    "train_sft": f"{TOY} --epochs 1",
    "nanoredi.prepare": "--raw ROWS --tokenizer DATA/model --decontaminate DATA/toy.jsonl",
    "evaluate --completions": "--completions ROWS",
    "evaluate": """--model DATA/model --benchmarks DATA/toy.jsonl --limit 3 --n 2 --max_tokens 4 --think own
        --dtype float32""",
}
COMPLETIONS = [{"problem": "1+1?", "answer": "2", "completion": r"\boxed{2}"}]
RESULTS = {
    "train_redi": {"final/model.safetensors", "sft/final/model.safetensors", "results.json", "samples.jsonl"},
    "train_sft": {"final/model.safetensors", "step-000002/model.safetensors", "metrics.jsonl"},
    "nanoredi.prepare": {"sft.jsonl", "pairs.jsonl", "too_long.jsonl", "overlaps.jsonl"},
    "evaluate --completions": {"samples.jsonl", "results.json", "results.txt", "results.md"},
    "evaluate": {"samples.jsonl", "evaluation.json", "results.json", "results.txt", "results.md"},
}


@pytest.mark.parametrize(
    "run, stride",
    [
        ("train_redi", 45),
        ("nanoredi.prepare", 3),
        ("evaluate --completions", 5),
        ("evaluate", 15),
        *(pytest.param(run, 1, marks=pytest.mark.slow) for run in RUNS),
    ],
)
def test_killed_at_any_write_a_run_ends_with_the_same_bytes(run, stride, toy_data, forks, tmp_path):
    rows = COMPLETIONS if "completions" in run else ROWS.values()
    flags = RUNS[run].replace("DATA", str(toy_data)).replace("ROWS", str(write(tmp_path / "rows.jsonl", rows)))
    flags, script = ["--out", "OUT", *flags.split()], run.split()[0]
    job = forks.start(tmp_path, "tests/attack/crash.py", script, ".", "1", str(stride), *flags, OMP_NUM_THREADS="1")
    done = ended(job, seconds=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{run}: {done.stdout.strip()} places")
    whole = contents(tmp_path / "whole")
    assert RESULTS[run] <= whole.keys()
    killed = [folder for folder in tmp_path.iterdir() if folder.name.isdigit()]
    assert len(killed) * stride >= 10
    for folder in killed:
        found = contents(folder)
        differ = [name for name in sorted({*whole, *found}) if found.get(name) != whole.get(name)]
        assert not differ, f"killed at place {folder.name}"
