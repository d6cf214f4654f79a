"""Input from outside is bounded and has a declared shape, or is refused in one sentence."""

import pytest

from nanoredi.common.errors import UserError
from nanoredi.common.files import check, parse_json, read_json, read_rows, write_json, write_row


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "nested more than 100 levels deep"),
        ("[" * 101 + "]" * 101, "nested more than 100 levels deep"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": [-Infinity]}', "-Infinity is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ("9" * 5000, "is not JSON"),
        ("", "is not JSON"),
        ('{"a": 1', "is not JSON"),
        ('{"a": [{"b": 1, "c": 2, "b": null}]}', "is not JSON: it has 'b' twice, with two values"),
    ],
)
def test_json_beyond_its_bounds(text, words, tmp_path):
    with pytest.raises(UserError, match=f"^here .*{words}"):
        parse_json("here", text)
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=f"f.json .*{words}"):
        read_json(tmp_path / "f.json")
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n\n' + text + "\n")
    if text:
        with pytest.raises(UserError, match=f"f.jsonl, line 3 .*{words}"):
            list(read_rows(str(tmp_path / "f.jsonl")))


def test_json_within_its_bounds():
    text = '{"a": ' + "[" * 98 + '"' + "{[" * 1000 + '"' + "]" * 98 + "}"
    assert parse_json("here", text)
    assert parse_json("here", '{"a": 1, "b": 2, "a": 1}') == {"a": 1, "b": 2}
    assert parse_json("here", "[1e300, 12345678901234567890]") == [1e300, 12345678901234567890]


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Windows' editors write one, and joined files have one in the middle."""
    (tmp_path / "f.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "f.json") == {}
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    assert [row for _, row in read_rows(str(tmp_path / "f.jsonl"))] == [{"a": 1}, {"a": 2}]


def test_a_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("nanoredi.common.files.MAX_CHARS", 1000)
    monkeypatch.setattr("nanoredi.common.formats.MAX_CHARS", 1000)
    (tmp_path / "f.jsonl").write_text('"' + "a" * 5000)
    with pytest.raises(UserError, match="line 1 is longer than 1,000 characters"):
        list(read_rows(str(tmp_path / "f.jsonl")))
    with pytest.raises(UserError, match="f.jsonl is longer than"):
        read_json(tmp_path / "f.jsonl")


SHAPE = {"step": range(1, 10), "loss": (float, None), "name?": str, "parts": [range(5)], "files?": {str: [int]}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step": 0}, "step is 0; it must be a whole number from 1 to 9"),
        ({"step": 3.0}, "step is 3.0"),
        ({"step": True}, "step is True"),
        ({"step": "3"}, "step is '3'"),
        ({"loss": "x"}, "loss is 'x'; it must be a number or null"),
        ({"loss": 10**400}, "loss is 1000"),
        ({"name": None}, "name is None; it must be text"),
        ({"parts": [1, 2, 7]}, r"parts\[2\] is 7; it must be a whole number from 0 to 4"),
        ({"parts": {}}, "parts is {}; it must be a list"),
        ({"files": {"a": [1], "b": ["c"]}}, r"files.b\[0\] is 'c'"),
    ],
)
def test_a_declared_shape(change, words):
    value = {"step": 3, "loss": None, "parts": [], "other": object()}
    assert check("here", value, SHAPE) is value
    assert check("here", {**value, "loss": 2, "name": "x", "files": {"a": [1]}}, SHAPE)
    with pytest.raises(UserError, match=f"^here: {words}"):
        check("here", {**value, **change}, SHAPE)


def test_a_missing_field_and_another_kind():
    with pytest.raises(UserError, match="^here: the object has no field 'loss'"):
        check("here", {"step": 3}, SHAPE)
    with pytest.raises(UserError, match=r"^here: it is \[\]; it must be an object"):
        check("here", [], SHAPE)


def test_rows_are_written_as_whole_lines(tmp_path):
    with open(tmp_path / "f.jsonl", "ab", buffering=0) as file:
        write_row(file, {"a": "\ud800 é"})
        write_row(file, {"b": 1})
    assert [row for _, row in read_rows(str(tmp_path / "f.jsonl"))] == [{"a": "? é"}, {"b": 1}]
    with open("/dev/full", "ab", buffering=0) as file, pytest.raises(OSError, match="'/dev/full'"):
        write_row(file, {"b": 1})
    write_json(tmp_path / "f.json", {"a": "\ud800 é"})
    assert read_json(tmp_path / "f.json") == {"a": "? é"}
