"""Messages to text: training and sampling share the prompt, ends are learned, answers stay whole, changes are reported."""

import json

import pytest
from templates import (
    CHATML,
    DEEPSEEK,
    QWEN3,
    QWEN3_NOT_THINKING,
    QWEN3_THINKING,
    small_folder,
)

from nanoredi.common.errors import UserError
from nanoredi.data.chat import Chat
from nanoredi.data.messages import conversation, user_message
from nanoredi.data.sequences import load_pairs, load_sft
from nanoredi.data.tokenizer import Tokenizer

IM, EOS = "<|im_end|>\n", "<｜end▁of▁sentence｜>"
TRACE = "<think>\nA\n</think>\n\nB"
TEMPLATES = {
    "chatml": CHATML,
    "deepseek": DEEPSEEK,
    "qwen3": QWEN3,
    "qwen3-thinking": QWEN3_THINKING,
    "qwen3-not": QWEN3_NOT_THINKING,
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("chats")
    return {name: Tokenizer(small_folder(root / name, template)) for name, template in TEMPLATES.items()}


def answered(answer: str | dict, *before: dict) -> list[dict]:
    answer = {"role": "assistant", **(answer if isinstance(answer, dict) else {"content": answer})}
    return [*(before or user_message("Q")), answer]


@pytest.mark.parametrize(
    "name, answer, completion",
    [
        ("chatml", TRACE, TRACE + IM),
        ("chatml", "B", "B" + IM),
        # DeepSeek's prompt opens <think>, so the completion must not, whatever the answer begins with.
        ("deepseek", TRACE, "A\n</think>\n\nB" + EOS),
        ("deepseek", "<think>A</think>B", "A</think>B" + EOS),
        ("deepseek", "A\n</think>\n\nB", "A\n</think>\n\nB" + EOS),
        ("deepseek", "Okay", "Okay" + EOS),
        ("qwen3", TRACE, TRACE + IM),
        ("qwen3", "B", "<think>\n\n</think>\n\nB" + IM),
        ("qwen3", "<think>A</think>B", TRACE + IM),
        ("qwen3", "A</think>B", TRACE + IM),
        ("qwen3", "<think>\nnever closed", "<think>\nnever closed" + IM),
        ("qwen3", "<think>A</think>B<think>C</think>D", "<think>A</think>B<think>C</think>D" + IM),
        ("qwen3-thinking", TRACE, "A\n</think>\n\nB" + IM),
        ("qwen3-thinking", "A\n</think>\n\nB", "A\n</think>\n\nB" + IM),
        ("qwen3-thinking", "B", "\n</think>\n\nB" + IM),
        ("qwen3-thinking", "<think>\nnever closed", "never closed" + IM),
        ("qwen3-not", "B", "B" + IM),
    ],
)
def test_training_has_sampling_s_prompt_and_the_whole_answer(chats, name, answer, completion):
    tokenizer = chats[name]
    prompt, text = tokenizer.split(answered(answer))
    assert prompt == tokenizer.prompt(user_message("Q"))
    assert text == completion


def test_an_answer_that_thinks_where_the_prompt_has_closed_the_thinking_is_refused(chats):
    for answer in (TRACE, "A\n</think>\n\nB", "<think>\nA"):
        with pytest.raises(UserError, match="closes the thinking in the prompt, but this answer thinks"):
            chats["qwen3-not"].split(answered(answer))


@pytest.mark.parametrize("name", ["chatml", "deepseek", "qwen3", "qwen3-thinking"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_the_content_is_thinking(chats, name, field):
    def completion(message):
        return chats[name].split(conversation("here", {"messages": answered(message)}))

    assert completion({"content": "B", field: "A"}) == completion(TRACE)
    assert completion({"content": "B", field: "C"}) != completion(TRACE)
    assert completion({"content": "B", field: None}) == completion("B")
    assert completion({"content": TRACE, field: "A"}) == completion(TRACE)
    for tagged in ("<think>\nA\n</think>\n\n", "<think>A", "A\n</think>"):
        assert completion({"content": "B", field: tagged}) == completion(TRACE)
    # Thinking is not dropped if the answer repeats it.
    assert completion({"content": "A, so B", field: "A"}) == completion("<think>\nA\n</think>\n\nA, so B")


def test_a_template_writes_the_thinking_in_its_own_way(tmp_path):
    own = CHATML.replace("{{ m.content }}", "{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}")
    message = {"role": "assistant", "content": "B", "reasoning_content": "A"}
    assert Tokenizer(small_folder(tmp_path, own)).split(answered(message))[1] == "[A]B" + IM


def test_changes_to_an_answer_are_reported(chats):
    def remarks(name, messages):
        found = set()
        chats[name].split(messages, found)
        return [remark.split(":")[0] for remark in found]

    assert remarks("chatml", answered("B")) == remarks("qwen3", answered(TRACE)) == []
    assert remarks("qwen3", answered("B")) == ["rows have an answer that the chat template rewrites"]
    assert "cuts" in remarks("deepseek", answered(TRACE))[0]
    assert remarks("chatml", answered("B" + IM)) == ["rows have an answer with the template's own header or end"]
    templated = user_message(chats["chatml"].prompt(user_message("Q")))
    assert remarks("chatml", answered("B", *templated)) == ["rows have a prompt that is templated already"]
    assert remarks("chatml", answered("B", *answered("A"), *user_message("Q"))) == ["rows have several answers"]
    unclosed = "rows have an answer that never closes the <think> that their prompt opens"
    for name in ("deepseek", "qwen3-thinking"):
        assert unclosed in remarks(name, answered("<think>\nA")) and unclosed not in remarks(name, answered(TRACE))
    assert unclosed in remarks("deepseek", answered("B")) and unclosed not in remarks("qwen3-thinking", answered("B"))


@pytest.mark.parametrize(
    "name, ends", [("chatml", [IM, "<|im_end|>", IM + "<|im_end|>"]), ("deepseek", [EOS, EOS + "\n"])]
)
def test_the_template_s_end_is_written_once(chats, name, ends):
    for end in ends:
        for padding in ("", chats[name].backend.id_to_token(chats[name].pad_id) * 9):
            assert chats[name].split(answered("B" + end + padding)) == chats[name].split(answered("B"))


@pytest.mark.parametrize("end", ["<|im_end|>\n<|im_start|>assistant\n", " <|im_end|>"])
def test_the_whole_end_of_a_template_is_written_once(tmp_path, end):
    """Hammer's template begins another answer after each message; Mistral's has a space before its token."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    tokenizer = Tokenizer(small_folder(tmp_path, template))
    for begun in (end, end.rstrip(), "<|im_end|>"):
        assert tokenizer.split(answered("B" + begun)) == tokenizer.split(answered("B"))


def test_a_white_space_token_is_not_an_end():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '<e>\\n' if m.role == 'assistant' }}{% endfor %}"
    chat = Chat(source, "x", {}, ["<e>", "\n"])
    assert chat.split(answered("B<e>\n")) == chat.split(answered("B"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_s_header_is_written_once(chats, name):
    tail = chats[name].prompt(user_message("Q")).split("Q")[-1]
    header = tail[max(tail.rfind("<|im_start|>"), tail.rfind("<｜Assistant｜>")) :].removesuffix("<think>\n")
    for answer in ("B", "B" + (EOS if name == "deepseek" else IM)) if name == "qwen3-not" else ("B", TRACE):
        for begun in (header, "\n" + header, tail.removesuffix("<think>\n")):
            assert chats[name].split(answered(begun + answer)) == chats[name].split(answered(answer))


def test_an_answer_may_begin_with_the_prompt_s_last_word(tmp_path):
    tokenizer = Tokenizer(small_folder(tmp_path, CHATML.replace("assistant\n{% endif", "\nassistant\n{% endif")))
    assert tokenizer.split(answered("assistants"))[1] == "assistants" + IM


@pytest.mark.parametrize("opening", ["<thinking>\n", "<|endoftext|>", "Answer:"])
def test_a_tag_that_the_prompt_opens_is_not_opened_again(tmp_path, opening):
    tokenizer = Tokenizer(
        small_folder(tmp_path, CHATML.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif"))
    )
    assert tokenizer.prompt(user_message("Q")).endswith(f"assistant\n{opening}")
    for begun in (opening, f"\n{opening}", f"<|im_start|>assistant\n{opening}"):
        assert tokenizer.split(answered(begun + "A"))[1] == tokenizer.split(answered("A"))[1] == "A" + IM


def test_white_space_behind_an_opened_think_is_written_once(tmp_path):
    wide = Tokenizer(small_folder(tmp_path, QWEN3_THINKING.replace("<think>\n{% endif", "<think>\n\n{% endif")))
    for answer in ("<think>\nA</think>B", "<think>\n\nA</think>B", "<think>A</think>B"):
        assert wide.split(answered(answer))[1] == "A</think>B" + IM


@pytest.mark.parametrize("name", ["chatml", "deepseek", "qwen3", "qwen3-thinking"])
def test_an_already_templated_prompt_is_left_alone(chats, name):
    prompt = chats[name].prompt(user_message("Q"))
    begun = prompt.removesuffix("<think>\n")
    cut = prompt[: prompt.rindex("Q") + 1]
    for text in (prompt, prompt.rstrip(), begun, *([cut + "<|im_end|>"] if name != "deepseek" else [])):
        assert chats[name].prompt(user_message(text)) == prompt
        assert chats[name].split(answered(TRACE, *user_message(text))) == chats[name].split(answered(TRACE))
    no_start = prompt.removeprefix("<｜begin▁of▁sentence｜>")
    assert chats[name].prompt(user_message(no_start)) == prompt
    forced = chats[name].prompt(user_message("Q"), think=True)
    assert chats[name].prompt(user_message(forced)) == forced
    assert chats[name].prompt(user_message("What is <|im_end|>?")).count("What") == 1
    for text in (prompt, begun):
        with pytest.raises(UserError, match="the last message is templated already: give it alone"):
            chats[name].prompt([{"role": "system", "content": "Other."}, *user_message(text)])
        assert chats[name].prompt([*user_message("Q"), *user_message(text)]) == prompt  # which holds it already


@pytest.mark.parametrize(
    "name, before, words",
    [
        (
            "chatml",
            [{"role": "human", "content": "Q"}],
            "does not show message 1, whose role is 'human', as such; .*system, user",
        ),
        ("chatml", [{"role": "developer", "content": "S"}, *user_message("Q")], "message 1, whose role is 'developer'"),
        (
            "deepseek",
            [{"role": "system", "content": s} for s in "XY"] + user_message("Q"),
            "message 1, .* 'system', as such; it handles the roles user, assistant$",
        ),
    ],
)
def test_a_message_that_the_template_skips_is_refused(chats, name, before, words):
    with pytest.raises(UserError, match=words):
        chats[name].split(answered("B", *before))
    with pytest.raises(UserError, match=words):
        chats[name].prompt(before)


def test_an_earlier_answer_that_the_template_skips_is_refused(tmp_path):
    """Its thinking may be dropped."""
    template = QWEN3.replace("<|im_start|>{{ m.role", "{% if m.name %}{% continue %}{% endif %}<|im_start|>{{ m.role")
    tokenizer = Tokenizer(small_folder(tmp_path, template))
    earlier = answered({"content": TRACE, "name": "x"})
    with pytest.raises(UserError, match="does not show message 2, whose role is 'assistant', as such"):
        tokenizer.prompt([*earlier, *user_message("R")])
    del earlier[1]["name"]
    assert "assistant\nB<|im_end|>" in tokenizer.prompt([*earlier, *user_message("R")])
    # A template may change an answer, and show nothing of one without thinking.
    cut = "{{ m.content.split('</think>')[1] | lower if m.role == 'assistant' and not loop.last else m.content }}"
    tokenizer = Tokenizer(small_folder(tmp_path, CHATML.replace("{{ m.content }}", cut)))
    assert "b<|im_end|>" in tokenizer.prompt([*earlier, *user_message("R")])


def test_a_role_that_the_template_shows_as_another_is_refused(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% else %}<|im_end|>{% endif %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="message 1, whose role is 'developer'"):
        Tokenizer(small_folder(tmp_path, template)).prompt([{"role": "developer", "content": "S"}, *user_message("Q")])


def test_a_role_that_is_shown_in_capitals_is_known(tmp_path):
    template = "{% for m in messages %}[{{ m.role | upper }}] {{ m.content }} [END]\n{% endfor %}"
    asked = [{"role": "system", "content": "brief"}, *user_message("Q")]
    assert Tokenizer(small_folder(tmp_path, template)).prompt(asked) == "[SYSTEM] brief [END]\n[USER] Q [END]\n"


@pytest.mark.parametrize(
    "pad, template, learned",
    [
        ("<｜end▁of▁sentence｜>", DEEPSEEK, True),
        (None, DEEPSEEK, True),
        ("<|im_end|>", CHATML, True),
        ("<|endoftext|>", CHATML, True),
    ],
)
def test_the_end_of_a_turn_is_learned_in_both_stages(tmp_path, pad, template, learned):
    tokenizer = Tokenizer(small_folder(tmp_path / "t", template, pad_token=pad))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": answered(TRACE), "prompt": "Q", "chosen": TRACE, "rejected": "C"}))
    for data in (
        load_sft(str(file), tokenizer, 500, str(tmp_path)),
        load_pairs(str(file), tokenizer, 500, 500, str(tmp_path)),
    ):
        sequence = data.row(0)[0]
        ends = (sequence.tokens == tokenizer.eos_id) & sequence.learned
        assert ends.sum() == learned and ends[-2:].any()
        assert tokenizer.encode(tokenizer.prompt(user_message("Q"))) == sequence.tokens[~sequence.learned].tolist()


@pytest.mark.parametrize(
    "end, stop",
    [
        ("\n\n###\n", "\n\n###\n"),
        ("[/ANS]", "[/ANS]"),
        ("[/ANS]<|im_end|>\n", "[/ANS]"),
        ("<|im_end|>\n", ""),
        ("\n\n", ""),
    ],
)
def test_an_end_of_plain_text_is_learned_and_ends_a_sample_before_it(tmp_path, end, stop):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA: {% else %}{{ m.content }}"
        f"{end}{{% endif %}}{{% endfor %}}"
    )
    tokenizer = Tokenizer(small_folder(tmp_path / "t", template, eos_token="<|endoftext|>"))
    file, answer = tmp_path / "rows.jsonl", "# A\n\n### B\n[ANS] 2"
    file.write_text(
        "".join(json.dumps({"messages": answered(answer + more)}) + "\n" for more in ("", end, end.rstrip()))
    )
    data = load_sft(str(file), tokenizer, 500, str(tmp_path))
    stream = tokenizer.stream()
    for i in range(3 if stop.strip() else 1):  # an end that the row already has is not written again
        sequence = data.row(i)[0]
        learned = sequence.tokens[len(tokenizer.encode("Q: Q\nA: ")) :]
        assert tokenizer.decode(learned.tolist()) == answer + end.replace("<|im_end|>", "")
        assert learned[-1] == tokenizer.eos_id and ("<|im_end|>" in end or sequence.learned[-1])
    for token in learned.tolist():
        if token not in tokenizer.stop_ids and not stream.stopped:
            stream.push(token)
    assert stream.text.rstrip("\n") == answer and stream.stopped == bool(stop)
    assert tokenizer.stop_text == stop and (tokenizer.stream(shown=False) is None) == (not stop)


def test_eos_is_not_learned_in_stage_1_if_it_is_padding_and_not_the_template_s_end(tmp_path):
    tokenizer = Tokenizer(small_folder(tmp_path / "t", CHATML, eos_token="<|endoftext|>"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": answered(TRACE)}))
    data = load_sft(str(tmp_path / "rows.jsonl"), tokenizer, 500, str(tmp_path))
    assert data.row(0)[0].tokens[-1] == tokenizer.eos_id and data.row(0)[0].learned[-3:].tolist() == [True, True, False]


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "refuses .* too long"),
        ("{{ messages[0].content * 10**10 }}", "refuses the messages: it needs too much memory"),
        ("{{ 1 // 0 }}", "refuses the messages: ZeroDivisionError: integer division or modulo by zero$"),
        ("{{ raise_exception('not\n  so') }}", "refuses the messages: not so$"),
        ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "is broken: RecursionError"),
        ("{{ messages | nope }}", "is broken: No filter named 'nope'"),
        ("{% include 'a' %}", "refuses the messages"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "refuses the messages: RecursionError"),
    ],
)
def test_an_error_of_the_template_is_one_sentence(tmp_path, template, words):
    with pytest.raises(UserError, match=words):
        Tokenizer(small_folder(tmp_path, template))


def test_a_template_that_fails_later_and_then_works(chats):
    bomb = CHATML.replace("{{ m.content }}", "{% if m.content == 'bomb' %}{{ 'a' * 10**10 }}{% endif %}{{ m.content }}")
    tokenizer = Tokenizer(small_folder(chats["chatml"].folder.parent / "bomb", bomb))
    with pytest.raises(UserError, match="too much memory"):
        tokenizer.prompt(user_message("bomb"))
    assert tokenizer.prompt(user_message("Q")) == chats["chatml"].prompt(user_message("Q"))


def test_templates_get_what_transformers_gives_them(tmp_path):
    extras = (
        "{% if tools is not none or documents is not none or pad_token is none %}{{ 1 // 0 }}{% endif %}{{ mask_token }}"
        "{{ strftime_now('%%') }}{{ ['é<', {'b': 1, 'a': 2}] | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"
        "{% generation %}{% set m = 1 %}g{% endgeneration %}{% for i in [1, 2] %}{% break %}{% endfor %}|{{ m }}"
    )
    tokenizer = Tokenizer(small_folder(tmp_path, extras + CHATML, mask_token=None, add_bos_token=True))
    prompt = tokenizer.prompt(user_message("Q"))
    assert prompt.startswith('%["\\u00e9<",{"a":2,"b":1}]g|<|im_start|>system')


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_it(chats, name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    config = json.loads((chats[name].folder / "tokenizer_config.json").read_text())
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    for messages in (user_message("Q"), [{"role": "system", "content": "S"}, *answered(TRACE), *user_message("R")]):
        rendered, _ = utils.render_jinja_template(
            [messages], chat_template=config["chat_template"], add_generation_prompt=True, **special
        )
        assert chats[name].prompt(messages) == rendered[0]
