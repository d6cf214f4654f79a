"""Eight words in a row shared with a benchmark: what overlaps, what is reported, what is dropped."""

import json

import pytest

from nanoredi import prepare
from nanoredi.common.errors import UserError
from nanoredi.data.decontaminate import Overlap
from nanoredi.data.filters import Traces
from nanoredi.data.messages import user_message

EIGHT = "one two three four five six seven eight"


def traces(problem: str, index: int = 0) -> Traces:
    return Traces("here", index, "olympiads", problem, user_message(problem), ["1", "2"], 0, 1)


@pytest.fixture
def benchmark(tmp_path):
    def benchmark(*problems, name="test.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"problem": problem, "answer": "1"}) + "\n" for problem in problems))
        return str(path)

    return benchmark


@pytest.mark.parametrize(
    "problem, overlaps",
    [
        (EIGHT, True),
        (f"zero {EIGHT} nine", True),
        ("ONE  two\nthree Four five six seven eight", True),
        ("one two three four five six seven", False),
        ("one two three four five six seven nine eight", False),
        ("eight seven six five four three two one", False),
        ("What is 1 + 1?", True),  # shorter than eight words: overlaps if all are the same
        ("what is 1 + 1?", True),
        ("Tell me, what is 1 + 1?", False),
        ("", False),
    ],
)
def test_what_overlaps(benchmark, problem, overlaps):
    file = benchmark(f"Say {EIGHT}.", f"{EIGHT} nine ten", "What is 1 + 1?")
    overlap = Overlap([file])
    assert overlap.check(traces(problem), in_pairs=True) is overlaps
    assert bool(overlap.rows) is overlaps


def test_what_is_listed(benchmark, tmp_path):
    files = [benchmark("a b", f"{EIGHT} nine ten eleven"), benchmark(f"{EIGHT} 9", EIGHT, name="other.jsonl")]
    overlap = Overlap(files)
    overlap.check(traces(f"{EIGHT} nine", 5), in_pairs=True)
    overlap.check(traces("a B", 7), in_pairs=False)
    overlap.check(traces("nothing", 8), in_pairs=False)
    overlap.write(tmp_path / "overlaps.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "overlaps.jsonl").read_text().splitlines()]
    assert [(row["original_index"], row["benchmark_problem"], row["share"], row["words"]) for row in rows] == [
        (5, f"{files[1]}, line 2", 1.0, EIGHT),
        (7, f"{files[0]}, line 1", 1.0, "a b"),
        (5, f"{files[0]}, line 2", 0.5, EIGHT),
        (5, f"{files[1]}, line 1", 0.5, EIGHT),
    ]
    assert rows[0]["problem"] == f"{EIGHT} nine" and rows[0]["in_pairs"] and not rows[1]["in_pairs"]
    lines = overlap.table().splitlines()
    assert [line.split()[-2:] for line in lines[1:4]] == [["2", "1"], ["1", "1"], ["2", "1"]]


def test_the_papers_benchmarks_overlap_with_themselves(shared):
    files = sorted(map(str, (shared / "benchmarks").glob("*.json")))
    assert len(files) == 5
    problems = [row["problem"] for file in files for row in json.loads(open(file).read())]
    overlap = Overlap(files)
    assert all(overlap.check(traces(problem, i), True) for i, problem in enumerate(problems))
    assert {row["original_index"] for row in overlap.rows if row["share"] == 1} == set(range(len(problems)))


def test_reported_by_default_and_dropped_on_demand(run, tmp_path, toy_data, benchmark):
    # Each of the toy's problems is a single word.
    pairs = [json.loads(line) for line in (toy_data / "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"problem": p["prompt"], "generations": [p["chosen"], p["rejected"]], "correct": [True, i % 2 == 0]}
        for i, p in enumerate(pairs[:6])
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["nanoredi/prepare.py", "--raw", "raw.jsonl", "--tokenizer", toy_data / "model"]
    command += ["--decontaminate", benchmark(pairs[0]["prompt"], pairs[1]["prompt"], "a=1b+1")]
    for flags, numbers in ((["--out", "all"], range(6)), (["--out", "some", "--drop"], range(2, 6))):
        done = run(*command, *flags)
        assert done.returncode == 0, done.stderr
        assert "any of them" in done.stdout and done.stdout.split("any of them")[1].split()[:2] == ["2", "1"]
        assert ("They were dropped." in done.stdout) == ("--drop" in flags)
        for name, kept in (("sft", set(numbers)), ("pairs", {i for i in numbers if i % 2})):
            lines = (tmp_path / flags[1] / f"{name}.jsonl").read_text().splitlines()
            assert {json.loads(line)["original_index"] for line in lines} == kept
        assert len((tmp_path / flags[1] / "overlaps.jsonl").read_text().splitlines()) == 2
    done = run(*command[:-1], benchmark(*(p["prompt"] for p in pairs)), "--drop", "--out", "none")
    assert done.returncode == 2 and "no row is left: all 6 overlap with a benchmark" in done.stderr
    assert not list((tmp_path / "none").iterdir())


def test_bad_benchmarks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1"}\n{"text": "1"}\n')
    with pytest.raises(UserError, match="a.jsonl, line 2 has no text in 'problem'"):
        Overlap([str(tmp_path / "a.jsonl")])
    with pytest.raises(UserError, match="cannot read .*b.json: No such file"):
        Overlap([str(tmp_path / "b.json")])
    with pytest.raises(UserError, match="a.txt, line 1 is not JSON"):
        (tmp_path / "a.txt").write_text("problem\n1\n")
        Overlap([str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match="--drop needs --decontaminate FILE"):
        prepare.main(["--raw", "x", "--tokenizer", "y", "--out", "z", "--drop"])
