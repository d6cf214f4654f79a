"""The user's own responses, labelled by the grader: both layouts, bad rows, the loop from samples to a trained model."""

import json

import pytest
from templates import CHATML, DEEPSEEK, small_folder

from nanoredi import prepare, toy
from nanoredi.common.errors import UserError
from nanoredi.data import own_responses as own
from nanoredi.data.decontaminate import Overlap
from nanoredi.data.spool import Spool
from nanoredi.data.tokenizer import Tokenizer

RIGHT, WRONG = "<think>b+2=3;</think>\\boxed{3}", "<think>b+2=4;</think>\\boxed{4}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepare rows; their SFT rows as {prompt: response}, their pairs as {prompt: (chosen, rejected)}."""

    def prepared(*rows, grading=True):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare.prepare([file], tokenizer, tmp_path / "out", prepare.PrepareFlags(grade=grading), Overlap([]))
        sft, pairs = (
            [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("sft", "pairs")
        )
        return (
            {row["messages"][0]["content"]: row["messages"][-1]["content"] for row in sft},
            {
                row["prompt"][0]["content"]: (row["chosen"][0]["content"], row["rejected"][0]["content"])
                for row in pairs
            },
        )

    return prepared


def response(completion, sample=0, prompt="a=1b+2", answer="3", **more):
    return {"prompt": prompt, "answer": answer, "completion": completion, "sample": sample} | more


def test_a_system_message_beside_the_prompt_belongs_to_it(tmp_path):
    row, tokenizer = {"system": "S", "generations": ["1"], "correct": [True]}, Tokenizer(small_folder(tmp_path, CHATML))
    made = own.labelled("here", {**row, "prompt": "Q"}, tokenizer, False)
    assert made == own.labelled("here", {**row, "question": "Q"}, tokenizer, False)
    assert [message["content"] for message in made["prompt"]] == ["S", "Q"] and made["problem"] == "Q"
    assert made == own.labelled("here", {**row, "instruction": "Q", "input": ""}, tokenizer, False)


def test_one_row_per_response(prepared):
    """Rows may be in any order, as sampling finished them; a problem's samples are sorted by number."""
    sft, pairs = prepared(
        response(WRONG, 2),
        response("\\boxed{5}", 1, "a=2b+3", "5"),
        response(RIGHT + ";", 3),
        response(RIGHT, 1, finish_reason="stop"),
        response("\\boxed{7}", 0, "a=2b+3", "5"),
        response("\\boxed{3}", 0, finish_reason="length"),
        response("\\boxed{9}", 0, "a=3b+3", "6"),
        response("\\boxed{9}", 0, "a=4b+3", None),
    )
    # Sample 0 boxes the answer but is truncated later: incorrect.
    assert sft == {"a=1b+2": RIGHT, "a=2b+3": "\\boxed{5}"}
    assert pairs == {"a=1b+2": (RIGHT, "\\boxed{3}"), "a=2b+3": ("\\boxed{5}", "\\boxed{7}")}


def test_one_row_per_problem(prepared):
    sft, pairs = prepared(
        {"problem": "a=1b+2", "generations": ["", WRONG, RIGHT], "answer": 3.0},
        {"prompt": "a=2b+2", "generations": ["\\boxed{4}", "\\boxed{5}"], "answer": ["5", "4"]},
        {"messages": [{"role": "user", "content": "a=3b+2"}], "generations": [RIGHT, None], "answer": "5"},
        {"problem": "", "generations": [RIGHT], "answer": "3"},
        {"problem": "a=5", "generations": [RIGHT], "answer": "3", "source": "cn_k12"},
        {"problem": "a=4b+2", "generations": [RIGHT], "answer": "3", "finish_reasons": None},
    )
    assert sft.pop("a=4b+2") == RIGHT
    assert sft == {"a=1b+2": RIGHT, "a=2b+2": "\\boxed{4}"} and pairs == {"a=1b+2": (RIGHT, WRONG)}


@pytest.mark.parametrize(
    "gold",
    [
        {"final_answer": 3},
        {"answer": "", "ground_truth": "3"},
        {"reward_model": {"ground_truth": "3"}},
        {"answer": "4", "gold": "3"},
        {"answer": "3", "reward_model": "its name"},  # Magpie's
    ],
)
def test_the_gold_answer_may_have_another_name(prepared, gold):
    """DeepMath's and NeMo's rows, and those that verl trains on."""
    assert prepared({"problem": "a=1b+2", "generations": [WRONG, RIGHT], **gold})[1] == {"a=1b+2": (RIGHT, WRONG)}


def test_truncated_responses_of_a_problem_are_incorrect(prepared):
    row = {"problem": "a=1b+2", "generations": [RIGHT + ";", RIGHT, WRONG], "answer": "3"}
    assert prepared({**row, "finish_reasons": ["length", "stop"]})[1] == {"a=1b+2": (RIGHT, RIGHT + ";")}


def test_a_problem_with_two_answers_is_dropped_counted_and_named(prepared, capsys):
    sft, pairs = prepared(
        response(RIGHT, 0),
        response(RIGHT, 0, "a=2b+1", "3"),
        response(WRONG, 1, "a=2b+1", "4"),
        response(WRONG, 2, "a=2b+1", "3"),
        response(WRONG, 1, answer=3.0),
    )
    assert pairs == {"a=1b+2": (RIGHT, WRONG)} and len(sft) == 1
    said = capsys.readouterr().err
    assert "Dropped 1 of 2 problems, whose rows give more than one answer" in said
    assert "rows.jsonl, line 2 and " in said and "rows.jsonl, line 3." in said


def test_thinking_that_the_template_opened_is_opened_once_in_either_layout(tmp_path, tokenizer):
    deepseek = Tokenizer(small_folder(tmp_path, DEEPSEEK))
    texts = ["A</think>\\boxed{3}", "<think>\nA</think>\\boxed{3}", "\\boxed{3}"]
    rows = [(f"line {i}", response(text, i, "Q")) for i, text in enumerate(texts)]
    with Spool(tmp_path / "spool") as spool:
        own.gather(rows, spool, deepseek, grading=True)
        ((_, row),) = own.gathered(spool)
    assert row["generations"] == ["<think>\nA</think>\\boxed{3}"] * 2 + ["<think>\n\\boxed{3}"]
    other = own.labelled("here", {"problem": "Q", "generations": texts, "answer": "3"}, deepseek, grading=True)
    thoughts = ["A, so 3", "B, so 3"]
    rows = [("here", response("\\boxed{3}", i, "Q", reasoning_content=thinking)) for i, thinking in enumerate(thoughts)]
    with Spool(tmp_path / "spool-2") as spool:
        own.gather(rows, spool, deepseek, grading=True)
        ((_, beside),) = own.gathered(spool)
    assert beside["generations"] == [f"<think>\n{thinking}\n</think>\n\n\\boxed{{3}}" for thinking in thoughts]
    assert other["generations"] == row["generations"] and other["correct"] == row["correct"] == [True, True, False]


def test_labels_that_come_with_the_rows(prepared, tmp_path):
    rows = [response(WRONG, 0, correct=True), response(RIGHT, 1, correct=False)]
    assert prepared(*rows, grading=False)[1] == {"a=1b+2": (WRONG, RIGHT)}
    (tmp_path / "out").rename(tmp_path / "first")
    assert prepared(*rows)[1] == {"a=1b+2": (RIGHT, WRONG)}
    (tmp_path / "out").rename(tmp_path / "second")
    row = {"problem": "a=1b+2", "generations": [WRONG, RIGHT], "correct": [True, False]}
    assert prepared(row, grading=False)[1] == {"a=1b+2": (WRONG, RIGHT)}


def test_thinking_that_the_template_opened_belongs_to_the_response(tmp_path, tokenizer):
    config = json.loads((tokenizer.folder / "tokenizer_config.json").read_text())
    config["chat_template"] = toy.CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    (tmp_path / "tokenizer.json").write_text((tokenizer.folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    # A box inside thinking that is never closed is not an answer.
    texts = ["b+2=3;</think>\\boxed{3}", "\\boxed{3}", ""]
    rows = [(f"line {i}", response(text, i)) for i, text in enumerate(texts)]
    with Spool(tmp_path / "spool") as spool:
        assert own.gather(rows, spool, Tokenizer(tmp_path), grading=True) == 1
        ((where, row),) = own.gathered(spool)
    assert where == "line 0" and row["correct"] == [True, False, False]
    assert row["generations"] == [f"<think>{texts[0]}", f"<think>{texts[1]}", ""]


@pytest.mark.parametrize(
    "row, grading, words",
    [
        ({"prompt": "a=1", "completion": "1"}, True, "line 2 has no field 'answer'"),
        ({"prompt": "a=2", "completion": "1"}, True, "line 2 has no field 'answer'"),
        (response("1", prompt="a=2", answer=True), True, "line 2 has no 'answer'"),
        (response(1), True, "line 2 must hold 'completion'"),
        ({"generations": ["1"], "answer": "1"}, True, "line 2 must hold 'completion'"),
        ({"completion": "1", "answer": "1"}, True, "line 2 has no field 'prompt'; it holds 'completion', 'answer'"),
        (
            response("1", prompt=[{"role": "assistant", "content": "1"}]),
            True,
            "line 2: 'prompt' must not end with a message of the assistant",
        ),
        (response("1", system="S"), True, "line 2: the chat template of .* the toy knows the roles user and assistant"),
        (response("1"), False, "line 1: 'correct' must say true or false of each response; or let --grade label"),
    ],
)
def test_bad_rows_are_named(prepared, row, grading, words):
    first = response(RIGHT)
    with pytest.raises(UserError, match=words):
        prepared(first, row, grading=grading)


@pytest.mark.parametrize(
    "row, grading, words",
    [
        ({"problem": "a=1", "generations": "1", "answer": "1"}, True, "line 1: generations is '1'; it must be a list"),
        (
            {"problem": "a=1", "generations": [1], "answer": "1"},
            True,
            r"line 1: generations\[0\] is 1; it must be text or",
        ),
        ({"problem": "a=1", "generations": ["1"]}, True, "line 1 has no field 'answer'"),
        ({"problem": "a=1", "generations": ["1"], "reward_model": "x"}, True, "line 1 has no field 'answer'"),
        (
            {"problem": "a=1", "generations": ["1"], "answer": "1", "finish_reasons": "stop"},
            True,
            "finish_reasons is 's",
        ),
        ({"problem": "a=1", "outputs": ["1"], "answer": "1"}, True, "line 1 has no responses: 'generations', a list"),
        ({"problem": "a=1", "generations": ["1"], "answer": "1"}, False, "no field 'problem_is_valid'; .*--grade"),
        (
            {"problem": "a=1", "generations": ["1"], "correct": [None]},
            False,
            "'correct' must say true or false of each",
        ),
    ],
)
def test_bad_problems_are_named(prepared, row, grading, words):
    with pytest.raises(UserError, match=words):
        prepared(row, grading=grading)


def test_a_prompt_without_a_response_is_dropped_though_the_template_refuses_it(prepared):
    sft, _ = prepared(response(RIGHT), response("", prompt="a=2", system="S"))
    assert sft == {"a=1b+2": RIGHT}


def test_rows_of_the_other_layout_are_named(prepared):
    with pytest.raises(UserError, match="line 2 has a 'completion', unlike the rows before it"):
        prepared({"problem": "a=1", "generations": ["1"], "answer": "1"}, response(RIGHT))


@pytest.mark.slow
def test_the_loop_of_self_distillation(run, tmp_path):
    """Train stage 1 on the toy, sample from it, label the samples, train stage 2 on them."""
    toy_size = "--toy.sft_rows 300 --toy.pairs 20 --toy.watch_pairs 4 --toy.heldout 6 --toy.num_layers 1".split()
    commands = (
        ("train_sft.py", *toy_size, "--toy.hidden_size", "48", "--epochs", "6"),
        *[
            words.split()
            for words in (
                "sample.py --prompts runs/toy-sft/data/prompts.jsonl --n 4 --temperature 1 --out self/samples.jsonl",
                "nanoredi/prepare.py --raw self/samples.jsonl --grade --tokenizer runs/toy-sft/final --out self/data",
                "train_redi.py --recipe toy --model runs/toy-sft/final --data self/data/pairs.jsonl --out self/redi"
                " --evaluate.benchmarks runs/toy-sft/data/toy.jsonl --evaluate.n 2",
            )
        ],
    )
    for words in commands:
        done = run(*words)
        assert done.returncode == 0, done.stderr
    answers = {
        row["prompt"]: row["answer"]
        for row in map(json.loads, (tmp_path / "runs/toy-sft/data/prompts.jsonl").read_text().splitlines())
    }
    pairs = [json.loads(line) for line in (tmp_path / "self/data/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 20
    for pair in pairs:
        box = f"\\boxed{{{answers[pair['prompt'][0]['content']]}}}"
        assert pair["chosen"][0]["content"].endswith(box) and not pair["rejected"][0]["content"].endswith(box)
    results = json.loads((tmp_path / "self/redi/results.json").read_text())
    assert [row["model"] for row in results] == ["SFT", "REDI"]
