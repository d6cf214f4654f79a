"""Raw rows to sft.jsonl and pairs.jsonl, against results worked out by hand, by `datasets`, and by plain loops over
the real sample."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from templates import DEEPSEEK, small_folder

from nanoredi import prepare, toy
from nanoredi.common.errors import UserError
from nanoredi.data.decontaminate import Overlap
from nanoredi.data.sequences import load_pairs
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.report.lengths import read_lengths

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def run(files, tokenizer, out, **flags):
    return prepare.prepare(files, tokenizer, out, prepare.PrepareFlags(**flags), Overlap([]))


SYSTEM = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"


def raw(
    problem="a=1",
    generations=("b=1", "b=2"),
    llama=(True, False),
    math=(True, False),
    valid="Yes",
    source="olympiads",
    **more,
):
    labels = {
        "llama_verification": llama and list(llama),
        "math_verify_reparsed_answer": math and list(math),
        "math_verify": None,
    }
    return {
        "problem": problem,
        "solution": "",
        "source": source,
        "problem_is_valid": valid,
        "generations": generations if generations is None else list(generations),
        "correctness": labels,
    } | more


# With the toy's tokenizer a text of n characters is templated as <user> or <assistant> and n more tokens, and measures
# n + 2.
ROWS = {
    "plain pair": raw(),
    "not valid": raw(valid="No"),
    "spaces and case": raw("a=2", valid="  yES\n", source=None),
    "validity unknown": raw(valid=None),
    "cn_k12": raw(source="cn_k12"),
    "cn_k12 and not valid": raw(source="cn_k12", valid="Incomplete"),
    "empty problem": raw(""),
    "null problem": raw(None),
    "null generations": raw(generations=None, llama=None, math=None),
    "no generations": raw(generations=(), llama=(), math=()),
    "short list": raw(llama=(True,)),
    "long list": raw(math=(True, False, True)),
    "null list": raw(llama=None),
    "null correctness": raw(correctness=None),
    "one judge each": raw("a=3", llama=(True, False), math=(False, True)),
    "null label": raw("a=4", llama=(None, True), math=(True, True)),
    "all correct": raw("a=5", llama=(True, True), math=(True, True)),
    "first of each": raw(
        "a=6", ("a", "b", "c", "d", "e"), (False, True, True, True, False), (True, False, True, True, False)
    ),
    "prompt fits": raw("a=1111"),
    "prompt too long": raw("a=11111"),
    "responses fit": raw("a=7", ("b=123456", "c=123456")),
    "chosen too long": raw("a=8", ("b=1234567", "b=1")),
    "rejected too long": raw("a=9", ("b=1", "b=1234567")),
    "empty generation": raw("a=10", ("", "b=3", "", "b=4"), (True, True, False, False), (True, True, True, False)),
}
LIMITS = {"max_prompt_tokens": 8, "max_response_tokens": 10}
COUNTS = [24, 21, 20, 18, 16, 12, 11, 10, 9, 7]
SFT = {
    "plain pair": 0,
    "spaces and case": 0,
    "null label": 1,
    "all correct": 0,
    "first of each": 2,
    "prompt fits": 0,
    "prompt too long": 0,
    "responses fit": 0,
    "chosen too long": 0,
    "rejected too long": 0,
    "empty generation": 1,
}
PAIRS = {
    "plain pair": (0, 1),
    "spaces and case": (0, 1),
    "null label": (1, 0),
    "first of each": (2, 0),
    "prompt fits": (0, 1),
    "responses fit": (0, 1),
    "empty generation": (1, 3),
}
TOO_LONG = ("prompt too long", "chosen too long", "rejected too long")


def measured(message: list[dict]) -> int:
    return len(message[0]["content"]) + 2


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(toy_folder) -> Tokenizer:
    return Tokenizer(toy_folder)


def write(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_kind_of_row(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", ROWS.values())
    counts = run([file], tokenizer, tmp_path / "out", **LIMITS)
    assert list(counts.values()) == COUNTS

    names = list(ROWS)
    order = [names[i] for i in np.random.default_rng(42).permutation(len(names))]
    assert order != names
    sft, pairs, too_long = [], [], []
    for name in order:
        row = ROWS[name]
        answers = [[{"role": "assistant", "content": text}] for text in row["generations"] or []]
        prompt = [{"role": "user", "content": row["problem"]}]
        facts = {"original_index": names.index(name), "source": row["source"]}
        if name in SFT:
            lengths = {"prompt_tokens": measured(prompt), "response_tokens": measured(answers[SFT[name]])}
            row = {"messages": prompt + answers[SFT[name]], **facts, "generation_index": SFT[name], **lengths}
            sft.append(row)
        if name in PAIRS or name in TOO_LONG:
            good, bad = PAIRS.get(name, (0, 1))
            row = {
                **facts,
                "chosen_index": good,
                "rejected_index": bad,
                "prompt_tokens": measured(prompt),
                "chosen_tokens": measured(answers[good]),
                "rejected_tokens": measured(answers[bad]),
            }
            texts = {"prompt": prompt, "chosen": answers[good], "rejected": answers[bad]}
            pairs.append(texts | row) if name in PAIRS else too_long.append(row)
    assert read(tmp_path / "out" / "sft.jsonl") == sft
    assert read(tmp_path / "out" / "pairs.jsonl") == pairs
    assert read(tmp_path / "out" / "too_long.jsonl") == too_long
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pairs.jsonl", "sft.jsonl", "too_long.jsonl"]


def test_lengths_are_those_of_training_where_the_template_strips(tmp_path):
    """DeepSeek's way drops the thinking; two long traces of it are too long all the same."""
    tokenizer = Tokenizer(small_folder(tmp_path / "t", DEEPSEEK))
    traces = [f"<think>\n{'long' * n}\n</think>\n\n{n}" for n in (20, 30)]
    file = write(tmp_path / "raw.jsonl", [raw(generations=traces), raw(generations=("short", "1"))])
    run([file], tokenizer, tmp_path / "out")
    pairs = load_pairs(str(tmp_path / "out" / "pairs.jsonl"), tokenizer, 800, 19_000, str(tmp_path))
    assert len(pairs) == 2
    for i, row in enumerate(read(tmp_path / "out" / "pairs.jsonl")):
        lengths = [int(sequence.learned.sum()) for sequence in pairs.row(i)]
        assert [row["chosen_tokens"], row["rejected_tokens"]] == lengths
        assert row["prompt_tokens"] == int((~pairs.row(i)[0].learned).sum())
    found = read_lengths(tmp_path / "out" / "pairs.jsonl", tokenizer)
    longest = int(found["rejected"].max())
    assert longest > 120 and found["rejected"].tolist() == [
        r["rejected_tokens"] for r in read(tmp_path / "out" / "pairs.jsonl")
    ]
    for limit, kept in ((longest, 2), (longest - 1, 1)):
        counts = run([file], tokenizer, tmp_path / f"out-{limit}", max_response_tokens=limit)
        assert [*counts.values()][-1] == kept


def test_a_share_of_pairs_is_swapped(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", [raw(f"a={i}", (f"b={i}", f"c={i}1")) for i in range(40)])
    run([file], tokenizer, tmp_path / "plain")
    plain = read(tmp_path / "plain" / "pairs.jsonl")
    for share, number in ((0.25, 10), (1.0, 40)):
        out = tmp_path / str(share)
        run([file], tokenizer, out, swap=share)
        rows = read(out / "pairs.jsonl")
        assert [row.pop("swapped", False) for row in rows].count(True) == number
        back = [(row if row["chosen_index"] == 0 else exchanged(row)) for row in rows]
        assert back == plain and sum(row["chosen_index"] for row in rows) == number
        assert (out / "sft.jsonl").read_bytes() == (tmp_path / "plain" / "sft.jsonl").read_bytes()
    run([file], tokenizer, tmp_path / "again", swap=0.25)
    assert (tmp_path / "again" / "pairs.jsonl").read_bytes() == (tmp_path / "0.25" / "pairs.jsonl").read_bytes()


def exchanged(row: dict) -> dict:
    names = {f"chosen{end}": f"rejected{end}" for end in ("", "_index", "_tokens")}
    names |= {other: name for name, other in names.items()}
    return {name: row[names.get(name, name)] for name in row}


def test_strict_negatives_are_false_for_both_verifiers(tmp_path, tokenizer):
    rows = [
        raw("a=1", ("a", "b", "c"), (True, True, False), (True, False, False)),
        raw("a=2", ("a", "b"), (True, True), (True, False)),
        raw("a=3", ("a", "b", "c"), (True, None, False), (True, False, False)),
    ]
    for strict, found in ((False, [1, 1, 1]), (True, [2, 2])):
        out = tmp_path / str(strict)
        run([write(tmp_path / "raw.jsonl", rows)], tokenizer, out, strict_negatives=strict)
        assert [row["rejected_index"] for row in read(out / "pairs.jsonl")] == found


def test_generations_that_teach_nothing_are_passed_over_and_counted(tmp_path, tokenizer, capsys):
    rows = [
        raw("a=1", (" \n", "b", "", "c"), (True, True, False, False), (True,) * 4),
        raw("a=2", ("b", "b", "c"), (True, False, False), (True,) * 3),
        raw("a=3", ("b", "b")),
    ]
    run([write(tmp_path / "raw.jsonl", rows)], tokenizer, tmp_path / "out")
    pairs = read(tmp_path / "out" / "pairs.jsonl")
    assert sorted((row["original_index"], row["chosen_index"], row["rejected_index"]) for row in pairs) == [
        (0, 1, 3),
        (1, 0, 2),
    ]
    said = capsys.readouterr().err
    assert "2 generations are empty or white space: neither correct nor incorrect." in said
    assert "2 generations are incorrect, and the very text of the correct one: passed over." in said


def test_a_row_that_no_tokenizer_can_write_is_dropped_and_named(tmp_path, tokenizer, capsys):
    file = write(tmp_path / "raw.jsonl", [raw(), raw("a=\ud83d"), raw(generations=("b", "\ude00")), raw("a=2")])
    assert [*run([file], tokenizer, tmp_path / "out").values()][::9] == [4, 2]
    said = capsys.readouterr().err
    assert "Dropped 2 of 4 rows, whose text holds half a surrogate pair" in said
    assert "raw.jsonl, line 2; " in said and "raw.jsonl, line 3." in said


def original(rows: list[dict]) -> tuple[list, list]:
    """What the original's scripts keep of raw rows, with `datasets` doing the numbering and the shuffle: (number,
    problem, generation) of SFT rows, (number, problem, chosen, rejected) of pairs before their lengths are looked at.
    Written from the description of the scripts; an empty generation is passed over, as nanoredi does on purpose."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(rows).map(lambda row, i: {"original_index": i}, with_indices=True)
    sft, pairs = [], []
    for row in dataset.shuffle(seed=42):
        valid, texts, labels = row["problem_is_valid"], row["generations"], row["correctness"]
        if not isinstance(valid, str) or valid.strip().lower() != "yes" or row["source"] == "cn_k12":
            continue
        if not row["problem"] or not texts or not labels:
            continue
        llama, math = labels["llama_verification"], labels["math_verify_reparsed_answer"]
        if llama is None or math is None or not len(llama) == len(math) == len(texts):
            continue
        right = [i for i, text in enumerate(texts) if text and llama[i] and math[i]]
        wrong = [i for i, text in enumerate(texts) if text and not (llama[i] and math[i])]
        if right:
            sft.append((row["original_index"], row["problem"], texts[right[0]]))
            if wrong:
                pairs.append((row["original_index"], row["problem"], texts[right[0]], texts[wrong[0]]))
    return sft, pairs


def test_ten_thousand_rows_as_the_original(tmp_path, tokenizer):
    rng = random.Random(0)
    rows = [defective(rng.choice([*ROWS.values()]), rng) for _ in range(10_000)]
    sft, pairs = original(rows)
    pairs = [row for row in pairs if len(row[1]) + 2 <= 8 and max(map(len, row[2:])) + 2 <= 10]
    counts = run([write(tmp_path / "raw.jsonl", rows)], tokenizer, tmp_path / "out", **LIMITS)
    assert [
        (row["original_index"], *(message["content"] for message in row["messages"]))
        for row in read(tmp_path / "out" / "sft.jsonl")
    ] == sft
    assert [
        (row["original_index"], *(row[side][0]["content"] for side in ("prompt", "chosen", "rejected")))
        for row in read(tmp_path / "out" / "pairs.jsonl")
    ] == pairs
    assert (counts[prepare.SFT_GATE], [*counts.values()][-1]) == (len(sft), len(pairs))
    left = list(counts.values())
    assert all(after < before for before, after in zip(left, left[1:])) and len(pairs) > 200  # each gate had its work


def defective(row: dict, rng: random.Random) -> dict:
    """The row with other values here and there, and now and then with one more thing wrong with it."""
    row = copy.deepcopy(row)
    if row["problem"]:
        row["problem"] = f"a={rng.randrange(10 ** rng.randint(1, 5))}"
    if rng.random() < 0.5:
        row["problem_is_valid"] = rng.choice(["Yes", "yes ", "YES", "No", "Incomplete", "", None, "yes, partly"])
    if rng.random() < 0.5:
        row["source"] = rng.choice(["olympiads", "cn_k12", "CN_K12", "amc_aime", None])
    labels = row["correctness"]
    for name in labels or {}:
        if labels[name] and rng.random() < 0.5:
            labels[name] = [rng.choice([True, True, False, None]) for _ in labels[name]]
        if labels[name] and rng.random() < 0.05:
            labels[name] = rng.choice([labels[name][:-1], labels[name] + [True], [], None])
    if row["generations"] and rng.random() < 0.3:
        row["generations"][0] = rng.choice(["", "c=1", "d=12345678"])
    if rng.random() < 0.05:
        row["problem"] = rng.choice(["", None])
    return row


def test_seed_changes_the_order_alone(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", ROWS.values())
    run([file], tokenizer, tmp_path / "a")
    run([file], tokenizer, tmp_path / "b", seed=7)
    a, b = (read(tmp_path / out / "sft.jsonl") for out in "ab")
    assert a != b and sorted(map(json.dumps, a)) == sorted(map(json.dumps, b))


def test_parquet_and_shards_equal_jsonl(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = list(ROWS.values()) * 10  # more than one batch
    shards = [rows[:100], rows[100:]]
    for kind in ("jsonl", "parquet", "one"):
        (tmp_path / kind).mkdir()
    for i, shard in enumerate(shards):
        write(tmp_path / "jsonl" / f"train-{i}.jsonl", shard)
        parquet.write_table(
            pyarrow.Table.from_pylist(shard), tmp_path / "parquet" / f"train-{i}.parquet", row_group_size=30
        )
    write(tmp_path / "one" / "raw.jsonl", rows)
    results = []
    for paths in (["one"], ["jsonl"], ["parquet"], ["jsonl/train-0.jsonl", "parquet/train-1.parquet"]):
        out = tmp_path / f"out-{len(results)}"
        counts = run(prepare.find_files([str(tmp_path / p) for p in paths]), tokenizer, out, **LIMITS)
        results.append((counts, (out / "sft.jsonl").read_bytes(), (out / "pairs.jsonl").read_bytes()))
    assert results[0][0]["rows read"] == len(rows)
    assert all(result == results[0] for result in results[1:])


def test_a_row_group_is_not_held_in_memory(tmp_path):
    """100 MB in one row group, which pyarrow would take whole, pass through a small part of that."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"{i:05}" * 2000 for i in range(10_000)]
    table = pyarrow.table({"problem": ["a=1"] * 10_000, "generations": [[text] for text in texts]})
    parquet.write_table(
        table, tmp_path / "raw.parquet", row_group_size=10_000, compression="none", use_dictionary=False
    )
    code = f"""
import pathlib, pyarrow
from nanoredi.prepare import read_raw
rows = read_raw(pathlib.Path({str(tmp_path / "raw.parquet")!r}))
assert sum(len(row["generations"][0]) for _, row in rows) == 10**8
print(pyarrow.default_memory_pool().max_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50 * 2**20, f"{int(done.stdout):,} bytes"


def test_parquet_faults(tmp_path, tokenizer, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "raw.parquet"
    file.write_text("not parquet")
    with pytest.raises(UserError, match="cannot read .*raw.parquet"):
        run([file], tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="cannot read .*absent.parquet"):
        run([tmp_path / "absent.parquet"], tokenizer, tmp_path / "out")
    rows = [raw(), raw()]
    parquet.write_table(
        pyarrow.table({key: [row[key] for row in rows] for key in ("problem_is_valid", "generations")}), file
    )
    with pytest.raises(UserError, match="raw.parquet, row 1 has no field 'source'"):
        run([file], tokenizer, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        run([file], tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"problem": ', "line 3 is not JSON"),
        ("[1, 2]", r"line 3: it is \[1, 2\]; it must be an object"),
        ({k: v for k, v in raw().items() if k != "problem_is_valid"}, "line 3 has no field 'problem_is_valid'"),
        ({k: v for k, v in raw().items() if k != "source"}, "line 3 has no field 'source'"),
        (raw(valid=True), "line 3: problem_is_valid is True; it must be text"),
        (raw(problem=["a"]), r"line 3: problem is \['a'\]; it must be text"),
        (raw() | {"generations": "b=1"}, "line 3: generations is 'b=1'; it must be a list"),
        (raw(generations=["b", 2]), r"line 3: generations\[1\] is 2; it must be text or null"),
        (raw(correctness=[True]), r"line 3: correctness is \[True\]; it must be an object"),
        (raw(llama=("yes", "no")), r"line 3: llama_verification\[0\] is 'yes'; it must be true or false or null"),
        (raw(problem="an unknown word"), "line 3: the tokenizer of .* cannot write"),
    ],
)
def test_malformed_rows_are_named(tmp_path, tokenizer, row, words):
    file = write(tmp_path / "raw.jsonl", [raw(), "", row, raw()])
    with pytest.raises(UserError, match=f"raw.jsonl, {words}"):
        run([file], tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []  # nothing half done is left


def test_missing_and_empty_data(tmp_path, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot read .*absent.jsonl: No such file"):
        run(prepare.find_files([str(tmp_path / "absent.jsonl")]), tokenizer, out)
    with pytest.raises(UserError, match="there are no rows in .*empty.jsonl"):
        run([write(tmp_path / "empty.jsonl", ["", ""])], tokenizer, out)
    assert not out.exists()
    with pytest.raises(UserError, match="no row is left: 2 rows read, 1 problem_is_valid is yes.* 0 SFT"):
        run([write(tmp_path / "bad.jsonl", [raw(valid="No"), raw(llama=(False, False))])], tokenizer, out)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="it holds none"):
        prepare.find_files([str(tmp_path / "folder")])
    write(tmp_path / "folder" / "a.jsonl", [raw()])
    write(tmp_path / "folder" / "a.parquet", [])
    with pytest.raises(UserError, match="it holds both"):
        prepare.find_files([str(tmp_path / "folder")])


@pytest.mark.parametrize("name", ["sft.jsonl", "pairs.jsonl"])
def test_nothing_is_overwritten(tmp_path, tokenizer, name):
    file = write(tmp_path / "raw.jsonl", [raw()])
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is there already"):
        run([file], tokenizer, tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["raw.jsonl", name])


def test_what_a_killed_one_left_is_removed(tmp_path):
    file, out = write(tmp_path / "raw.jsonl", [raw()]), tmp_path / "out"
    toy.write_tokenizer(tmp_path / "tokenizer")
    command = [
        sys.executable,
        "-m",
        "nanoredi.prepare",
        "--raw",
        file,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        out,
    ]
    killed, done = (
        subprocess.run(
            command, env={**os.environ, **more}, capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
        for more in ({"NANOREDI_CRASH_AT": "1"}, {})
    )
    assert killed.returncode == -9 and done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["pairs.jsonl", "sft.jsonl", "too_long.jsonl"]


def test_out_that_cannot_be_written(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", [raw()])
    with pytest.raises(UserError, match="cannot write to .*raw.jsonl"):
        run([file], tokenizer, file)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--row", "x"], "no flag --row .did you mean '--raw'"),
        (["--raw", "x", "--tokeniser", "y", "--out", "z"], "no flag --tokeniser .did you mean '--tokenizer'"),
        (["x", "--raw", "y"], "'x' follows no flag"),
        (["--raw", "x"], "--tokenizer and --out must be given"),
        (["--raw"], "--raw: expected at least one argument"),
        (["--max_prompt_tokens", "0"], "--max_prompt_tokens is 0; it must be at least 1"),
        (["--seed", "x"], "--seed takes a whole number, not .x."),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(UserError, match=words):
        prepare.main(flags)


def test_as_a_command(tmp_path, toy_folder, run):
    write(tmp_path / "raw.jsonl", ROWS.values())
    flags = "--raw raw.jsonl --max_prompt_tokens 8 --max_response_tokens 10 --out out --tokenizer".split()
    first, second = (run("nanoredi/prepare.py", *flags, toy_folder) for _ in range(2))
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert [int(line.split()[-1]) for line in lines[: len(COUNTS)]] == COUNTS
    assert len(lines) == len(COUNTS) + 1 and "paper" not in first.stdout
    refusal = "error: out/sft.jsonl is there already: move it away or give another --out\n"
    assert (second.returncode, second.stderr) == (2, refusal)


def test_the_papers_counts_are_told_only_when_missed():
    gates = ["rows read", "a", prepare.SFT_GATE, "pairs"]
    missed = prepare.table(dict(zip(gates, (516_499, 300_000, 77_629, 53_174))))
    assert "not the paper's counts" in missed and "77,629 SFT traces and 53,175 pairs" in missed
    assert "paper" not in prepare.table(dict(zip(gates, (516_499, 300_000, 77_629, 53_175))))
    assert "paper" not in prepare.table(dict(zip(gates, (100_000, 300, 20, 10))))


@pytest.fixture(scope="module")
def sample() -> tuple[Path, Tokenizer]:
    file, folder = DATA / "openr1_math_raw_sample.jsonl", DATA / "qwen2.5-tokenizer"
    if not (file.exists() and folder.exists()):
        pytest.skip(f"the real sample and tokenizer are not at {DATA}")
    return file, Tokenizer(folder)


def test_the_real_sample(tmp_path, sample):
    file, tokenizer = sample
    rows = read(file)
    correct = [
        [
            a and b
            for a, b in zip(row["correctness"]["llama_verification"], row["correctness"]["math_verify_reparsed_answer"])
        ]
        for row in rows
    ]
    counts = run([file], tokenizer, tmp_path / "out")
    sft, pairs = read(tmp_path / "out" / "sft.jsonl"), read(tmp_path / "out" / "pairs.jsonl")
    assert counts["has both labels of each generation"] == len(rows) == 100
    assert len(sft) == sum(any(verdicts) for verdicts in correct)
    assert len(pairs) == sum(any(verdicts) and not all(verdicts) for verdicts in correct) == 10
    for row in sft:
        i, source = row["original_index"], rows[row["original_index"]]
        assert [m["content"] for m in row["messages"]] == [
            source["problem"],
            source["generations"][correct[i].index(True)],
        ]
    for row in pairs:
        i, source = row["original_index"], rows[row["original_index"]]
        assert row["chosen"][0]["content"] == source["generations"][correct[i].index(True)]
        assert row["rejected"][0]["content"] == source["generations"][correct[i].index(False)]


def test_lengths_are_the_originals(tmp_path, sample):
    """The limits set to the longest pair's own lengths, worked out with the template written by hand, keep it; one
    less drops it."""
    file, tokenizer = sample
    run([file], tokenizer, tmp_path / "all")
    pairs = read(tmp_path / "all" / "pairs.jsonl")

    def length(role: str, message: list[dict]) -> int:
        text = f"{SYSTEM}<|im_start|>{role}\n{message[0]['content']}<|im_end|>\n"
        return len(tokenizer.backend.encode(text, add_special_tokens=False).ids) + 1

    prompts = [length("user", pair["prompt"]) for pair in pairs]
    responses = [max(length("assistant", pair[side]) for side in ("chosen", "rejected")) for pair in pairs]
    for limits in (
        (max(prompts), max(responses)),
        (max(prompts) - 1, max(responses)),
        (max(prompts), max(responses) - 1),
    ):
        kept = [pair for pair, p, r in zip(pairs, prompts, responses) if p <= limits[0] and r <= limits[1]]
        out = tmp_path / f"{limits[0]}-{limits[1]}"
        run([file], tokenizer, out, max_prompt_tokens=limits[0], max_response_tokens=limits[1])
        assert read(out / "pairs.jsonl") == kept
        assert (len(kept) == len(pairs)) == (limits == (max(prompts), max(responses)))
