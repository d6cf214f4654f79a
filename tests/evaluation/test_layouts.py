"""Rows of other engines, each in its layout, give the same samples."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from completions import PROBLEMS, RIGHT, WRONG, graded, rows_of, written
from conftest import ROOT

from nanoredi.common.errors import UserError
from nanoredi.evaluation.completions import grade_file
from nanoredi.evaluation.layouts import LAYOUTS as FIELDS

BOX = r"\boxed{2}"
LAYOUTS = ["vllm", "run-batch", "rllm", "lighteval", "older lighteval", "sample.py"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, benchmark, layout):
    (samples,) = grade_file(written(tmp_path, rows_of(layout)), "m", [benchmark], thinking=True)
    assert [(s["problem"], s["sample"], s["correct"]) for s in samples] == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, True),
        (1, 1, False),
    ]
    assert samples[3]["response"] == "<think>\nWait" and samples[3]["waits"] == 1
    assert {s["tokens"] for s in samples} == ({9} if layout in ("vllm", "lighteval", "sample.py") else {None})
    assert {s["finish_reason"] for s in samples} == (
        {"stop"} if layout in ("vllm", "run-batch", "sample.py") else {None}
    )


@pytest.mark.parametrize("layout", ["rllm", "lighteval", "older lighteval"])
def test_gold_answers_in_the_file(tmp_path, layout):
    (samples,) = grade_file(written(tmp_path, rows_of(layout)), "m", [], thinking=True)
    assert [s["correct"] for s in samples] == [True, False, True, False] and samples[0]["benchmark"] == "c"


def test_thinking_in_a_separate_field(tmp_path, benchmark):
    messages = [{"reasoning_content": r"\boxed{9}", "content": r"\boxed{2}"}, {"reasoning": "hm", "content": None}]
    rows = [{"response": {"body": {"choices": [{"message": m}], "usage": {"completion_tokens": 3}}}} for m in messages]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=False)
    assert [(s["correct"], s["answer"], s["tokens"]) for s in samples] == [(True, "2", 3), (False, None, 3)]


def test_without_thinking_the_whole_text_counts(tmp_path, benchmark):
    rows = [{"prompt": p, "completion": f"\\boxed{{{a}}}"} for p, a in PROBLEMS]
    path = written(tmp_path, rows)
    (samples,) = grade_file(path, "m", [benchmark], thinking=False)
    assert all(s["correct"] for s in samples)
    (samples,) = grade_file(path, "m", [benchmark], thinking=True)
    assert not any(s["correct"] for s in samples)  # thinking never ended


EXAMPLES = re.findall(r"```json\n(.*?)\n```", (ROOT / "docs" / "layouts.md").read_text(), re.DOTALL)


def second(example):
    """The same row for problem 2."""
    text = example.replace("1+1?", "1+1? And 2+2?").replace("boxed{2}", "boxed{4}").replace('"2"', '"4"')
    row = json.loads(text.replace("request-1", "request-2").replace('"doc_id": 0', '"doc_id": 1'))
    return {**row, "problem": 1} if row.get("problem") == 0 else row


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_docs(tmp_path, benchmark, example, capsys):
    rows = [second(example), json.loads(example)]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True)
    failed = "not done in time" in example
    assert [(s["problem"], s["correct"], s["gold"]) for s in samples] == [
        (0, not failed, ["2"]),
        (1, not failed, ["4"]),
    ]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == failed and (
        not failed or "2 of 2 requests failed" in said[0] and "'not done in time'" in said[0]
    )
    counted = any(word in example for word in ("token_ids", "_tokens", '"tokens"', "eval_count", "tokens_"))
    assert {s["tokens"] for s in samples} == ({3} if counted else {None})


def test_every_layout_has_an_example():
    for path in FIELDS:
        assert any(f'"{path.split(".")[-1]}"' in example for example in EXAMPLES), path


GOLDS = (
    r'("answer"|"gold"|"gold_answer"|"expected_answer"|"label"|"gts"|"gt"|"ground_truth"|"target"|"choices"(?=: \["))'
)


@pytest.mark.parametrize(
    "example",
    [e for e in EXAMPLES if re.search(GOLDS, e)],
)
def test_gold_answers_in_the_examples(tmp_path, example):
    (samples,) = grade_file(written(tmp_path, [json.loads(example), second(example)]), "m", [], thinking=True)
    assert [(s["correct"], s["gold"]) for s in samples] == [(True, ["2"]), (True, ["4"])]
    other = re.sub(GOLDS + r': ("2"|\["2"\])', r'\1: "7"', example)
    other = other.replace('"choices": "7"', '"choices": ["7"]')
    assert not grade_file(written(tmp_path, [json.loads(other)]), "m", [], thinking=True)[0][0]["correct"]


@pytest.mark.parametrize(
    "row, reasons",
    [
        ({"text": [r"\boxed{2}", "2"], "meta_info": [{"completion_tokens": 3}] * 2}, [None, None]),
        ({"choices": [{"message": {"content": [r"\boxed{2}", "2"]}}]}, [None, None]),
        ({"generations": [{"role": "assistant", "content": text} for text in (r"\boxed{2}", "2")]}, [None, None]),
        ({"message": {"role": "assistant", "content": r"\boxed{2}"}, "done_reason": "length"}, ["length"]),
        ({"content": r"\boxed{2}", "stop_type": "limit", "tokens": []}, ["length"]),
        ({"role": "assistant", "content": r"\boxed{2}", "stop_reason": "max_tokens"}, ["length"]),
        ({"output": r"\boxed{2}", "incomplete_details": {"reason": "max_output_tokens"}}, ["length"]),
        (
            {"inputs": "What is 1+1?", "generated_text": r"\boxed{2}", "details": {"finish_reason": "length"}},
            ["length"],
        ),
    ],
)
def test_lists_of_texts_with_finish_reasons(tmp_path, row, reasons):
    rows = [{"prompt": "What is 1+1?", "answer": "2", **row}]
    (samples,) = grade_file(written(tmp_path, rows), "m", [], thinking=False)
    assert [(s["correct"], s["finish_reason"]) for s in samples] == list(zip([True, False], reasons))


@pytest.mark.parametrize(
    "row",
    [
        {"error": {"message": "down"}, "content": "q"},
        {"error": {"message": "down"}, "message": {"role": "user", "content": "What is 1+1?"}},
        {"error": "down", "code": ["E42"]},
        {"response": None, "error": {"message": "down"}, "message": {"role": "assistant", "content": "2"}},
    ],
)
def test_text_beside_an_error_is_no_completion(tmp_path, row, capsys):
    rows = [{"prompt": "What is 1+1?", "answer": "2", **row}]
    grade_file(written(tmp_path, rows), "m", [], thinking=False)
    said = capsys.readouterr().out
    assert "1 of 1 requests failed" in said and "'down'" in said


@pytest.mark.parametrize(
    "row",
    [
        {"message": {"role": "assistant", "content": r"\boxed{2}", "thinking": "one and one"}},
        {"response": r"\boxed{2}", "thinking": "one and one", "done_reason": "stop"},
        {"output": r"\boxed{2}", "reasoning_content": "one and one"},
        {"messages": [{"role": "assistant", "content": r"\boxed{2}", "reasoning_content": "one and one"}]},
        {"question": "What is 1+1?", "content": "a passage", "code": [r"\boxed{2}"]},
        {"choices": ["1", "2"], "code": [r"\boxed{2}"]},
        {"text": "What is 1+1?", "content": r"\boxed{2}", "stop_type": "eos"},
        {"text": "What is 1+1?", "message": {"role": "assistant", "content": r"\boxed{2}"}},
    ],
)
def test_fields_that_are_no_completion(tmp_path, row):
    rows = [{"prompt": "What is 1+1?", "answer": "2", **row}]
    thinks = "one and one" in str(row)
    ((sample,),) = grade_file(written(tmp_path, rows), "m", [], thinking=thinks)
    assert sample["correct"] and ("one and one" in sample["response"]) == thinks


def test_a_response_of_another_api_is_no_failed_request(tmp_path, benchmark):
    rows = [{"key": "1", "response": {"results": [{"generated": "2"}]}}]
    with pytest.raises(UserError, match="line 1 is in no known layout"):
        grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True)


def test_lm_eval_s_messages_and_filters(tmp_path, benchmark):
    rows = []
    for i, problem in enumerate(benchmark.problems):
        chat = json.dumps([{"role": "user", "content": f"\\frac: {problem}\n"}])
        of = {"doc_id": i, "doc": {}, "arguments": {"gen_args_0": {"arg_0": [chat], "arg_1": {"until": ["Q:"]}}}}
        row = {**of, "resps": [[rf"</think>\boxed{{{2 * i + 2}}}", "x"]], "filtered_resps": [["x"]]}
        rows += [{**row, "filter": "strict-match"}, {**row, "filter": "flexible-extract"}]
    both = [(0, 0, True), (0, 1, False), (1, 0, True), (1, 1, False)]
    assert graded(tmp_path, rows, benchmark)[0] == both
    assert graded(tmp_path, [*rows[:2], {**rows[2], "filter": "none"}], benchmark)[0] == both  # of two tasks
    # What ends the answer is no end of the prompt.
    arguments = {"gen_args_0": {"arg_0": "What is 1+1?<think>", "arg_1": {"until": ["Q:"]}}}
    row = {"arguments": arguments, "target": "2", "resps": [[r"Maybe \boxed{2}"]], "filter": "none"}
    assert graded(tmp_path, [row], thinking=False)[0] == [(0, 0, False)]


@pytest.mark.parametrize(
    "row, right",
    [
        ({"output": [{"type": "reasoning", "summary": []}, {"type": "message", "content": [{"text": BOX}]}]}, True),
        ({"content": [{"type": "thinking", "thinking": ""}, {"type": "text", "text": BOX}], "role": "assistant"}, True),
        ({"content": [{"type": "redacted_thinking", "data": "?"}, {"type": "text", "text": BOX}], "stop": True}, True),
        ({"output": f"<think>Maybe {BOX}", "reasoning": "on"}, False),
        ({"output": f"Maybe {BOX}", "reasoning": "high"}, False),
        ({"output": f"Maybe {BOX}", "reasoning": "X-High"}, False),
        ({"output": f"Maybe {BOX}", "thinking": "True"}, False),
        ({"output": BOX, "thinking": "Yes, 1+1=2."}, True),
        ({"output": BOX, "thinking": "一加一等于二"}, True),
    ],
)
def test_thinking_that_is_not_shown_has_ended_and_a_switch_is_no_thinking(tmp_path, row, right):
    rows = [{"prompt": "What is 1+1?", "answer": "2", "stop": True, **row}]
    assert graded(tmp_path, rows)[0] == [(0, 0, right)]


ASKED = {"role": "user", "content": "What is 1+1?"}


@pytest.mark.parametrize("opening", ["<think>", "<think>\n"])
@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_a_prompt_that_opens_the_thinking(tmp_path, name, opening):
    for prompt in (f"What is 1+1?{opening}", [ASKED, {"role": "assistant", "content": opening}]):
        for field in ("output", "prediction"):
            rows = [{name: prompt, "gold": "2", field: text} for text in (f"Maybe {BOX}", f"So</think>{BOX}")]
            assert graded(tmp_path, rows, thinking=False) == ([(0, 0, False), (0, 1, True)], [])


def test_empty_responses(tmp_path, benchmark, capsys):
    short, long = benchmark.problems
    rows = [
        {"prompt": short, "choices": [{"message": {"content": None, "reasoning_content": None}}]},
        {"prompt": long, "output": None},
        {"prompt": short, "choices": [{"message": {"role": "assistant"}, "finish_reason": "content_filter"}]},
        {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": None}]},
        {"prompt": short, "response": {"candidates": [{"content": {"parts": [], "role": "model"}}]}},
        {"prompt": long, "response": ""},
    ]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=False)
    assert f"{tmp_path}/c.jsonl: 6 of 6 completions are empty and count as wrong" in capsys.readouterr().out
    assert [s["response"] for s in samples] == [""] * 6 and not any(s["correct"] for s in samples)


@pytest.mark.parametrize(
    "reason, kept",
    [
        ({"type": "length", "length": 9}, "length"),
        ({"type": "stop", "matched": 1}, "stop"),
        ({"reason": "length"}, "length"),
        ("MAX_TOKENS", "length"),
        ("model_context_window_exceeded", "length"),
    ],
)
def test_finish_reasons(tmp_path, benchmark, reason, kept):
    outputs = [[{"text": "x", "finish_reason": reason}], [{"text": "x", "meta_info": {"finish_reason": reason}}]]
    rows = [{"prompt": p, "outputs": out} for p, out in zip(benchmark.problems, outputs)]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=False)
    assert [s["finish_reason"] for s in samples] == [kept, kept]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"tokens": "9.5"}, "line 1: its number of tokens is '9.5'; it must be a whole number"),
        ({"tokens": True}, "its number of tokens is True"),
        ({"tokens": -1}, "its number of tokens is -1"),
        ({"finish_reason": 3}, "its finish_reason is 3; it must be text"),
        ({"finish_reason": [3]}, "its finish_reason is 3; it must be text"),
        ({"benchmark": "b", "problem": 0, "sample": []}, r"its 'sample' is \[\]; it must be a whole number"),
        ({"completion": {"a": 1}}, "line 1: its completion is {'a': 1}; it must be text"),
        ({"completion": []}, "its 'completion' holds no completion"),
    ],
)
def test_fields_of_a_wrong_type_are_named(tmp_path, benchmark, more, words):
    with pytest.raises(UserError, match=words):
        graded(tmp_path, [{"prompt": "What is 1+1?", "completion": "x", **more}], benchmark)


@pytest.mark.parametrize(
    "more, tokens",
    [
        ({"completion_tokens": [512]}, 512),
        ({"output_tokens": [[7, 8, 9]]}, 3),
        ({"token_ids": [512]}, 1),
        ({"output_ids": [7, 8]}, 2),
        ({"tokens": [{"text": "2"}]}, 1),
        ({"token_ids": []}, None),
    ],
)
def test_counts_and_lists_of_the_tokens_of_one_completion(tmp_path, benchmark, more, tokens):
    rows = [{"prompt": problem, "responses": ["2"], **more} for problem in benchmark.problems]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True)
    assert [s["tokens"] for s in samples] == [tokens] * 2


def test_an_unknown_layout_is_described(tmp_path, benchmark):
    with pytest.raises(
        UserError,
        match="no known layout: it has the fields prompt, reply, and completions are looked for in .* outputs,",
    ):
        graded(tmp_path, [{"prompt": "What is 1+1?", "reply": "2"}], benchmark)


def test_parquet_is_read_directly(tmp_path, benchmark):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [*rows_of("lighteval")]
    for row in rows:
        row["metric"] = {"score": 1.0}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "details.parquet")
    (samples,) = grade_file(str(tmp_path / "details.parquet"), "m", [benchmark], thinking=True)
    assert [s["correct"] for s in samples] == [True, False, True, False] and samples[0]["tokens"] == 9
    rows = [{"prompt": p, "output": "x", "tokens": n} for p, n in zip(benchmark.problems, (3.0, math.nan))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pandas.parquet")
    (samples,) = grade_file(str(tmp_path / "pandas.parquet"), "m", [benchmark], thinking=True)
    assert [s["tokens"] for s in samples] == [3, None]


def test_a_reader_may_leave_before_the_list_of_layouts_is_printed():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nanoredi.evaluation.completions"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "piece",
    [
        {"response": "2", "done": False},
        {"message": {"role": "assistant", "content": "2"}, "done": False},
        {"content": "2", "stop": False, "tokens": [5]},
        {"object": "chat.completion.chunk", "choices": [{"delta": {"content": "2"}, "finish_reason": None}]},
    ],
)
def test_a_streaming_chunk_is_no_completion(tmp_path, benchmark, piece):
    with pytest.raises(UserError, match="line 1 is a piece of a stream"):
        graded(tmp_path, [piece] * 2, benchmark)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"custom_id": "request-1", "result": {"type": "expired"}}, "'expired'"),
        ({"key": "1", "response": {"promptFeedback": {"blockReason": "SAFETY"}}}, "SAFETY"),
        ({"model_output": {"content": None}, "response": "x", "error": "down"}, "'down'"),
    ],
)
def test_other_requests_that_failed(tmp_path, benchmark, row, words):
    rows = [{"prompt": benchmark.problems[0], **row}, {"prompt": benchmark.problems[1], "response": RIGHT}]
    done, said = graded(tmp_path, rows, benchmark)
    assert done == [(0, 0, False), (1, 0, False)] and "1 of 2 requests failed" in said[-1] and words in said[-1]


@pytest.mark.parametrize("name", ["gold_answer", "target"])
def test_a_gold_answer_and_a_response_named_answer(tmp_path, name):
    rows = [{"problem": "What is 1+1?", "response": WRONG, "answer": WRONG, name: "2"}]
    assert graded(tmp_path, rows) == ([(0, 0, False)], [])


@pytest.mark.parametrize("name", ["answer", "label"])
def test_a_field_that_may_be_the_model_s_answer_is_named(tmp_path, name):
    rows = [{"prompt": prompt, "output": rf"</think>\boxed{{{gold}}}", name: gold} for prompt, gold in ("b2", "a3")]
    done, (said,) = graded(tmp_path, [*rows, {**rows[0], "output": WRONG}, rows[1]])
    assert done == [(0, 0, True), (0, 1, False), (1, 0, True), (1, 1, True)]  # in the order of the file
    assert f"its own '{name}' is taken for the gold answer" in said


@pytest.mark.parametrize("box, right", [("B", True), ("5", True), ("1", False), ("A", False)])
def test_a_gold_answer_that_indexes_choices(tmp_path, box, right):
    rows = [{"question": "q", "choices": ["4", "5"], "answer": 1, "response": rf"</think>\boxed{{{box}}}"}]
    assert graded(tmp_path, rows)[0] == [(0, 0, right)]


@pytest.mark.parametrize("box", [0, 7])
def test_a_number_among_a_completion_s_choices_stays_a_number(tmp_path, box):
    choices = [{"message": {"role": "assistant", "content": rf"</think>\boxed{{{box}}}"}}]
    assert graded(tmp_path, [{"question": "q", "answer": 0, "choices": choices}])[0] == [(0, 0, box == 0)]


def test_bare_answers(tmp_path, benchmark):
    rows = [{"question": problem, "prediction": "2"} for problem in benchmark.problems]
    done, (said,) = graded(tmp_path, rows, benchmark)
    assert done == [(0, 0, True), (1, 0, False)] and "no prediction has a boxed answer; each is taken for" in said
    rows = [{"question": benchmark.problems[0], "error": "down"}, rows[1]]
    assert "no prediction has a boxed answer" in graded(tmp_path, rows, benchmark)[1][0]
    rows = [{"question": problem, "output": "2 boxes"} for problem in benchmark.problems]
    done, (said,) = graded(tmp_path, rows, benchmark)
    assert done == [(0, 0, False), (1, 0, False)] and "no completion has a boxed answer" in said
