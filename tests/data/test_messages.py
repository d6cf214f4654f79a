"""Rows in common layouts to messages, and refused rows."""

import json

import pytest

from nanoredi.common.errors import UserError
from nanoredi.data.messages import check_messages, conversation, pair, prompt_of, user_message

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "B"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TURNS[1]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": SHAREGPT},
        {"conversations": TURNS},
        {"messages": SHAREGPT},
        {"messages": PARTS},
        {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TURNS]},
        {"messages": [{**turn, "tool_calls": [], "function_call": {"name": None}} for turn in TURNS]},
        {"prompt": "Q", "completion": "B"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"question": "Q", "completion": "B", "label": True},
        {"prompt": "Q", "completion": "B", "label": False, "weight": -1},
        {"prompt": "Q", "completion": TURNS},
        {"completion": TURNS, "label": "72"},
        {"messages": TURNS, "tools": "[]"},
        {"messages": TURNS, "tools": "null"},
        {"messages": TURNS, "tools": {}},
        {"messages": TURNS[:1], "completion": "B"},
        {"messages": SHAREGPT[:1], "completion": "B"},
        {"problem": "Q", "conversations": SHAREGPT, "completion": "B"},
        {"prompt": "Q", "completion": "B", "reasoning": "on"},
        {"instruction": "Q", "input": "", "output": "B", "text": "Below is an instruction"},  # Alpaca's
        {"instruction": "", "input": "Q", "output": "B", "history": []},
        {"input": TURNS[:1], "output": "B", "reasoning": "X-High"},
        {"query": "Q", "response": "B", "original_question": "R"},
        {"prompt": "Q", "response": "B", "label": "no", "correct": 1.0},
        {"messages": TURNS[:1], "response": "B"},
        {"conversations": SHAREGPT, "instruction": "R", "output": "C"},
        {"messages": [{"role": "human", "content": "Q"}, {"role": "model", "content": "B"}]},
        {"problem": "Q", "solution": "S", "answer": "2", "generations": ["B", "C"], "messages": TURNS},  # OpenR1's
        {"system": "", "conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TURNS]},
        {"instruction": "Q", "generation": "B", "model_name": "m"},  # distilabel's
        {"problem": "Q", "generated_solution": "B", "expected_answer": "2"},  # OpenMathReasoning's
        {"messages": TURNS, "prompt": "R", "generation": "C"},
        {"problem": "Q", "messages": [*TURNS[:1], {**TURNS[1], "content": "C"}], "completion": "B"},  # sampled anew
        {"messages": TURNS, "images": [], "kto_tag": True, "functions": None},
        {"messages": TURNS, "choices": {"text": [], "label": []}, "options": {"A": None, "B": ""}, "image": "null"},
    ],
)
def test_stage_1_rows(row):
    assert conversation("here", row) == TURNS


def test_alpaca_s_instruction_and_input_are_one_prompt():
    parts = {"instruction": "Q", "input": "R", "context": None}
    asked = user_message("Q\nR")
    assert conversation("here", {**parts, "output": "B"}) == [*asked, TURNS[1]]
    assert conversation("here", {**parts, "response": "B", "system": "S"})[1:] == [*asked, TURNS[1]]
    assert pair("here", {**parts, "chosen": "B", "rejected": "C"})[0] == asked
    assert pair("here", {**parts, "prompt": "P", "chosen": "B", "rejected": "C"})[0] == user_message("P")
    with pytest.raises(UserError, match=r"here: input is \{'a': 1\}; it must be text"):
        conversation("here", {**parts, "input": {"a": 1}, "output": "B"})


def test_a_question_about_a_text_is_asked_with_it():
    row = {"question": "Q", "context": "C", "body": None, "id": 3}
    asked = user_message("C\nQ")
    assert prompt_of("here", row) == asked
    assert conversation("here", {**row, "completion": "B"}) == conversation("here", {**row, "response": "B"})
    assert conversation("here", {**row, "completion": "B"}) == [*asked, TURNS[1]]
    assert pair("here", {**row, "chosen": "B", "rejected": "C"})[0] == asked
    assert pair("here", {**row, "prompt": "P", "chosen": "B", "rejected": "C"})[0] == user_message("P")
    assert pair("here", {**row, **WHOLE})[0] == TURNS[:1]
    with pytest.raises(UserError, match=r"here: context is \['C'\]; it must be text"):
        conversation("here", {**row, "context": ["C"], "completion": "B"})


@pytest.mark.parametrize(
    "row, names",
    [
        # In some of Alpaca's files the prompt is the instruction together with the output.
        (
            {"prompt": "### Instruction: Q ### Output: B", "instruction": "Q", "output": "B"},
            "'prompt' and 'instruction'",
        ),
        ({"query": "Q", "context": "C", "response": "B"}, "'query' and 'context'"),
        ({"problem": "Q", "context": "C", "completion": "B"}, "'problem' and 'context'"),
        ({"prompt": TURNS[:1], "input": "R", "output": "B"}, "'prompt' and 'input'"),
    ],
)
def test_a_prompt_in_two_fields_is_refused(row, names):
    with pytest.raises(UserError, match=f"here has {names}: one field must hold all that is asked"):
        conversation("here", row)


def test_a_pair_s_prompt_in_two_fields_is_refused():
    for row in ({"query": "Q", "context": "C"}, {"problem": "Q", "input": "C"}, {"question": "Q", "instruction": "C"}):
        with pytest.raises(UserError, match="one field must hold all that is asked"):
            pair("here", {**row, "chosen": "B", "rejected": "C"})


def test_two_different_conversations_are_refused():
    """OpenThoughts-114k-math has NuminaMath's solution in one field, and R1's in the other."""
    row = {"messages": TURNS, "problem": "Q", "conversations": [SHAREGPT[0], {"from": "gpt", "value": "C"}]}
    with pytest.raises(UserError, match="here has 'messages' and other 'conversations': drop those that are not"):
        conversation("here", row)
    for same in (SHAREGPT, [], [TURNS[0], {**TURNS[1], "info": "from elsewhere"}]):
        assert conversation("here", {**row, "conversations": same}) == TURNS
    assert conversation("here", {**row, "completion": "B"}) == TURNS


def test_two_different_answers_are_refused():
    row = {"instruction": "Q", "output": "B", "response": "C"}
    with pytest.raises(UserError, match="here has different answers in 'output' and 'response': keep one"):
        conversation("here", row)
    for others in ({"response": "B"}, {"completion": "B", "output": "C"}, {"conversations": SHAREGPT}):
        assert conversation("here", row | others) == TURNS


def test_thinking_beside_a_completion_belongs_to_it():
    for field in ("reasoning_content", "reasoning", "thinking"):
        thought = {"prompt": "Q", "completion": "B", field: "A or B"}
        assert conversation("here", thought) == [TURNS[0], {**TURNS[1], "reasoning_content": "A or B"}]
        for completion in (TURNS[1], TURNS[1:], TURNS):
            assert conversation("here", {**thought, "completion": completion}) == conversation("here", thought)


@pytest.mark.parametrize("messages", [TURNS, SHAREGPT, PARTS])
@pytest.mark.parametrize("write", [str, json.dumps, lambda messages: json.dumps(messages, indent=1)])
def test_messages_written_as_text_are_refused(messages, write):
    """In a CSV file a list is its own representation, which would be learned as text."""
    words = "has messages written as text, as in CSV: give a list, as in JSONL"
    asked, answer = write(messages[:1]), write(messages[1:])
    for row in ({"messages": write(messages)}, {"prompt": "Q", "completion": answer}, {"input": asked, "output": "B"}):
        with pytest.raises(UserError, match=words):
            conversation("here", row)
    for row in ({"prompt": asked, "chosen": "B"}, {"prompt": "Q", "chosen": answer}, {"chosen": write(messages)}):
        with pytest.raises(UserError, match=words):
            pair("here", {"rejected": "C", **row})
    for name in ("prompt", "messages"):
        with pytest.raises(UserError, match=words):
            prompt_of("here", {name: asked, "generations": ["B"]})


@pytest.mark.parametrize("text", ["[{'a': 1}]", "[role]", "{'role': 1}", 'x [{"role": "user"}]', "[{valued}]"])
def test_other_text_in_brackets_is_learned(text):
    assert conversation("here", {"prompt": text, "completion": text})[1]["content"] == text
    assert conversation("here", {"messages": [*user_message('[{"role": 1}]'), TURNS[1]]})[1] == TURNS[1]


@pytest.mark.parametrize("field", ["label", "correct", "is_correct", "kto_tag"])
def test_rows_labelled_wrong_are_not_learned_as_right(field):
    for verdict in (False, "False", "false", [False], 0, 0.0, "0"):
        with pytest.raises(UserError, match=f"here: {field!r} is false; give the row a 'weight'"):
            conversation("here", {"messages": TURNS, field: verdict})


@pytest.mark.parametrize("field", ["loss", "train", "training"])
def test_an_answer_that_a_trainer_is_not_to_learn_is_not_learned(field):
    with pytest.raises(UserError, match=f"here: {field!r} is false; give the row a 'weight'"):
        conversation("here", {"messages": [TURNS[0], {**TURNS[1], field: False}]})
    assert conversation("here", {"messages": [TURNS[0], {**TURNS[1], field: False, "weight": 0}]})[0] == TURNS[0]
    asked = {**TURNS[0], field: False}  # as every prompt is
    assert conversation("here", {"messages": [asked, TURNS[1]]}) == [asked, TURNS[1]]


@pytest.mark.parametrize("field", ["weight", "rejected_weight"])
def test_a_pair_has_no_other_weight_than_the_chosen_s(field):
    row = {"prompt": "Q", "chosen": "B", "rejected": "C"}
    for weight in (0.5, 0, "1"):
        with pytest.raises(UserError, match=f"here has {field!r}: the only weight .* is 'chosen_weight'"):
            pair("here", {**row, field: weight})
    for weight in (1, 1.0, None):
        assert pair("here", {**row, field: weight}) == pair("here", {**row, "chosen_weight": 0.5})


def test_a_message_may_hold_the_weight_of_a_wrong_answer():
    turns = [TURNS[0], {**TURNS[1], "weight": -1}]
    for row in ({"messages": turns}, {"conversations": turns}, {"prompt": "Q", "completion": turns[1]}):
        assert conversation("here", {**row, "label": False}) == turns


WHOLE = {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "C"}]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "B", "rejected": "C"},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": WHOLE["rejected"][1:]},
        {"prompt": "Q", **WHOLE},  # UltraFeedback's
        WHOLE,
        {"prompt": TURNS[:1], **WHOLE},
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "C"}},
        {"messages": TURNS[:1], "chosen": TURNS[1], "rejected": WHOLE["rejected"][1]},
        {"problem": "Q", "chosen": "B", "rejected": "C"},
        {"messages": TURNS, "question": "other", **WHOLE},
        {"input": "Q", "chosen": "B", "rejected": "C"},
        {"system": "", "input": "Q", "generations": ["B", "C"], "chosen": "B", "rejected": "C"},  # Orca's
        {"prompt": "Q", "messages": TURNS, "conversation": [{"input": "Q", "output": None}], **WHOLE},  # Capybara's
        {"instruction": "other", **WHOLE},
    ],
)
def test_stage_2_rows(row):
    assert pair("here", row) == (TURNS[:1], [TURNS[1], WHOLE["rejected"][1]])


def test_a_prompt_beside_whole_conversations_may_be_any_question_of_them():
    sides = {
        side: [*TURNS, *user_message("R"), {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    for question in "QR":
        assert pair("here", {"prompt": question, **sides})[0] == [*TURNS, *user_message("R")]


def test_a_separate_system_message_comes_first():
    system = {"role": "system", "content": "S"}
    for row in ({"messages": TURNS}, {"prompt": "Q", "completion": "B"}):
        assert conversation("here", {"system": "S", **row}) == [system, *TURNS]
    assert (
        conversation("here", {"system": "S", "messages": [{**system, "content": "own"}, *TURNS]})[0]["content"] == "own"
    )
    for row in (WHOLE, {"prompt": "Q", "chosen": "B", "rejected": "C"}):
        assert pair("here", {"system": "S", **row})[0] == [system, TURNS[0]]
        assert pair("here", {"system": None, "system_prompt": "S", **row})[0] == [system, TURNS[0]]
        for unshown in ("tools", "images", "image", "choices", "options", "history", "initial_reason_steps"):
            with pytest.raises(UserError, match=f"here has {unshown!r}, which prompts do not show"):
                pair("here", {unshown: [{"name": "f"}], **row})
        assert pair("here", {"system": None, **row})[0] == TURNS[:1]
    with pytest.raises(UserError, match=r"here: system is \['S'\]; it must be text or null"):
        conversation("here", {"system": ["S"], "messages": TURNS})


@pytest.mark.parametrize(
    "messages, words",
    [
        ([*TURNS[:1], {"role": "assistant", "content": None}], r"message 2 \(assistant\): its content is null"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], r"message 1 \(assistant\) has tool_calls"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"message 1 \(user\): its content is no text"),
        ([{"role": "assistant", "content": [{"type": "reasoning", "text": "A"}]}], "its content is no text"),
        ([{"content": "Q"}], "message 1 has no role"),
        ([{"role": "assistant", "content": "B", "reasoning": ["A"]}], "its thinking is no text"),
    ],
)
def test_messages_that_cannot_be_learned_are_named(messages, words):
    with pytest.raises(UserError, match=words):
        check_messages("here", messages)


@pytest.mark.parametrize(
    "row, words",
    [
        ({**WHOLE, "prompt": "other"}, "here: 'prompt' must be the messages before the answer in 'chosen'"),
        ({**WHOLE, "rejected": [*user_message("R"), TURNS[1]]}, "must differ in their last message alone"),
        ({**WHOLE, "rejected": "C"}, "must differ in their last message alone"),
        (
            {"text": "Q", "chosen": TURNS[1:], "rejected": "C"},
            "here has no field 'prompt'; it holds 'text', 'chosen', 'rej",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_named(row, words):
    with pytest.raises(UserError, match=words):
        pair("here", row)


@pytest.mark.parametrize("prompt", ["Q\n", [{**TURNS[0], "id": 3}], TURNS + user_message("R")])
def test_a_prompt_may_differ_from_the_conversations_in_what_is_not_said(prompt):
    before = [{"role": "system", "content": "S"}, *(prompt if len(prompt) > 2 else TURNS[:1])]
    row = {"prompt": prompt, "chosen": [*before, TURNS[1]], "rejected": [*before, {**TURNS[1], "content": "C"}]}
    assert pair("here", row)[0] == before


def test_beside_a_question_its_answered_conversation_is_no_prompt():
    assert pair("here", {"question": "Q", "conversations": SHAREGPT, "chosen": "B", "rejected": "C"})[0] == TURNS[:1]


@pytest.mark.parametrize("name", ["prompt", "messages", "conversations"])
def test_a_prompt_that_holds_an_answer_already_is_refused(name):
    """Otherwise an answer would be learned after a prompt that contains it, or a question asked twice."""
    words = f"here: {name!r} must not end with a message of the assistant"
    with pytest.raises(UserError, match=words):
        pair("here", {name: TURNS, "chosen": "B", "rejected": "C"})
    with pytest.raises(UserError, match=words):
        conversation("here", {name: TURNS, "completion": "B"})
    with pytest.raises(UserError, match="'prompt' must be the messages before the answer in 'completion'"):
        conversation("here", {"prompt": "other", "completion": TURNS})
