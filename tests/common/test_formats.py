"""Every format gives the rows that JSONL gives, and a damaged file is named."""

import datetime
import gzip
import json
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_rows
from nanoredi.common.formats import num_rows

ROWS = [{"prompt": "é", "n": i, "messages": [{"role": "user", "content": "x" * i}]} for i in range(150)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TEXTS = {
    "plain.jsonl": LINES,
    "mark.jsonl": b"\xef\xbb\xbf" + LINES,
    "windows.jsonl": LINES.replace(b"\n", b"\r\n\r\n"),
    "zipped.jsonl.gz": gzip.compress(LINES, mtime=0),
    "zipped-without-its-name.jsonl": gzip.compress(LINES[:1000], mtime=0) + gzip.compress(LINES[1000:]),
    "list.json": json.dumps(ROWS).encode(),
    "list.jsonl": b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=1).encode(),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(TEXTS[name])
    assert [row for _, row in read_rows(str(path))] == ROWS
    assert num_rows(path) == len(ROWS)


SMALL = [{"problem": 'a, "b"\nc', "answer": "1"}, {"problem": "é", "answer": "2"}]
COLUMNS = {name: [row[name] for row in SMALL] for name in SMALL[0]}
WHOLE = {
    "rows.json": {str(i): row for i, row in enumerate(SMALL)},
    "columns.json": COLUMNS,
    "pandas.json": {name: {str(i): value for i, value in enumerate(own)} for name, own in COLUMNS.items()},
    "samples.json": {"version": 2, "samples": SMALL},
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", WHOLE)
def test_rows_of_one_json_object(tmp_path, name, indent):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(WHOLE[name], indent=indent).encode())
    assert [row for _, row in read_rows(str(path))] == SMALL and num_rows(path) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"choices": [{"text": "x"}], "usage": {}},
        {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]},
        {"problem": "x", "examples": [{"problem": "y", "answer": "1"}], "answer": "2"},
    ],
)
def test_an_object_that_is_itself_the_row(tmp_path, row):
    (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
    assert [row for _, row in read_rows(str(tmp_path / "one.json"))] == [row]


@pytest.mark.parametrize("name, between", [("a.csv", ","), ("A.CSV", ","), ("a.tsv", "\t")])
def test_csv(tmp_path, name, between):
    text = f'\ufeffproblem{between}answer\r\n"a, ""b""\nc"{between}1\r\né{between}2\r\n'
    (tmp_path / name).write_bytes(text.encode())
    assert [row for _, row in read_rows(str(tmp_path / name))] == SMALL and num_rows(tmp_path / name) == 2


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "data-00000-of-00002.arrow").touch()
    words = "is a folder: give the file .* such as .*test/data-00000-of-00002.arrow"
    with pytest.raises(UserError, match=f"{words}$"):
        list(read_rows(str(tmp_path)))
    (tmp_path / "test" / "data-00001-of-00002.arrow").touch()  # so the first file is not all there is
    with pytest.raises(UserError, match=f"{words}, the first of 2$"):
        list(read_rows(str(tmp_path)))


def test_a_data_set_s_name_on_the_hub_is_no_file():
    with pytest.raises(
        UserError, match="there is no file a/B-1.1; .* hf download a/B-1.1 --repo-type dataset --local-dir"
    ):
        list(read_rows("a/B-1.1"))
    for path in ("a/b.jsonl", "a/b.json", "a/b/c", "nothing"):
        with pytest.raises(UserError, match=f"cannot read {path}: No such file"):
            list(read_rows(path))


def test_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    parquet.write_table(table, tmp_path / "B.PARQUET")
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    for path in tmp_path.iterdir():
        assert [row for _, row in read_rows(str(path))] == ROWS
        assert list(read_rows(str(path), ("n", "none")))[149] == (f"{path}, row 150", {"n": 149})
        assert num_rows(path) == len(ROWS)


def test_a_table_s_values_become_json_values(tmp_path):
    """Times in other columns, or inside messages, do no harm."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    day = datetime.datetime(2026, 1, 2, 3, 4, 5)
    table = pyarrow.table(
        {
            "prompt": ["Q", "R"],
            "score": [float("nan"), 0.1],
            "at": pyarrow.array([1, None], pyarrow.timestamp("ns")),
            "far": pyarrow.array([10**18, None], pyarrow.timestamp("us")),
            "bytes": ["größer".encode(), b"\xff"],
            "messages": [[{"content": "x", "at": day, "cost": Decimal("1.50")}], []],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = (row for _, row in read_rows(str(tmp_path / "a.parquet")))
    assert first == {
        "prompt": "Q",
        "score": None,
        "at": "1970-01-01 00:00:00.000000001",
        "far": "<value out of range: 1000000000000000000>",
        "bytes": "größer",
        "messages": [{"content": "x", "at": "2026-01-02 03:04:05", "cost": "1.50"}],
    }
    assert second == {"prompt": "R", "score": 0.1, "at": None, "far": None, "bytes": None, "messages": []}
    assert list(read_rows(str(tmp_path / "a.parquet"), ("none",)))[1] == (f"{tmp_path / 'a.parquet'}, row 2", {})


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", None, "cannot read .*a.jsonl: No such file"),
        ("a.jsonl.gz", TEXTS["zipped.jsonl.gz"][:-50], "cannot read .*a.jsonl.gz: "),
        ("a.jsonl.gz", TEXTS["zipped.jsonl.gz"][:40] + b"\0" * 60, "cannot read .*a.jsonl.gz: "),
        ("a.json", b'[{"a": 1},', "a.json, which begins as a list, is n"),
        ("a.json", b"[" * 10**5, "a.json, which begins as a list, is n"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "a.jsonl, line 2 is not UTF-8 text: [^;]*$"),
        ("a.jsonl", b'{"a": 1}\n\n[}\n', "a.jsonl, line 3 is not JSON: [^;]*$"),
        (
            "a.txt",
            b"prompt,answer\n",
            r"a.txt, line 1 is not JSON: .*; rows are JSONL \(an object a line\), a JSON list",
        ),
        ("a.zst", b"(\xb5/\xfd", "a.zst, line 1 is not UTF-8 text: .*; rows are JSONL"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv, row 1 has more cells than"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv: its first line names the column 'a' twice"),
        ("a.csv", b'a\n"x', "cannot read .*a.csv: unexpected end of data"),
        ("a.csv", b"a\n\xe9\n", "cannot read .*a.csv: .*utf-8"),
        ("a.json", b'{\n"a": 1}\n{\n"a": 2}', "a.json, which begins as an object, is not JSON: Extra data"),
        ("a.parquet", b"PAR1", "cannot read .*a.parquet: "),
        ("a.arrow", b"ARROW1\0\0\0\0", "cannot read .*a.arrow: "),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, words):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_rows(str(tmp_path / name)))


def test_tables_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match=f"{name} takes pyarrow to read: pip install pyarrow"):
            num_rows(Path(name))
