"""Files of other engines, each in its layout, come to the same samples."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from nanoredi.common.errors import UserError
from nanoredi.data.benchmarks import load
from nanoredi.evaluation.completions import grade_file
from nanoredi.evaluation.layouts import LAYOUTS as FIELDS

PROBLEMS = [("What is 1+1?", "2"), ("What is 1+1? And 2+2?", "4")]
TEXTS = [[r"</think>\boxed{2}", r"</think>\boxed{3}"], [r"</think>\boxed{4}", "Wait"]]


def rows_of(layout):
    """The same two problems with two completions each."""
    for (problem, gold), texts in zip(PROBLEMS, TEXTS):
        prompt = f"<|im_start|>user\nSolve: {problem}<|im_end|>\n<|im_start|>assistant<think>\n"
        if layout == "vllm":
            outputs = [
                {"index": i, "text": t, "token_ids": [5] * 9, "finish_reason": "stop"} for i, t in enumerate(texts)
            ]
            yield {"request_id": "1", "prompt": prompt, "outputs": outputs}
        elif layout == "run-batch":
            choices = [{"index": i, "message": {"content": t}, "finish_reason": "stop"} for i, t in enumerate(texts)]
            yield {"custom_id": problem, "response": {"status_code": 200, "body": {"choices": choices}}, "error": None}
        elif layout == "rllm":
            messages = [{"role": "user", "content": problem}]
            yield {"data_source": "", "prompt": messages, "responses": texts, "reward_model": {"ground_truth": gold}}
        elif layout == "lighteval":
            doc = {"query": f"Solve: {problem}", "choices": [gold], "gold_index": 0}
            yield {"doc": doc, "model_response": {"text": texts, "output_tokens": [[1] * 9] * 2}, "metric": {}}
        elif layout == "older lighteval":
            yield {"example": problem, "full_prompt": prompt, "predictions": texts, "gold": [gold]}
        else:
            for i, text in enumerate(texts):
                yield {"prompt": problem, "completion": text, "finish_reason": "stop", "tokens": 9, "sample": i}


LAYOUTS = ["vllm", "run-batch", "rllm", "lighteval", "older lighteval", "sample.py"]


@pytest.fixture
def benchmark(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in PROBLEMS))
    return load(str(path), "")


def written(tmp_path, rows):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
def test_gold_answers_of_the_file_itself(tmp_path, layout):
    (samples,) = grade_file(written(tmp_path, rows_of(layout)), "m", [], thinking=True)
    assert [s["correct"] for s in samples] == [True, False, True, False] and samples[0]["benchmark"] == "c"


def test_thinking_that_the_server_split_off(tmp_path, benchmark):
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


SAMPLE = {"model": "m", "benchmark": "b", "problem": 0, "sample": 0, "response": "1"}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "holds no rows"),
        ([7], "line 1 holds no JSON object"),
        ([{"prompt": "What is 1+1?", "text": "2"}], "line 1 is in no layout"),
        ([{"prompt": "What is 1+1?", "outputs": [{"txt": "2"}]}], "line 1 has no text where its completion"),
        ([{"prompt": "What is 1+1?", "completion": 2}], "line 1 has no text where its completion"),
        ([{"prompt": "What is 1+2?", "completion": "3"}], "line 1: its prompt holds no problem of b"),
        ([{"completion": "3"}], "line 1 has no prompt"),
        (
            [SAMPLE, {**SAMPLE, "response": "2"}],
            "line 2 is sample 0 of its problem, as an earlier row of other words is",
        ),
        ([{"prompt": "What is 1+1?", "completion": "3"}], "has 0 completions for problem 2 of b and 1 for others"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, benchmark, rows, words):
    with pytest.raises(UserError, match=words):
        grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True)


def test_no_gold_answer_anywhere(tmp_path):
    with pytest.raises(UserError, match="line 1 has no gold answer of its own: name the benchmark"):
        grade_file(written(tmp_path, rows_of("vllm")), "m", [], thinking=True)
    with pytest.raises(UserError, match="line 2 has another gold answer than an earlier row"):
        rows = [{"prompt": "What is 1+1?", "answer": gold, "completion": "2"} for gold in "23"]
        grade_file(written(tmp_path, rows), "m", [], thinking=True)


EXAMPLES = re.findall(r"```json\n(.*?)\n```", (ROOT / "docs" / "layouts.md").read_text(), re.DOTALL)


def second(example):
    """The same row for problem 2."""
    text = example.replace("1+1?", "1+1? And 2+2?").replace("boxed{2}", "boxed{4}").replace('"2"', '"4"')
    row = json.loads(text.replace("request-1", "request-2").replace('"doc_id": 0', '"doc_id": 1'))
    return {**row, "problem": 1} if row.get("problem") == 0 else row


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_docs(tmp_path, benchmark, example):
    rows = [second(example), json.loads(example)]
    said = []
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True, say=said.append)
    failed = "not done in time" in example
    assert [(s["problem"], s["correct"], s["gold"]) for s in samples] == [
        (0, not failed, ["2"]),
        (1, not failed, ["4"]),
    ]
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
def test_gold_answers_of_the_examples_themselves(tmp_path, example):
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
        (
            {"inputs": "What is 1+1?", "generated_text": r"\boxed{2}", "details": {"finish_reason": "length"}},
            ["length"],
        ),
    ],
)
def test_lists_of_texts_and_why_a_completion_ended(tmp_path, row, reasons):
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
def test_what_stands_beside_an_error_is_no_completion(tmp_path, row):
    said = []
    rows = [{"prompt": "What is 1+1?", "answer": "2", **row}]
    grade_file(written(tmp_path, rows), "m", [], thinking=False, say=said.append)
    assert "1 of 1 requests failed" in said[0] and "'down'" in said[0]


@pytest.mark.parametrize(
    "row",
    [
        {"message": {"role": "assistant", "content": r"\boxed{2}", "thinking": "one and one"}},
        {"response": r"\boxed{2}", "thinking": "one and one", "done_reason": "stop"},
        {"output": r"\boxed{2}", "reasoning_content": "one and one"},
        {"messages": [{"role": "assistant", "content": r"\boxed{2}", "reasoning_content": "one and one"}]},
        {"question": "What is 1+1?", "content": "a passage", "code": [r"\boxed{2}"]},
        {"choices": ["1", "2"], "code": [r"\boxed{2}"]},
    ],
)
def test_thinking_and_words_that_are_no_completion(tmp_path, row):
    rows = [{"prompt": "What is 1+1?", "answer": "2", **row}]
    thinks = "one and one" in str(row)
    ((sample,),) = grade_file(written(tmp_path, rows), "m", [], thinking=thinks)
    assert sample["correct"] and ("one and one" in sample["response"]) == thinks


def test_a_response_of_another_api_is_no_failed_request(tmp_path, benchmark):
    rows = [{"key": "1", "response": {"results": [{"generated": "2"}]}}]
    with pytest.raises(UserError, match="line 1 is in no layout"):
        grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True)


def answer(text=r"</think>\boxed{2}", **more):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], **more}


def batch(custom_id, text=r"</think>\boxed{2}", **more):
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": answer(text)}, "error": None, **more}


@pytest.fixture
def many(tmp_path):
    """Twelve problems, the answer of each its number."""
    path = tmp_path / "many.jsonl"
    rows = [{"problem": f"Which is number {i:02}?", "answer": i, "id": f"a/{i * i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(str(path), "")


def graded(tmp_path, rows, *benchmarks, **more):
    said = []
    found = grade_file(
        written(tmp_path, rows), "m", list(benchmarks), more.pop("thinking", True), say=said.append, **more
    )
    return [(s["problem"], s["sample"], s["correct"]) for samples in found for s in samples], said


ALL_RIGHT = [(i, 0, True) for i in range(12)]


@pytest.mark.parametrize(
    "name",
    ["request-{}", "{}", "many-{:03}-x", "0-{}-12", "a/{square}", "Which is number {:02}?", "12.{one}"],
)
def test_an_id_names_the_problem_in_any_order(tmp_path, many, name):
    ids = [name.format(i, square=i * i, one=i + 1) for i in range(12)]
    rows = [batch(id, rf"</think>\boxed{{{i}}}") for i, id in enumerate(ids)]
    assert graded(tmp_path, rows[::-1], many) == (ALL_RIGHT, [])
    # Two samples of each.
    assert graded(tmp_path, rows[5:] + rows + rows[:5], many)[0] == [(i, k, True) for i in range(12) for k in (0, 1)]


@pytest.mark.parametrize("name", ["request-{ten}", "q{}-{}", "7", "{word}"])
def test_a_custom_id_that_names_no_problem_is_refused(tmp_path, many, name):
    rows = [batch(name.format(i, i, ten=i + 10, word="x" * i)) for i in range(12)]
    with pytest.raises(UserError, match="line 1: its custom_id .* names no problem of many"):
        graded(tmp_path, rows, many)


def test_ids_of_two_benchmarks(tmp_path, many, benchmark):
    rows = [batch(f"many-{i}", rf"</think>\boxed{{{i}}}") for i in range(12)]
    rows += [batch("b-1"), batch("b-2", r"</think>\boxed{4}")]
    assert graded(tmp_path, rows[::-1], benchmark, many)[0] == [(0, 0, True), (1, 0, True), *ALL_RIGHT]


def test_other_ids_and_a_prompt_in_parts(tmp_path, many):
    rows = [{"prompt": None, "request_id": str(i), "outputs": [rf"</think>\boxed{{{i}}}"]} for i in range(12)]
    assert graded(tmp_path, rows[::-1], many) == (ALL_RIGHT, [])
    for content in ([{"type": "text", "text": "Which is number {:02}?"}], "Which is\n number  {:02}?"):
        prompts = [json.loads(json.dumps(content).replace("{:02}", f"{i:02}")) for i in range(12)]
        rows = [
            answer(rf"</think>\boxed{{{i}}}", messages=[{"role": "user", "content": prompt}])
            for i, prompt in enumerate(prompts)
        ]
        assert graded(tmp_path, rows[::-1], many) == (ALL_RIGHT, [])


def test_by_place_only_where_nothing_else_is_there(tmp_path, many):
    rows = [answer(rf"</think>\boxed{{{i}}}", id=f"chatcmpl-{i * 7919:x}", prompt=None) for i in range(12)]
    done, (said,) = graded(tmp_path, rows, many)
    assert done == ALL_RIGHT and "are taken in the order of many" in said
    with pytest.raises(UserError, match="line 1 has no prompt, and no id that names its problem"):
        graded(tmp_path, rows[1:], many)


def test_limit_takes_the_first_problems_of_a_complete_file(tmp_path, many):
    by_prompt = [{"prompt": many.problems[i], "output": rf"</think>\boxed{{{i}}}"} for i in range(12)]
    by_id = [batch(f"r{i}", rf"</think>\boxed{{{i}}}") for i in range(12)]
    by_place = [answer(rf"</think>\boxed{{{i}}}") for i in range(12)]
    for rows in (by_prompt[::-1], by_id[::-1], by_place, by_prompt[:2], by_id[1::-1], by_place[:2]):
        assert graded(tmp_path, rows, many, limit=2)[0] == ALL_RIGHT[:2]


def test_a_few_shot_prompt_asks_its_last_problem(tmp_path, benchmark):
    short, long = benchmark.problems
    rows = [
        {"prompt": f"Q: {long} A: 4. Q: {short} Put it in \\boxed{{}}.", "output": r"</think>\boxed{2}"},
        {"prompt": f"Q: {short} A: 2. Q: {long} Put it in \\boxed{{}}.", "output": r"</think>\boxed{4}"},
    ]
    assert graded(tmp_path, rows, benchmark)[0] == [(0, 0, True), (1, 0, True)]


def test_lm_eval_s_messages_and_filters(tmp_path, benchmark):
    rows = []
    for i, problem in enumerate(benchmark.problems):
        chat = json.dumps([{"role": "user", "content": f"\\frac: {problem}\n"}])
        of = {"doc_id": i, "doc": {}, "arguments": {"gen_args_0": {"arg_0": [chat], "arg_1": {"until": ["Q:"]}}}}
        row = {**of, "resps": [[rf"</think>\boxed{{{2 * i + 2}}}", "x"]], "filtered_resps": [["x"]]}
        rows += [{**row, "filter": "strict-match"}, {**row, "filter": "flexible-extract"}]
    assert graded(tmp_path, rows, benchmark)[0] == [(0, 0, True), (0, 1, False), (1, 0, True), (1, 1, False)]


def test_a_problem_that_stands_twice(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in (("p", 1), ("q", 2), ("p", 1))))
    benchmark = load(str(path), "")
    row = {"p": {"prompt": "p", "output": r"</think>\boxed{1}"}, "q": {"prompt": "q", "output": r"</think>\boxed{2}"}}
    each = [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, True), (2, 0, True), (2, 1, True)]
    for order in ("ppqqpp", "qqpp"):  # each asked, and asked once for both
        assert graded(tmp_path, [row[one] for one in order], benchmark)[0] == each
    with pytest.raises(UserError, match="1 completions for problem 1 of twice and 2"):
        graded(tmp_path, [row[one] for one in "pppqq"], benchmark)


def test_failed_requests_are_wrong_and_shown(tmp_path, many):
    right = [batch(f"r{i}", rf"</think>\boxed{{{i}}}") for i in range(12)]
    error = {"error": {"message": "Rate limit", "type": "x", "code": 429}}
    failed = [
        {"custom_id": "r0", "response": None, "error": {"code": "batch_expired", "message": "too late"}},
        {"custom_id": "r1", "response": {"status_code": 400, "body": None}, "error": error},
        {"custom_id": "r2", "response": {"status_code": 429, "body": error}, "error": None},
        {"custom_id": "r3", "response": {"status_code": 500, "body": {"object": "error", "message": "no\x1b[31m"}}},
        {"custom_id": "r4", "response": {"status_code": 200, "body": {"choices": []}}, "error": None},
        {"custom_id": "r5", "response": None, "error": "server is gone"},
    ]
    done, (said,) = graded(tmp_path, failed + right[6:], many)
    assert done == [(i, 0, i >= 6) for i in range(12)]
    assert "6 of 12 requests failed" in said and "line 1" in said and "2 x 'Rate limit'" in said and "\x1b" not in said
    (samples,) = grade_file(written(tmp_path, failed + right[6:]), "m", [many], True, say=lambda _: None)
    assert samples[0]["response"] == "<think>\n" and samples[0]["finish_reason"] == "error"
    # Of a request for several samples each failed.
    for row in right:
        row["response"]["body"]["choices"] *= 3
    assert len(graded(tmp_path, failed + right[6:], many)[0]) == 36


def test_empty_responses(tmp_path, benchmark):
    short, long = benchmark.problems
    rows = [
        {"prompt": short, "choices": [{"message": {"content": None, "reasoning_content": None}}]},
        {"prompt": long, "output": None},
        {"prompt": short, "choices": [{"message": {"role": "assistant"}, "finish_reason": "content_filter"}]},
        {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": None}]},
    ]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=False)
    assert [s["response"] for s in samples] == [""] * 4 and not any(s["correct"] for s in samples)


@pytest.mark.parametrize(
    "reason, kept",
    [({"type": "length", "length": 9}, "length"), ({"type": "stop", "matched": 1}, "stop"), ("MAX_TOKENS", "length")],
)
def test_finish_reasons(tmp_path, benchmark, reason, kept):
    outputs = [[{"text": "x", "finish_reason": reason}], [{"text": "x", "meta_info": {"finish_reason": reason}}]]
    rows = [{"prompt": p, "outputs": out} for p, out in zip(benchmark.problems, outputs)]
    (samples,) = grade_file(written(tmp_path, rows), "m", [benchmark], thinking=False)
    assert [s["finish_reason"] for s in samples] == [kept, kept]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"tokens": "9"}, "line 1: its number of tokens is '9'; it must be a whole number"),
        ({"tokens": True}, "its number of tokens is 'True'"),
        ({"tokens": -1}, "its number of tokens is '-1'"),
        ({"finish_reason": 3}, "its finish_reason is '3'; it must be a text"),
        ({"finish_reason": [3]}, "its finish_reason is '3'; it must be a text"),
        ({"benchmark": "b", "problem": 0, "sample": []}, r"its 'sample' is '\[\]'; it must be a whole number"),
        ({"completion": {"a": 1}}, "no text where its completion should be"),
        ({"completion": []}, "its 'completion' holds no completion"),
    ],
)
def test_fields_of_a_wrong_type_are_named(tmp_path, benchmark, more, words):
    with pytest.raises(UserError, match=words):
        graded(tmp_path, [{"prompt": "What is 1+1?", "completion": "x", **more}], benchmark)


def test_an_unknown_layout_is_described(tmp_path, benchmark):
    with pytest.raises(
        UserError, match=r"it has the fields prompt, reply; known are .*outputs \(vLLM's RequestOutput\)"
    ):
        graded(tmp_path, [{"prompt": "What is 1+1?", "reply": "2"}], benchmark)


def test_samples_of_an_evaluation_graded_anew(tmp_path):
    """Several models and benchmarks, rows in the order in which they ended, one of them twice."""
    rows = [
        {
            "model": m,
            "benchmark": b,
            "problem": p,
            "sample": k,
            "gold": [str(p)],
            "response": rf"\boxed{{{p * (m == 'B')}}}",
        }
        for m in "AB"
        for b in ("one", "two")
        for p in (1, 0)
        for k in (1, 0)
    ]
    rows = [{**row, "answer": "9", "tokens": 5, "finish_reason": "stop"} for row in rows]
    found = grade_file(written(tmp_path, [*rows, rows[3]]), "again", [], thinking=True)
    assert [(f[0]["model"], f[0]["benchmark"], [s["correct"] for s in f]) for f in found] == [
        ("again: A", "one", [True, True, False, False]),
        ("again: A", "two", [True, True, False, False]),
        ("again: B", "one", [True] * 4),
        ("again: B", "two", [True] * 4),
    ]


def test_parquet_is_read_as_it_is(tmp_path, benchmark):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [*rows_of("lighteval")]
    for row in rows:
        row["metric"] = {"score": 1.0}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "details.parquet")
    (samples,) = grade_file(str(tmp_path / "details.parquet"), "m", [benchmark], thinking=True)
    assert [s["correct"] for s in samples] == [True, False, True, False] and samples[0]["tokens"] == 9


def test_evaluate_grades_completions(run, tmp_path, benchmark):
    for name in ("one", "two"):
        rows = list(rows_of("vllm"))
        if name == "two":
            rows[0]["outputs"][1]["text"] = r"</think>\boxed{2}"
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--completions", "one.jsonl", "two.jsonl", "--benchmarks", "b.jsonl", "--out", "out", "--paper"]
    done = run("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} - {".lock"} == {
        "samples.jsonl",
        "results.json",
        "differences.json",
        "results.txt",
        "results.md",
    }
    results = json.loads((out / "results.json").read_text())
    assert [(r["model"], r["benchmark"], r["pass@1"], r["pass@2"]) for r in results] == [
        ("one", "b", 0.5, 1.0),
        ("two", "b", 0.75, 1.0),
    ]
    (difference,) = json.loads((out / "differences.json").read_text())
    assert difference["difference"] == 0.25
    assert (out / "results.txt").read_text() in done.stdout + "\n" and "REDI (*)" in done.stdout
    assert (out / "results.md").read_text().startswith("| model | benchmark | pass@1 % |")

    shown = run("nanoredi/report/__main__.py", "--failures", "out")
    assert (
        "out: 5 right, 3 wrong" not in shown.stdout and "out: 5 right, 1 wrong, 0 cut off, 2 no answer" in shown.stdout
    )
    assert "answer  3\ngold    2" in shown.stdout and shown.stdout.count("--- ") == 3
    shown = run("nanoredi/report/__main__.py", "--failures", "out", "--only", "no_answer")
    assert shown.stdout.count("--- ") == 2 and "answer  none" in shown.stdout
    assert "two less one" in run("nanoredi/report/__main__.py", "out").stdout


def test_a_reader_may_leave_before_the_list_of_layouts_is_printed():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nanoredi.evaluation.completions"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
