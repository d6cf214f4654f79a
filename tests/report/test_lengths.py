"""Length distributions, from the rows or by a tokenizer."""

import json

import numpy as np
import pytest

from nanoredi.common.errors import UserError
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.report import __main__ as report
from nanoredi.report import lengths

PAIR = {"prompt": "a=1b+2", "chosen": "b+2=3;", "rejected": "b+2=4;c"}


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sizes(*numbers):
    return dict(zip(("prompt_tokens", "chosen_tokens", "rejected_tokens"), numbers))


@pytest.fixture
def folder(tmp_path):
    """A folder as prepare writes it: 100 pairs, 8 of them at the limits, and 5 that are too long."""
    pairs = [sizes(i + 1, 200 * i + 1, 300) for i in range(92)] + [sizes(800, 19_000, 19_000)] * 8
    longer = [
        sizes(801, 1, 1),
        sizes(1, 19_001, 1),
        sizes(1, 1, 40_000),
        sizes(900, 20_000, 20_000),
        sizes(1, 1, 19_001),
    ]
    write(tmp_path / "data" / "pairs.jsonl", *pairs)
    write(tmp_path / "data" / "too_long.jsonl", *longer)
    write(tmp_path / "data" / "sft.jsonl", *({"prompt_tokens": 7, "response_tokens": n} for n in (10, 20, 60_000)))
    return tmp_path / "data"


def test_a_folder_of_prepare(folder, capsys):
    report.main(["--lengths", str(folder)])
    sft, pairs = capsys.readouterr().out.split(f"{folder / 'pairs.jsonl'}: ")
    assert "tokens of 3 rows" in sft and "limit" not in sft
    assert pairs.startswith("tokens of 105 pairs")
    table = {line.split()[0]: line.split()[1:] for line in pairs.splitlines()[2:7] if line.split()}
    assert table["min"] == "10 % 25 % 50 % 75 % 90 % 99 % max mean limit longer".split()
    chosen = [200 * i + 1 for i in range(92)] + [19_000] * 8 + [1, 19_001, 1, 20_000, 1]
    quantiles = np.percentile(chosen, [0, 10, 25, 50, 75, 90, 99, 100])
    assert table["chosen"] == [f"{x:,.0f}" for x in (*quantiles, np.mean(chosen))] + ["19,000", "2"]
    assert table["prompt"][-2:] == ["800", "2"] and table["rejected"][-2:] == ["19,000", "3"]
    assert "The limits cut 5 of 105 pairs (4.8%)." in pairs


def test_other_limits(folder, capsys):
    report.main(["--lengths", str(folder / "pairs.jsonl"), "--max_prompt_tokens", "50", "--max_response_tokens=50000"])
    out = capsys.readouterr().out
    assert "The limits cut 52 of 105 pairs" in out and "sft.jsonl" not in out


def test_a_histogram_counts_every_row_once():
    rng = np.random.default_rng(0)
    for tokens in (rng.lognormal(8, 1, 5000).astype(int) + 1, np.array([1]), np.full(9, 12), np.array([1, 100_000])):
        lines = lengths.histogram(tokens, 3000)
        assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == len(tokens)
    lines = lengths.histogram(np.array([100] * 4 + [101] * 2 + [1200]), limit=100)
    assert lines[0].endswith("1 to 100      " + "█" * 50 + " 4")
    assert lines[1].endswith("101 to 200      " + "░" * 25 + " 2")
    assert len(lines) == 12


def test_rows_without_lengths_are_measured(tmp_path, toy_data, capsys):
    file = write(tmp_path / "mine.jsonl", PAIR, {**PAIR, "chosen": [{"role": "assistant", "content": "b"}]})
    with pytest.raises(UserError, match="mine.jsonl, line 1 holds no lengths; --tokenizer DIR measures them"):
        report.main(["--lengths", str(file)])
    found = lengths.read_lengths(file, Tokenizer(toy_data / "model"))
    assert {part: tokens.tolist() for part, tokens in found.items()} == {
        "prompt": [8, 8],  # the role, the text, and 1 more, as prepare counts
        "chosen": [8, 3],
        "rejected": [9, 9],
    }
    report.main(["--lengths", str(toy_data / "sft.jsonl"), "--tokenizer", str(toy_data / "model")])
    assert "tokens of 120 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "rows.jsonl holds no rows"),
        ([[1]], "row 1 holds no lengths"),
        ([sizes(1, 2, 3), sizes(1, 2)], "line 2 holds no lengths"),
        ([sizes(1, 0, 3)], "line 1 holds no lengths"),
        ([sizes(1, 2, 3), {"prompt_tokens": 1, "response_tokens": 2}], "holds both pairs and rows with messages"),
    ],
)
def test_bad_rows(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        report.main(["--lengths", str(write(tmp_path / "rows.jsonl", *rows))])


def test_bad_flags(tmp_path):
    for flags, words in (
        (["--lengths"], "--lengths: expected one argument"),
        (["--lengths", str(tmp_path / "absent.jsonl")], "cannot read .*absent.jsonl"),
        (["--lengths", "x", "--max_prompt_token", "3"], "did you mean '--max_prompt_tokens'"),
        (["--lengths", "x", "run"], "--lengths takes one folder and makes a report of its own: leave out run"),
        (["--lengths", "x", "--out", "f.png"], "leave out --out"),
    ):
        with pytest.raises(UserError, match=words):
            report.main(flags)
