"""Completions in objects and lists within a row, also where these are written as text."""

import json
import time

import pytest
from completions import RIGHT, WRONG, graded, written

from nanoredi.common.errors import UserError
from nanoredi.evaluation.completions import grade_file

ANTHROPIC = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": RIGHT}]}
GEMINI = {
    "candidates": [{"content": {"parts": [{"text": RIGHT[:4]}, {"text": RIGHT[4:]}]}, "finishReason": "MAX_TOKENS"}]
}


@pytest.mark.parametrize(
    "row",
    [
        {"response": ANTHROPIC},
        {"response": GEMINI},
        {"modelInput": {"messages": []}, "modelOutput": ANTHROPIC},
        {"custom_id": "request-1", "response": {"choices": [{"message": {"content": RIGHT}}]}},
        {"response": json.dumps({"choices": [{"message": {"content": RIGHT}}]})},
        {"inputs": {"question": "?"}, "outputs": {"output": RIGHT}},
        {"output": [{"generated_text": RIGHT}]},
        {"message": {"role": "assistant", "content": ANTHROPIC["content"]}, "usage": {"tokens": {"output_tokens": 3}}},
        {"Response": RIGHT, "prediction": "3"},
        {"choices": [], "outputs": None, "response": "", "output": RIGHT},
        {"output": '[{"step": 1}]' + RIGHT},
        {"completion": RIGHT, "tokens": 3.0},
    ],
)
def test_objects_within_objects(tmp_path, row):
    rows = [{"question": "What is 1+1?", "answer": "2", **row}]
    (samples,) = grade_file(written(tmp_path, rows), "m", [], thinking=True)
    assert [s["correct"] for s in samples] == [True]
    assert samples[0]["finish_reason"] == ("length" if row.get("response") is GEMINI else None)


@pytest.mark.parametrize("texts", [[RIGHT, WRONG], repr([RIGHT, WRONG]), json.dumps([RIGHT, WRONG])])
@pytest.mark.parametrize("name", ["predictions", "responses", "generation"])
def test_lists_of_completions_with_details_of_each(tmp_path, name, texts):
    row = {
        "problem": "What is 1+1?",
        "gold": "['2']",
        name: texts,
        "finish_reasons": ["stop", "length"],
        "tokens": [3, 4],
    }
    (samples,) = grade_file(written(tmp_path, [row]), "m", [], thinking=True)
    assert [(s["correct"], s["finish_reason"], s["tokens"]) for s in samples] == [
        (True, "stop", 3),
        (False, "length", 4),
    ]


def test_json_in_json_is_read_in_a_time_that_its_length_bounds(tmp_path):
    text, begin = RIGHT, time.perf_counter()
    for _ in range(12):  # a way that took four times as long for each would take hours
        text = json.dumps({"text": text})
    rows = [{"prompt": "What is 1+1?", "answer": "2", "output": text}]
    assert graded(tmp_path, rows)[0] == [(0, 0, True)] and time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 2}]',
        '{"value": 2}',
        '[{"text": "2"}, 3]',
        "[]",
        "[{'a': 2}]",
        "[{'role': 'user'}]",
        '{"prediction": "2"}',
    ],
)
def test_json_written_by_the_model(tmp_path, benchmark, text):
    rows = [{"prompt": problem, "output": text} for problem, text in zip(benchmark.problems, (text, RIGHT))]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=False)
    assert [(s["response"], s["correct"]) for s in samples] == [(text, False), (RIGHT, False)]


@pytest.mark.parametrize(
    "cell, correct",
    [
        ([{"index": 0, "text": RIGHT}, {"index": 1, "text": WRONG}], [True, False]),
        ([{"generated_text": RIGHT}], [True]),
        ({"message": {"role": "assistant", "content": RIGHT}}, [True]),
        ({"role": "assistant", "content": [{"type": "text", "text": RIGHT}]}, [True]),
    ],
)
def test_objects_written_as_text(tmp_path, cell, correct):
    rows = [{"prompt": "What is 1+1?", "answer": r"\frac{4}{2}", "output": json.dumps(cell, indent=1)}]
    assert [right for *_, right in graded(tmp_path, rows)[0]] == correct
    with pytest.raises(UserError, match="c.jsonl: its completions are objects written as Python's text"):
        graded(tmp_path, [{**rows[0], "output": text} for text in (str(cell), "", "")])
    conversation = [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": RIGHT}]
    assert graded(tmp_path, [{"messages": json.dumps(conversation), "gold": "2"}])[0] == [(0, 0, True)]
