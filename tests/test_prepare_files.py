"""The files that prepare reads and writes: their layouts and faults, existing output, and its flags."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from forks import ended
from raw_rows import COUNTS, LIMITS, ROWS, prepared, raw, write

from nanoredi import prepare
from nanoredi.common.errors import UserError
from nanoredi.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(toy_data) -> Tokenizer:
    return Tokenizer(toy_data / "tokenizer")


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
        counts = prepared(prepare.find_files([str(tmp_path / p) for p in paths]), tokenizer, out, **LIMITS)
        results.append((counts, (out / "sft.jsonl").read_bytes(), (out / "pairs.jsonl").read_bytes()))
    assert results[0][0]["rows read"] == len(rows)
    assert all(result == results[0] for result in results[1:])


def test_a_row_group_is_not_held_in_memory(tmp_path):
    """A row group of 100 MB, which pyarrow would load as a whole, is read in a small part of that memory."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"{i:05}" * 2000 for i in range(10_000)]
    table = pyarrow.table({"problem": ["a=1"] * 10_000, "generations": [[text] for text in texts]})
    parquet.write_table(
        table, tmp_path / "raw.parquet", row_group_size=10_000, compression="none", use_dictionary=False
    )
    code = f"""
import pyarrow
from nanoredi.common.files import read_rows
rows = read_rows({str(tmp_path / "raw.parquet")!r}, ("problem", "generations"))
assert sum(len(row["generations"][0]) for _, row in rows) == 10**8
print(pyarrow.default_memory_pool().max_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50 * 2**20, f"{int(done.stdout):,} bytes"


def test_parquet_faults(tmp_path, tokenizer, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "raw.parquet"
    file.write_text("not parquet")
    with pytest.raises(UserError, match="cannot read .*raw.parquet"):
        prepared([file], tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="cannot read .*absent.parquet"):
        prepared([tmp_path / "absent.parquet"], tokenizer, tmp_path / "out")
    rows = [raw(), raw()]
    parquet.write_table(
        pyarrow.table({key: [row[key] for row in rows] for key in ("problem_is_valid", "generations")}), file
    )
    with pytest.raises(UserError, match="raw.parquet, row 1 has no field 'source'"):
        prepared([file], tokenizer, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        prepared([file], tokenizer, tmp_path / "out")


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
        (raw(problem="an unknown word"), "line 3: the tokenizer of .* cannot encode"),
    ],
)
def test_malformed_rows_are_named(tmp_path, tokenizer, row, words):
    file = write(tmp_path / "raw.jsonl", [raw(), "", row, raw()])
    with pytest.raises(UserError, match=f"raw.jsonl, {words}"):
        prepared([file], tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []  # nothing half-written is left


def test_missing_and_empty_data(tmp_path, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot read .*absent.jsonl: No such file"):
        prepared(prepare.find_files([str(tmp_path / "absent.jsonl")]), tokenizer, out)
    with pytest.raises(UserError, match="there are no rows in .*empty.jsonl"):
        prepared([write(tmp_path / "empty.jsonl", ["", ""])], tokenizer, out)
    assert not out.exists()
    with pytest.raises(UserError, match="no row is left: 2 rows read, 1 problem_is_valid is yes.* 0 SFT"):
        prepared([write(tmp_path / "bad.jsonl", [raw(valid="No"), raw(llama=(False, False))])], tokenizer, out)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="it holds none"):
        prepare.find_files([str(tmp_path / "folder")])
    write(tmp_path / "folder" / "b.jsonl", [raw()])
    write(tmp_path / "folder" / "A.JSONL", [raw()])
    write(tmp_path / "folder" / "._b.jsonl", [raw()])  # as macOS puts beside a file on other disks
    assert [path.name for path in prepare.find_files([str(tmp_path / "folder")])] == ["A.JSONL", "b.jsonl"]
    write(tmp_path / "folder" / "a.Parquet", [])
    with pytest.raises(UserError, match="it holds both"):
        prepare.find_files([str(tmp_path / "folder")])


@pytest.mark.parametrize("name", ["sft.jsonl", "pairs.jsonl"])
def test_nothing_is_overwritten(tmp_path, tokenizer, name):
    file = write(tmp_path / "raw.jsonl", [raw()])
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is there already"):
        prepared([file], tokenizer, tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["raw.jsonl", name])


def test_leftovers_of_a_killed_process_are_removed(tmp_path, toy_data, forks):
    file, out = write(tmp_path / "raw.jsonl", [raw()]), tmp_path / "out"
    words = "nanoredi/prepare.py", "--raw", file, "--tokenizer", toy_data / "tokenizer", "--out", out
    killed, done = (ended(forks.start(tmp_path, *words, **more)) for more in ({"NANOREDI_CRASH_AT": "1"}, {}))
    assert killed.returncode == -signal.SIGKILL and done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["pairs.jsonl", "sft.jsonl", "too_long.jsonl"]


def test_out_that_cannot_be_written(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", [raw()])
    with pytest.raises(UserError, match="cannot write to .*raw.jsonl"):
        prepared([file], tokenizer, file)


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


def test_as_a_command(tmp_path, toy_data, run):
    write(tmp_path / "raw.jsonl", ROWS.values())
    flags = "--raw raw.jsonl --max_prompt_tokens 8 --max_response_tokens 10 --out out --tokenizer".split()
    first, second = (run("nanoredi/prepare.py", *flags, toy_data / "tokenizer") for _ in range(2))
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert [int(line.split()[-1]) for line in lines[: len(COUNTS)]] == COUNTS
    assert len(lines) == len(COUNTS) + 1 and "paper" not in first.stdout
    refusal = "error: out/sft.jsonl is there already: move it away or give another --out\n"
    assert (second.returncode, second.stderr) == (2, refusal)
