"""Files of other engines, each in its layout, come to the same samples."""

import json

import pytest

from nanoredi.common.errors import UserError
from nanoredi.data.benchmarks import load
from nanoredi.evaluation.completions import grade_file

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
        ([{"prompt": "What is 1+1?", "completion": "3"}], "has 0 completions for problem 2 of b and 1 for others"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, benchmark, rows, words):
    with pytest.raises(UserError, match=words):
        grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True)


def test_no_gold_answer_anywhere(tmp_path):
    with pytest.raises(UserError, match="line 1 has no gold answer of its own: name the benchmark"):
        grade_file(written(tmp_path, rows_of("vllm")), "m", [], thinking=True)


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
    assert {p.name for p in out.iterdir()} == {
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
