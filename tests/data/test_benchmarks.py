"""Benchmark files in their layouts."""

import json

import pytest

from nanoredi.common.errors import UserError
from nanoredi.data.benchmarks import PAPER, PAPER_TEMPLATE, frame, golds_of, load, load_all
from nanoredi.data.messages import with_system
from nanoredi.grader import grade


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_files(name, shared):
    benchmark = load(name, str(shared / "benchmarks"))
    assert len(benchmark.questions) == len(benchmark.golds) == PAPER[name]
    assert benchmark.name == name and "Think step by step before answering.\n\n" in benchmark.questions[0]
    assert load(name, str(shared / "benchmarks"), limit=2).golds == benchmark.golds[:2]
    assert all(grade(f"\\boxed{{{gold}}}", gold) for golds in benchmark.golds for gold in golds)


def test_the_paper_s_answers_in_their_formats(shared):
    folder = str(shared / "benchmarks")
    assert load("amc23", folder).golds[0] == ["142"]
    assert load("minerva", folder).golds[0] == ["9.6"]
    assert load("aime24", folder).golds[1] == ["025"]
    assert load("olympiad_bench", folder).golds[1] == ["$\\frac{1}{2 n+2}$"]


def test_a_user_s_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "1+1?", "answer": 2}\n{"problem": "half?", "answer": ["0.5", "1/2"], "more": 1}\n')
    benchmark = load(str(path), "")
    assert (benchmark.name, benchmark.questions, benchmark.golds) == (
        "mine",
        ["1+1?", "half?"],
        [["2"], ["0.5", "1/2"]],
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"answer": 2}\n', "line 1 has no text in 'problem' or 'question'"),
        ('{"problem": "x", "answer": null}\n', "line 1 has no 'answer'"),
        ('{"problem": "x", "answer": []}\n', "line 1 has no 'answer'"),
        ('{"problem": "x", "answer": true}\n', "line 1 has no 'answer'"),
        ("", "holds no problems"),
        ("{\n", "line 1 is not JSON"),
    ],
)
def test_malformed_rows_are_named(tmp_path, text, words):
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        load(str(tmp_path / "b.jsonl"), "")


@pytest.mark.parametrize(
    "row, problem, golds",
    [
        ({"Body": "9 apples.", "Question": "How many?", "Answer": 8.0}, "9 apples.\nHow many?", ["8"]),
        ({"context": "c", "question": "q", "final_answer": ["1", "2"]}, "c\nq", ["1", "2"]),
        ({"context": "c", "problem": "p", "ground_truth": "1"}, "p", ["1"]),
        ({"problem": 7, "question": "q", "answer": None, "answer_number": 18}, "q", ["18"]),
        ({"problem": "p", "answer": "so it is 4 or 5", "expected_answer": "4"}, "p", ["4"]),
        ({"problem": "p", "gold": "", "answer": "4"}, "p", ["4"]),
        ({"problem": "p", "answer": "", "solution": "\\boxed{4}"}, "p", ["4"]),
        ({"problem": "p", "solution": "\\boxed{4}, \\boxed{5}"}, "p", ["4, 5"]),
        ({"Problem": "p", "problem": "p", "answer": 4}, "p", ["4"]),
        ({"problem": "Solve 2x = n for x.", "answer": "n", "n": 5}, "Solve 2x = n for x.", ["n"]),
        ({"problem": "p", "answer": "7", "options": {"A": None, "B": ""}}, "p", ["7"]),
    ],
)
def test_a_row_s_problem_and_answer(tmp_path, row, problem, golds):
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    benchmark = load(str(tmp_path / "b.jsonl"), "")
    assert (benchmark.problems, benchmark.golds) == ([problem], [golds])


@pytest.mark.parametrize(
    "rows, words",
    [
        (
            [{"question": "q", "choices": ["1", "2"], "answer": 1}],
            r"line 1 is multiple choice \('choices'\); write the choices into the problem",
        ),
        ([{"question": "q", "A": "1", "B": "2", "answer": "B"}], r"is multiple choice \('b'\)"),
        ([{"question": "q", "option_a": "1", "option_b": "2", "Answer": "b"}], r"is multiple choice \('option_b'\)"),
        ([{"query": "q", "answer": 1}], "in 'problem' or 'question'; it has query, answer"),
        (
            [{"Problem": "p", "problem": "q", "answer": 1}],
            "line 1 has 'Problem' in two spellings, with different values",
        ),
        ([{"problem": "p", "answer": "it is so " * 9}] * 2, "2 of 2 answers are solutions without a box or ####"),
    ],
)
def test_rows_that_would_be_scored_wrongly_are_refused(tmp_path, rows, words):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=words):
        load(str(tmp_path / "b.jsonl"), "")


def test_an_empty_list_is_no_gold_answer(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"problem": "p", "gold": [], "answer": 1}\n')
    assert load(str(tmp_path / "b.jsonl"), "").golds == [["1"]]


def test_a_suffix_in_capitals(tmp_path):
    (tmp_path / "OWN.CSV").write_text("problem,answer\n1+1,2\n")
    assert load(str(tmp_path / "OWN.CSV"), "").golds == [["2"]]


def test_missing_files_and_wrong_numbers_of_problems(tmp_path):
    with pytest.raises(UserError, match=r"no benchmark 'math50' \(did you mean 'math500'\?\)"):
        load("math50", "")
    with pytest.raises(UserError, match="math500.json: give --data DIR .train_redi.py: --evaluate.data."):
        load("math500", "")
    (tmp_path / "own.jsonl").write_text("")
    with pytest.raises(
        UserError, match="own.jsonl is no folder; give a file of your own by its path: --benchmarks .*own"
    ):
        load("aime24", str(tmp_path / "own.jsonl"))
    with pytest.raises(UserError, match="folder with aime24.json, and nowhere is no folder$"):
        load("aime24", "nowhere")
    with pytest.raises(UserError, match="holds no file aime24 that ends in .json, .jsonl"):
        load("aime24", str(tmp_path))
    (tmp_path / "aime24.json").write_text(json.dumps([{"problem": "x", "answer": "1"}]))
    with pytest.raises(UserError, match="holds 1 problems, but aime24 has 30"):
        load("aime24", str(tmp_path))


def test_hugging_face_s_layouts(tmp_path):
    rows = {
        "math500": {
            "problem": "p",
            "solution": "s",
            "answer": "\\frac12",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "u",
        },
        "maxwell": {"ID": "2024-II-4", "Problem": "p", "Solution": "s", "Answer": 33},
        "h4": {"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"},
    }
    golds = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        benchmark = load(str(tmp_path / f"{name}.jsonl"), "")
        assert benchmark.problems == benchmark.questions == ["p"]
        (golds[name],) = benchmark.golds
    assert golds == {"math500": ["\\frac12"], "maxwell": ["33"], "h4": ["204"]}


def test_a_named_benchmark_may_be_jsonl(tmp_path):
    (tmp_path / "aime24.jsonl").write_text('{"Problem": "p", "Answer": 1}\n' * 30)
    benchmark = load("aime24", str(tmp_path), limit=3)
    assert benchmark.problems == ["p"] * 3 and benchmark.questions[0].endswith("before answering.\n\np")


@pytest.mark.parametrize(
    "answer, golds",
    [
        ("142.0", ["142.0"]),
        (142.0, ["142"]),
        (12345678.0, ["12345678"]),
        (1234567.25, ["1234567.25"]),
        (1e23, ["1" + "0" * 23]),
        (1e-7, ["0.0000001"]),
        (-3.0, ["-3"]),
        (0.1 + 0.2, ["0.30000000000000004"]),
        (123456789012345678901, ["123456789012345678901"]),
        ("48/2 = <<48/2=24>>24\n#### 72", ["72"]),
        ("#### 1,234 ", ["1,234"]),
        ("#### Step 1\nso \\boxed{7}\n\n#### Remark\nEuler knew.", ["7"]),  # headings
        ("So \\boxed{1} or rather \\boxed{\\frac{1}{2}}.", ["\\frac{1}{2}"]),
        ("So $x = \\boxed{-2}$ is one. The roots are $\\boxed{-2}$ and $\\boxed{2}$.", ["-2, 2"]),
        ("['9.6\\n']", ["9.6"]),
        ("['0.01\\n', \"0.02\"]", ["0.01", "0.02"]),
        ("['9.6' \n '9.60']", ["9.6", "9.60"]),  # as numpy writes it
        ("['a', 2]", ["['a', 2]"]),
        (["a ", "b\n"], ["a", "b"]),
        ("[1,2]", ["[1,2]"]),  # an interval
        ("['", ["['"]),
    ],
)
def test_answers_in_the_formats_of_files(answer, golds):
    assert golds_of("here", answer) == golds


def test_a_problem_has_one_prompt_template():
    problem = "What is {problem} in $\\frac{1}{2}$?"
    ((role, text),) = (m.values() for m in frame(problem, "paper"))
    assert (
        role == "user" and text.startswith("Solve the following") and text.endswith(f"before answering.\n\n{problem}")
    )
    assert "$\\boxed{ANSWER}$" in text
    assert frame(problem) == frame(problem, "") == frame(problem, "plain") == [{"role": "user", "content": problem}]
    assert frame("1+1", "In \\boxed{}: {problem}?")[0]["content"] == "In \\boxed{}: 1+1?"
    system = {"role": "system", "content": "Be brief."}
    assert frame("1+1", system="Be brief.") == [system, {"role": "user", "content": "1+1"}]
    assert with_system([system], "Be long.") == [system]


def test_the_paper_s_prompt_template():
    """With two spaces after "clearly.", as in both programs that the original evaluates with."""
    assert PAPER_TEMPLATE == (
        "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
        "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) where "
        "ANSWER is just the final number or expression that solves the problem. Think step by step before answering.\n\n"
        "{problem}"
    )


PUBLISHED = {  # a row as published, and its gold answer
    "aime24": ({"id": 60, "problem": "p", "solution": "\\boxed{204}", "url": "u"}, ["204"]),
    "aime25": ({"problem": "p", "answer": "70", "id": "0"}, ["70"]),
    "amc23": ({"id": 0, "answer": "27.0", "url": "u", "question": "p"}, ["27.0"]),
    "minervamath": ({"question": "p", "answer": "4.5e33"}, ["4.5e33"]),
    "gsm8k": ({"question": "p", "answer": "48/2 = <<48/2=24>>24\n#### 72"}, ["72"]),
    "AIME2025": ({"question": "p", "answer": "588"}, ["588"]),
    "OlympiadBench": (
        {"id": 1, "question": "p", "solution": ["long"], "final_answer": ["$2$"], "context": None, "error": None},
        ["$2$"],
    ),
    "math": ({"problem": "p", "level": "Level 5", "solution": "so \\boxed{\\frac{1}{2}}"}, ["\\frac{1}{2}"]),
    "headings": ({"problem": "p", "solution": "#### Step 1\nso \\boxed{\\frac{1}{2}}"}, ["\\frac{1}{2}"]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(tmp_path, name, suffix):
    row, golds = PUBLISHED[name]
    path = tmp_path / f"test{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".json" else row), encoding="utf-8-sig")
    benchmark = load(str(path), "")
    assert (benchmark.problems, benchmark.golds) == (["p"], [golds])
    assert grade(f"\\boxed{{{golds[0]}}}", benchmark.golds[0])


def test_a_solution_without_a_box_is_no_answer(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"problem": "p", "solution": "It is 5."}\n')
    with pytest.raises(UserError, match="line 1 has no 'answer'"):
        load(str(tmp_path / "b.jsonl"), "")


def test_nan_is_no_answer(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"problem": "p", "answer": NaN}\n')
    with pytest.raises(UserError, match="line 1"):
        load(str(tmp_path / "b.jsonl"), "")


def test_aime25_by_name(tmp_path):
    (tmp_path / "aime25.jsonl").write_text('{"problem": "p", "answer": "1"}\n' * 30)
    benchmark = load("aime25", str(tmp_path))
    assert (benchmark.name, len(benchmark.problems)) == ("aime25", 30) and benchmark.questions[0].startswith("Solve")
    (tmp_path / "amc23.jsonl").write_text('{"question": "p", "answer": "1"}\n' * 40)
    with pytest.raises(UserError, match="holds 40 problems, but amc23 has 83; give another set by its path"):
        load("amc23", str(tmp_path))


def test_a_user_s_template(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"problem": "1+1", "answer": 2}\n')
    questions = [load(str(path), "", template=t).questions for t in ("", "plain", "paper", "{problem}={}")]
    assert questions[:2] == [["1+1"], ["1+1"]] and questions[2][0].startswith("Solve") and questions[3] == ["1+1={}"]


def test_files_with_the_same_name(tmp_path):
    files = ["a/x/t.jsonl", "b/x/t.jsonl", "b/y/t.jsonl", "b/y/t.json", "u.jsonl", "math500.jsonl", "d/math500.json"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text('{"problem": "p", "answer": 1}\n')
    (tmp_path / "d/math500.json").write_text(json.dumps([{"problem": "p", "answer": 1}] * 500))
    names = [*(str(tmp_path / file) for file in files[:-1]), "math500"]
    loaded = [benchmark.name for benchmark in load_all(names, str(tmp_path / "d"))]
    assert loaded == ["a/x/t", "b/x/t", "t.jsonl", "t.json", "u", f"{tmp_path.name}/math500", "math500"]
    with pytest.raises(UserError, match="--benchmarks names .*/d/../u.jsonl twice|--benchmarks names .*u.jsonl twice"):
        load_all([names[4], str(tmp_path / "d" / ".." / "u.jsonl")], "")
