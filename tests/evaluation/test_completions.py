"""Each completion finds its problem, and a file that does not fit its benchmark is refused."""

import json
from dataclasses import replace

import pytest
from completions import ALL_RIGHT, answer, batch, graded, rows_of, written

from nanoredi.common.errors import UserError
from nanoredi.data.benchmarks import load
from nanoredi.evaluation.completions import grade_file

SAMPLE = {"model": "m", "benchmark": "b", "problem": 0, "sample": 0, "response": "1"}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "holds no rows"),
        ([7], "line 1 holds no JSON object"),
        ([{"prompt": "What is 1+1?", "text": "2"}], "line 1 is in no known layout"),
        ([{"prompt": "What is 1+1?", "outputs": [{"txt": "2"}]}], "line 1: its completion is .*; it must be text"),
        ([{"prompt": "What is 1+1?", "completion": 2}], "line 1: its completion is 2; it must be text"),
        ([{"prompt": "What is 1+2?", "completion": "3"}], "line 1: its prompt holds no problem of b"),
        ([{"completion": "3"}], "line 1 has no prompt"),
        ([{**SAMPLE, "problem": 2}], "line 1: 'problem' 2 of 'b' is no problem of b"),
        (
            [SAMPLE, {**SAMPLE, "response": "2"}],
            "line 2 is sample 0 of its problem, as is an earlier row with other text",
        ),
        ([{"prompt": "What is 1+1?", "completion": "3"}], "has 0 completions for problem 2 of b and 1 for others"),
    ],
)
def test_faults_are_named(tmp_path, benchmark, rows, words):
    with pytest.raises(UserError, match=words):
        grade_file(written(tmp_path, rows), "m", [benchmark], thinking=True)


def test_no_gold_answer_anywhere(tmp_path):
    with pytest.raises(UserError, match="line 1 has no gold answer of its own: name the benchmark"):
        grade_file(written(tmp_path, rows_of("vllm")), "m", [], thinking=True)
    with pytest.raises(UserError, match="line 2 has another gold answer than an earlier row"):
        rows = [{"prompt": "What is 1+1?", "answer": gold, "completion": "2"} for gold in "23"]
        grade_file(written(tmp_path, rows), "m", [], thinking=True)

    rows = [{"prompt": "What is 1+1?", "output": r"</think>\boxed{2}"}] * 2
    assert graded(tmp_path, [{**rows[0], "gold": "2"}, *rows])[0] == [(0, k, True) for k in range(3)]
    with pytest.raises(UserError, match="line 1 has neither a prompt nor an id"):
        graded(tmp_path, [{"gold": "2", "completion": "2"}])


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
    rows[0]["similar"], rows[1]["similar"] = long, short  # the prompt counts before all other text
    assert graded(tmp_path, rows, benchmark)[0] == [(0, 0, True), (1, 0, True)]
    within = replace(benchmark, problems=["And 2+2?", long])  # of two that end at the same place the longer one
    rows[0]["prompt"] = "And 2+2? Put it in \\boxed{}."
    assert graded(tmp_path, rows, within)[0] == [(0, 0, True), (1, 0, True)]


def test_a_duplicate_problem(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in (("p", 1), ("q", 2), ("p", 1))))
    benchmark = load(str(path), "")
    row = {"p": {"prompt": "p", "output": r"</think>\boxed{1}"}, "q": {"prompt": "q", "output": r"</think>\boxed{2}"}}
    each = [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, True), (2, 0, True), (2, 1, True)]
    for order in ("ppqqpp", "qqpp"):  # each asked separately, and asked once for both
        assert graded(tmp_path, [row[one] for one in order], benchmark)[0] == each
    for order in ("pppqq", "pppppqq"):  # none is left out
        with pytest.raises(UserError, match=f"2 completions for problem 2 of twice and {order.count('p')} "):
            graded(tmp_path, [row[one] for one in order], benchmark)


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
    (samples,) = grade_file(written(tmp_path, failed + right[6:]), "m", [many], True)
    assert samples[0]["response"] == "<think>\n" and samples[0]["finish_reason"] == "error"
    # If a request for several samples fails, each of them has failed.
    for row in right:
        row["response"]["body"]["choices"] *= 3
    assert len(graded(tmp_path, failed + right[6:], many)[0]) == 36


@pytest.mark.parametrize("number", [int, str])  # in JSONL, in CSV
def test_an_evaluation_s_samples_are_regraded(tmp_path, number):
    """Several models and benchmarks, rows in the order in which they finished, one of them twice."""
    rows = [
        {
            "model": m,
            "benchmark": b,
            "problem": number(p),
            "sample": number(k),
            "gold": [str(p)],
            "response": rf"\boxed{{{p * (m == 'B')}}}",
        }
        for m in "AB"
        for b in ("one", "two")
        for p in (1, 0)
        for k in (1, 0)
    ]
    rows = [{**row, "answer": "9", "tokens": 5, "finish_reason": "stop"} for row in rows]
    for row in rows:
        row["response"] = rf"\boxed{{7}} {row['problem']} " + row["response"]  # the problem's number, behind a box
    found = grade_file(written(tmp_path, [*rows, rows[3]]), "again", [], thinking=True)
    assert [(f[0]["model"], f[0]["benchmark"], [s["correct"] for s in f]) for f in found] == [
        ("again: A", "one", [True, True, False, False]),
        ("again: A", "two", [True, True, False, False]),
        ("again: B", "one", [True] * 4),
        ("again: B", "two", [True] * 4),
    ]


def test_evaluate_grades_completions(run, tmp_path, benchmark):
    for name in ("one", "two"):
        rows = list(rows_of("vllm"))
        if name == "two":
            rows[0]["outputs"][1]["text"] = r"</think>\boxed{2}"
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--completions", "one.jsonl", "two.jsonl", "--benchmarks", "b.jsonl", "--out", "out", "--paper"]
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").touch()  # a file manager has looked into it
    done = run("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} - {".lock", ".DS_Store"} == {
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
    assert "two minus one" in run("nanoredi/report/__main__.py", "out").stdout


def test_a_problem_under_an_unknown_name(tmp_path, many):
    for of in (
        lambda text: {"instruction": text},
        lambda text: {"prompt": "Answer.", "meta": {"item": [{"text": text}]}},
        lambda text: {"instance": {"input": {"text": text}}},
    ):
        rows = [{**of(problem), "output": rf"</think>\boxed{{{i}}}"} for i, problem in enumerate(many.problems)]
        assert graded(tmp_path, rows[::-1], many) == (ALL_RIGHT, [])
    texts = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": rf"</think>\boxed{{{i}}}"}]
        for i, p in enumerate(many.problems)
    ]
    assert graded(tmp_path, [{"generated_text": text} for text in texts[::-1]], many) == (ALL_RIGHT, [])
    assert graded(tmp_path, [[{"generated_text": text}] for text in texts[::-1]], many) == (ALL_RIGHT, [])


def test_a_problem_in_another_form_of_unicode(tmp_path):
    (tmp_path / "u.jsonl").write_text(json.dumps({"problem": "Où est l'angle ?", "answer": 1}))
    prompt = "Ou\u0300 est\u00a0l'angle ?"
    rows = [{"prompt": prompt, "output": r"</think>\boxed{1}"}]
    assert graded(tmp_path, rows, load(str(tmp_path / "u.jsonl"), "")) == ([(0, 0, True)], [])


def test_a_problem_that_the_model_quotes_is_not_its_prompt(tmp_path, many):
    rows = [batch(f"r{i}", rf"Unlike {many.problems[3]}</think>\boxed{{{i}}}") for i in range(12)]
    for row in rows:
        row["response"]["body"]["choices"][0]["message"]["reasoning_content"] = many.problems[3]
        row["generation"] = many.problems[3]
    done, (said,) = graded(tmp_path, rows[::-1], many)
    assert done == ALL_RIGHT and "and not from generation" in said


def test_rows_of_several_models_are_kept_apart(tmp_path, many):
    rows = [
        {"prompt": p, "output": rf"</think>\boxed{{{i * k}}}", "model_name": f"m{k}"}
        for i, p in enumerate(many.problems)
        for k in (0, 1)
    ]
    found = grade_file(written(tmp_path, rows), "f", [many], thinking=True)
    assert [(samples[0]["model"], sum(s["correct"] for s in samples)) for samples in found] == [
        ("f: m0", 1),
        ("f: m1", 12),
    ]
    (samples,) = grade_file(written(tmp_path, rows[::2]), "f", [many], thinking=True)
    assert samples[0]["model"] == "f"
    rows = [
        {"prompt": row["prompt"], "response": {**answer(row["output"]), "model": row["model_name"]}} for row in rows
    ]
    found = grade_file(written(tmp_path, rows), "f", [many], thinking=True)
    assert [samples[0]["model"] for samples in found] == ["f: m0", "f: m1"]
    rows[3] = {**rows[3], "response": None, "error": "down"}
    with pytest.raises(UserError, match="line 4 failed, and does not say with which model"):
        grade_file(written(tmp_path, rows), "f", [many], thinking=True)
    rows[3]["model"] = "m1"
    for row in rows[::2]:
        row["response"]["choices"] *= 3  # m0 has three completions of each problem, m1 one
    found = grade_file(written(tmp_path, rows), "f", [many], thinking=True)
    assert [sum(s["correct"] for s in samples) for samples in found] == [3, 11]


def test_solutions_are_no_gold_answers(tmp_path):
    words = "She has three apples and buys four more, so that she has seven of them, the answer is 7."
    rows = [{"prompt": str(i), "output": "7", "answer": words} for i in range(3)]
    with pytest.raises(UserError, match="3 of 3 answers are solutions without a box"):
        graded(tmp_path, rows)
    rows += [{"prompt": str(i), "output": "7", "answer": "7"} for i in range(3, 6)]
    graded(tmp_path, rows)


def test_duplicate_rows(tmp_path, many):
    """sample.py numbers a prompt's samples, so a file appended to itself is recognised; for others there is a warning."""
    texts = [(p, rf"</think>\boxed{{{i}}}") for i, p in enumerate(many.problems)]
    own = [
        {"prompt": p, "completion": text, "finish_reason": "stop", "tokens": 3, "sample": k}
        for p, text in texts
        for k in (0, 1)
    ]
    done, (said,) = graded(tmp_path, own * 2, many)
    assert done == [(i, k, True) for i in range(12) for k in (0, 1)] and "every completion of many more than" in said
    other_seed = [{**row, "completion": row["completion"] + "."} for row in own]
    assert len(graded(tmp_path, own + other_seed + own, many)[0]) == 48
    done, (said,) = graded(tmp_path, [{"prompt": p, "output": text} for p, text in texts] * 2, many)
    assert len(done) == 24 and "m has every completion of many more than once, word for word" in said


def test_a_few_shot_prompt_is_no_answer(tmp_path, benchmark):
    shots = r"Q: What is 3+3? A: \boxed{6}. Q: "
    rows = [{"question": p, "generated_text": f"{shots}{p} A: I do not know."} for p in benchmark.problems]
    for given in ([benchmark], []):
        with pytest.raises(UserError, match="2 of 2 completions have a boxed answer in front of the problem itself"):
            graded(tmp_path, [{**row, "gold": "6"} for row in rows], *given, thinking=False)
    for row in rows:
        row["prompt"] = shots + row["question"]  # then the few-shot part is known, and removed
    assert graded(tmp_path, rows, benchmark, thinking=False)[0] == [(0, 0, False), (1, 0, False)]


@pytest.mark.parametrize("begin", [r"Put it in \boxed{}. ", r"<think>Maybe \boxed{3}. But "])
def test_a_problem_may_stand_behind_a_box_that_is_no_answer(tmp_path, benchmark, begin):
    """The prompt's own instruction, or a thought."""
    rows = [
        {"question": p, "output": rf"{begin}{p}</think>\boxed{{{2 * i + 2}}}"} for i, p in enumerate(benchmark.problems)
    ]
    assert graded(tmp_path, rows, benchmark)[0] == [(0, 0, True), (1, 0, True)]


def test_text_cells_of_a_csv_file(tmp_path, capsys):
    """In CSV numbers are text, and empty cells are empty text."""
    path = tmp_path / "c.csv"
    for tokens in ("12", "12.0"):  # pandas makes a column with empty cells one of floats
        rows = f"q,</think>\\boxed{{2}},{tokens},stop,2\nr,,,,3\n"
        path.write_text("prompt,completion,tokens,finish_reason,gold\n" + rows)
        (samples,) = grade_file(str(path), "m", [], thinking=True)
        found = [(s["correct"], s["tokens"], s["finish_reason"]) for s in samples]
        assert found == [(True, 12, "stop"), (False, None, "")]
        assert capsys.readouterr().out == f"{path}: 1 of 2 completions are empty and count as wrong\n"
    path.write_text(
        "model,benchmark,problem,sample,gold,response\na,b,1,0,['4'],\\boxed{4}\na,b,0,0,['2'],\\boxed{2}\n"
    )
    (samples,) = grade_file(str(path), "m", [], thinking=True)
    assert [(s["model"], s["problem"], s["correct"]) for s in samples] == [("m: a", 0, True), ("m: a", 1, True)]


def test_of_two_fields_with_completions_the_one_read_is_named(tmp_path, benchmark):
    rows = [{"prompt": p, "completion": r"</think>\boxed{2}", "generated_text": "?"} for p in benchmark.problems]
    done, (said,) = graded(tmp_path, rows, benchmark)
    assert done == [(0, 0, True), (1, 0, False)]
    assert said.endswith("completions are taken from the field completion, and not from generated_text")
    for row in rows:
        said = {"role": "assistant", "content": row["completion"]}
        row |= {"generated_text": row["completion"], "messages": [{"role": "user", "content": row["prompt"]}, said]}
    assert graded(tmp_path, rows, benchmark) == (done, [])


def test_sample_numbers_may_have_gaps_but_not_be_missing(tmp_path, benchmark):
    rows = [{**SAMPLE, "problem": p, "sample": k, "response": r"\boxed{4}"} for p in (0, 1) for k in (7, 2)]
    done, _ = graded(tmp_path, rows, benchmark)
    assert done == [(0, 0, False), (0, 1, False), (1, 0, True), (1, 1, True)]
    with pytest.raises(UserError, match="m: m has 1 completions for problem 2 of b and 2 for others"):
        graded(tmp_path, rows[:-1], benchmark)


def test_a_problem_of_two_benchmarks_is_asked_for_one_of_them(tmp_path, benchmark, many):
    shared = many.problems[3]
    other = replace(benchmark, problems=[shared, *benchmark.problems], golds=[["3"], *benchmark.golds])
    rows = [{"prompt": p, "output": rf"</think>\boxed{{{i}}}"} for i, p in enumerate(many.problems)]
    for benchmarks in ([many, other], [other, many]):
        done, (said,) = graded(tmp_path, rows, *benchmarks)
        assert done == ALL_RIGHT and "m has no completions for b" in said
    rows += [{"prompt": p, "output": rf"</think>\boxed{{{2 * i + 2}}}"} for i, p in enumerate(benchmark.problems)]
    assert graded(tmp_path, rows, many, other) == ([*ALL_RIGHT, *[(i, 0, True) for i in range(3)]], [])
    # A file that answers nothing else answers it in both.
    with pytest.raises(UserError, match="m has 0 completions for problem 1 of many and 1 for others"):
        graded(tmp_path, rows[3:4], many, other)
