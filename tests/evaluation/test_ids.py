"""Rows without a prompt find their problems by ids, or by their order."""

import json
from dataclasses import replace

import pytest
from completions import ALL_RIGHT, answer, batch, graded

from nanoredi.common.errors import UserError


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
    with pytest.raises(
        UserError, match="line 1: its custom_id .* names no problem of many by an id or its only number"
    ):
        graded(tmp_path, rows, many)


def test_any_id_names_the_only_problem(tmp_path, benchmark):
    one = replace(benchmark, problems=benchmark.problems[:1], golds=benchmark.golds[:1])
    rows = [batch("x"), batch("request-7", r"So</think>\boxed{2}")]
    assert graded(tmp_path, rows, one) == ([(0, 0, True), (0, 1, True)], [])


def test_ids_of_two_benchmarks(tmp_path, many, benchmark):
    longer = replace(benchmark, name="many-b")  # its name begins with the other's
    rows = [batch(f"many-{i}", rf"</think>\boxed{{{i}}}") for i in range(12)]
    rows += [batch("many-b-1"), batch("many-b-2", r"</think>\boxed{4}")]
    assert graded(tmp_path, rows[::-1], longer, many)[0] == [(0, 0, True), (1, 0, True), *ALL_RIGHT]
    done, (said,) = graded(tmp_path, rows[:12], longer, many)
    assert done == ALL_RIGHT and "m has no completions for many-b" in said
    rows = [batch(f"many-{i}", rf"</think>\boxed{{{i}}}") for i in range(12)]
    rows += [batch("b-1"), batch("b-2", r"</think>\boxed{4}")]
    assert graded(tmp_path, rows[::-1], benchmark, many)[0] == [(0, 0, True), (1, 0, True), *ALL_RIGHT]


def test_a_benchmark_s_own_id_is_better_than_a_row_s_number(tmp_path, many):
    rows = [{"index": 11 - i, "task_id": f"a/{i * i}", "output": rf"</think>\boxed{{{i}}}"} for i in range(12)]
    assert graded(tmp_path, rows, many) == (ALL_RIGHT, [])
    by_number = replace(many, ids={"id": [str(i * 5 % 12 + 1) for i in range(12)]})  # its own, in another order
    rows = [batch(f"r{i * 5 % 12 + 1}", rf"</think>\boxed{{{i}}}") for i in range(12)]
    assert graded(tmp_path, rows[::-1], by_number) == (ALL_RIGHT, [])
    by_id = replace(many, ids={"id": [str(i) for i in range(12)]})
    rows = [{"index": 11 - i, **batch(f"r{i}", rf"</think>\boxed{{{i}}}")} for i in range(12)]  # index: of the row
    assert graded(tmp_path, rows, by_id) == (ALL_RIGHT, [])
    rows = [{"index": float(i), "output": rf"</think>\boxed{{{i}}}"} for i in range(12)]  # as pandas writes them
    assert graded(tmp_path, rows[::-1], many) == (ALL_RIGHT, [])


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


def test_rows_are_matched_by_order_only_without_prompts_and_ids(tmp_path, many, benchmark):
    rows = [answer(rf"</think>\boxed{{{i}}}", id=f"chatcmpl-{i * 7919:x}", prompt=None) for i in range(12)]
    done, (said,) = graded(tmp_path, rows, many)
    assert done == ALL_RIGHT and "are taken in the order of many" in said
    named = [{**row, "problem_idx": i + 1} for i, row in enumerate(rows)]
    assert graded(tmp_path, named[::-1], many) == (ALL_RIGHT, [])
    with pytest.raises(UserError, match="line 1 has no prompt, and no id"):
        graded(tmp_path, [{**row, "sample_idx": k} for row in rows for k in range(12)], many)
    with pytest.raises(UserError, match="line 1 has no prompt, and no id that names its problem"):
        graded(tmp_path, rows[1:], many)
    with pytest.raises(UserError, match="line 1 has no prompt, and no id that names its problem"):
        graded(tmp_path, rows, many, benchmark)
