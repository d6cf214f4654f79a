"""Rows to tokens: the two stages' rules, golden ids, limits, the cache, malformed rows."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from templates import ANSWER_IDS, SYSTEM_IDS, real_folder

from nanoredi.common.errors import UserError
from nanoredi.data import cache as data_cache
from nanoredi.data.messages import user_message
from nanoredi.data.sequences import load_pairs, load_sft
from nanoredi.data.tokenizer import Tokenizer

PAIR = {"prompt": "a=1b+2", "chosen": "<think>b+2=3;</think>\\boxed{3}", "rejected": "<think>b+2=4;</think>\\boxed{4}"}


def sequence(data, j):
    """Tokens and learned of sequence j; a pair has two sequences."""
    return data.row(j // len(data.sides))[j % len(data.sides)][:2]


@pytest.fixture
def tokenizer(toy_data) -> Tokenizer:
    return Tokenizer(toy_data / "model")


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def conversation(prompt="a=1b+2", answer=PAIR["chosen"]):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def test_real_ids_of_both_stages_are_pinned(real_tokenizer, write, cache):
    head = [*SYSTEM_IDS, 16, 10, 16, 30, *ANSWER_IDS]
    answer = [59, 79075, 90, 17, 92, 151645, 198]
    tokens, learned = sequence(load_sft(write(conversation("1+1?", "\\boxed{2}")), real_tokenizer, 100, cache), 0)
    assert tokens.tolist() == [*head, *answer, 151643]
    # Stage 1 never learns <|endoftext|>: it is the padding token too.
    assert learned.tolist() == [False] * len(head) + [True] * len(answer) + [False]
    pairs = load_pairs(
        write({"prompt": "1+1?", "chosen": "\\boxed{2}", "rejected": "3"}), real_tokenizer, 100, 100, cache
    )
    tokens, learned = sequence(pairs, 0)
    assert tokens.tolist() == [*head, *answer, 151643]
    assert learned.tolist() == [False] * len(head) + [True] * (len(answer) + 1)
    assert sequence(pairs, 1)[0].tolist() == [*head, 18, 151645, 198, 151643]


# By the published templates, as transformers renders and tokenises them.
INSTRUCT = [151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264, 10950, 17847]
INSTRUCT += [13, 151645, 198, 151644, 872, 198, 16, 10, 16, 30, 151645, 198, 151644, 77091, 198]
QWEN3 = [151644, 872, 198, 16, 10, 16, 30, 151645, 198, 151644, 77091, 198]
DEEPSEEK = [151646, 151644, 16, 10, 16, 30, 151645, 151648, 198]


@pytest.mark.parametrize(
    "family, prompt, trace, plain",
    [
        (
            "qwen2.5-instruct",
            INSTRUCT,
            [13708, 766, 397, 2212, 624, 522, 26865, 1339, 17, 151645, 198],
            [32313, 151645, 198],
        ),
        (
            "qwen3",
            QWEN3,
            [151667, 198, 2212, 624, 151668, 271, 17, 151645, 198],
            [151667, 271, 151668, 271, 32313, 151645, 198],
        ),
        ("deepseek-r1-distill-qwen", DEEPSEEK, [2212, 624, 151649, 271, 17, 151643], [32313, 151643]),
    ],
)
def test_whole_conversations_of_other_families_are_pinned(shared, write, cache, tmp_path, family, prompt, trace, plain):
    tokenizer = Tokenizer(real_folder(tmp_path, shared, family))
    answer = "<think>\nAdd.\n</think>\n\n2"
    assert tokenizer.encode(tokenizer.prompt(user_message("1+1?"))) == prompt
    stage_1 = load_sft(write(conversation("1+1?", answer)), tokenizer, 100, cache)
    stage_2 = load_pairs(write({"prompt": "1+1?", "chosen": answer, "rejected": "Okay"}), tokenizer, 100, 100, cache)
    for (tokens, learned), completion in zip(
        (sequence(stage_1, 0), sequence(stage_2, 0), sequence(stage_2, 1)), (trace, trace, plain)
    ):
        assert tokens.tolist() == [*prompt, *completion]
        assert learned.tolist() == [False] * len(prompt) + [True] * len(completion)
    # If the whole text were tokenised at once, the line break after <think> would merge with the answer's into one token.
    if tokenizer.prompt(user_message("1+1?")).endswith("<think>\n"):
        for answer in ("<think>\n\nA</think>2", "\nA</think>2"):
            tokens, learned = sequence(load_sft(write(conversation("1+1?", answer)), tokenizer, 100, cache), 0)
            assert tokens[~learned].tolist() == prompt and tokenizer.decode(tokens[learned].tolist()).startswith("\nA")


def test_rows_without_anything_to_learn_are_counted(tokenizer, write, cache):
    data = load_sft(
        write(conversation(), conversation("a=1", " \n"), conversation("a=1", "<eos>")), tokenizer, 50, cache
    )
    assert len(data) == 1
    assert [note.split(": ", 1)[1] for note in data.notes] == [
        "2 of 3 rows dropped: an answer is nothing but white space"
    ]
    rows = PAIR, {**PAIR, "rejected": ""}, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "chosen": "1<eos>"}
    data = load_pairs(write(*rows), tokenizer, 50, 50, cache)
    assert len(data) == 2
    assert [note.split(": ", 1)[1] for note in data.notes] == [
        "1 of 4 rows dropped: an answer is nothing but white space",
        "1 of 4 rows dropped: chosen and rejected are the same",
        "1 of 4 rows have an answer with the template's own header or end: it is not doubled",
    ]


def test_answers_that_continue_after_an_end_are_counted(tokenizer, write, cache):
    rows = conversation(), conversation("a=1", "1<eos>2<eos>"), {"prompt": "a=1", "completion": "1<eos>2"}
    goes_on = "an answer that continues after an end of turn: all of it is learned"
    assert {note.split(": ", 1)[1] for note in load_sft(write(*rows), tokenizer, 50, cache).notes} == {
        "1 of 3 rows have an answer with the template's own header or end: it is not doubled",
        f"2 of 3 rows have {goes_on}",
    }
    notes = load_pairs(write(PAIR, {**PAIR, "chosen": "<think><eos></think>1"}), tokenizer, 50, 50, cache).notes
    assert [note.split(": ", 1)[1] for note in notes] == [f"1 of 2 rows have {goes_on}"]


def test_the_weight_of_a_row(tokenizer, write, cache):
    rows = [{**conversation(), "weight": weight} for weight in (None, 0.25, -1, 0)]
    assert load_sft(write(*rows), tokenizer, 50, cache).row_weights.tolist() == [1.0, 0.25, -1.0, 0.0]
    row = conversation()
    row["messages"][1]["weight"] = 0  # OpenAI's way to exclude an answer from training
    rows = row, {**row, "weight": None}, {**row, "weight": 0.5}
    assert load_sft(write(*rows), tokenizer, 50, cache).row_weights.tolist() == [0.0, 0.0, 0.5]
    pairs = load_pairs(write(PAIR, {**PAIR, "chosen_weight": 0.5}), tokenizer, 50, 50, cache)
    assert pairs.row_weights.tolist() == [1.0, 1.0, 0.5, 1.0]
    for weight in (1.5, -2, "1", True):
        with pytest.raises(UserError, match="line 1: 'weight' must be a number from -1 to 1, not "):
            load_sft(write({**conversation(), "weight": weight}), tokenizer, 50, cache)
    with pytest.raises(UserError, match="line 1 is not JSON: NaN is not a finite number"):
        load_sft(write({**conversation(), "weight": float("nan")}), tokenizer, 50, cache)
    with pytest.raises(UserError, match="line 1: 'chosen_weight' must be a number from 0 to 1, not '-1'"):
        load_pairs(write({**PAIR, "chosen_weight": -1}), tokenizer, 50, 50, cache)


def test_half_a_surrogate_pair_is_named(real_tokenizer, write, cache):
    with pytest.raises(UserError, match=r"line 2: half a surrogate pair, .*user\\nx=\\ud83d'"):
        load_sft(write(conversation(), conversation("x=\ud83d 1")), real_tokenizer, 50, cache)


def test_toy_rows(tokenizer, write, cache):
    data = load_sft(write(conversation()), tokenizer, 100, cache)
    tokens, learned = sequence(data, 0)
    assert (
        tokenizer.backend.decode(tokens.tolist(), skip_special_tokens=False)
        == "<user>a=1b+2<assistant>" + PAIR["chosen"] + "<eos>"
    )
    # Here padding is a separate token, so eos is learned in stage 1, too.
    assert learned.sum() == len(tokenizer.encode(PAIR["chosen"])) + 1 == data.row(0)[0].num_learned and learned[-1]
    assert data.notes == []


def test_text_and_messages_are_the_same_row(tokenizer, write, cache):
    as_messages = {
        "prompt": [{"role": "user", "content": PAIR["prompt"]}],
        **{key: [{"role": "assistant", "content": PAIR[key]}] for key in ("chosen", "rejected")},
    }
    data = load_pairs(write(PAIR, as_messages), tokenizer, 50, 50, cache)
    assert len(data) == 2
    for i in (0, 1):
        assert np.array_equal(sequence(data, i)[0], sequence(data, i + 2)[0])


def test_limits_truncate_as_the_original_and_are_reported(tokenizer, write, cache):
    whole = load_pairs(write(PAIR), tokenizer, 50, 50, cache)
    cut = load_pairs(write(PAIR), tokenizer, 3, 5, cache)
    prompt_length = int((~sequence(whole, 0)[1]).sum())
    assert sequence(cut, 0)[0].tolist() == sequence(whole, 0)[0][prompt_length - 3 : prompt_length + 5].tolist()
    assert [note.split(": ")[1] for note in cut.notes] == [
        "1 of 1 prompts cut to their last 3 tokens",
        "2 of 1 responses cut to 5 tokens",
    ]
    sft = load_sft(write(conversation(), conversation("a=1b+2c+3d+4e+5")), tokenizer, 12, cache)
    assert len(sft) == 1 and len(sequence(sft, 0)[0]) == 12
    assert [note.split(": ", 1)[1] for note in sft.notes] == [
        "2 of 2 conversations cut to 12 tokens",
        "1 of 2 rows dropped: the prompt alone fills max_tokens",
    ]
    with pytest.raises(UserError, match="no row of .* is left: .*the prompt alone fills max_tokens"):
        load_sft(write(conversation()), tokenizer, 8, cache)


def test_the_cache_is_used_and_follows_data_limits_and_tokenizer(tokenizer, write, cache, tmp_path, monkeypatch):
    path = write(PAIR)
    first = load_pairs(path, tokenizer, 3, 50, cache)
    with monkeypatch.context() as m:
        m.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
        again = load_pairs(path, tokenizer, 3, 50, cache)
    assert (
        np.array_equal(first.tokens, again.tokens)
        and again.notes == first.notes
        and isinstance(again.tokens.base, np.memmap)
    )
    shutil.copytree(tokenizer.folder, tmp_path / "other")
    (tmp_path / "other" / "added_tokens.json").write_text("{}")
    load_pairs(path, tokenizer, 4, 50, cache)
    load_pairs(path, Tokenizer(tmp_path / "other"), 3, 50, cache)
    assert len(load_pairs(write(PAIR, PAIR), tokenizer, 3, 50, cache)) == 2
    assert len(list(Path(cache).iterdir())) == 4


def test_data_that_changes_with_equal_size_and_time_is_noticed(tokenizer, write, cache):
    for rejected in ("\\boxed{5}", "\\boxed{6}"):
        path = write(PAIR, {**PAIR, "rejected": rejected})
        os.utime(path, (10**9, 10**9))
        now = load_pairs(path, tokenizer, 50, 50, cache)
        assert tokenizer.decode(sequence(now, 3)[0].tolist()).endswith(rejected)
    assert len(list(Path(cache).iterdir())) == 2  # nothing half-written is left


@pytest.mark.parametrize("name", ["tokens", "learned", "weights", "offsets", "whole.json"])
def test_a_damaged_cache_is_rebuilt(tokenizer, write, cache, name):
    path = write(PAIR, PAIR)
    first = load_pairs(path, tokenizer, 50, 50, cache)
    tokens = first.tokens.copy()
    file = next(Path(cache).iterdir()) / name
    for content in (file.read_bytes()[:-1], b"\7" + file.read_bytes()[1:], b""):
        file.write_bytes(content)
        again = load_pairs(path, tokenizer, 50, 50, cache)
        assert np.array_equal(again.tokens, tokens)
        assert again.notes[-1].endswith("was damaged and has been rebuilt")
    assert load_pairs(path, tokenizer, 50, 50, cache).notes == first.notes


def test_two_runs_fill_one_cache(tokenizer, write, cache, monkeypatch):
    """The second starts while the first is running, and both end with one complete cache."""
    path = write(PAIR)
    encode_rows = Tokenizer.encode_rows

    def slow(self, rows):
        with monkeypatch.context() as m:
            m.setattr(Tokenizer, "encode_rows", encode_rows)
            load_pairs(path, tokenizer, 50, 50, cache)
        return encode_rows(self, rows)

    with monkeypatch.context() as m:
        m.setattr(Tokenizer, "encode_rows", slow)
        assert len(load_pairs(path, tokenizer, 50, 50, cache)) == 1
    assert len(list(Path(cache).iterdir())) == 1


def test_what_another_run_has_just_filled_is_kept(tokenizer, write, cache, monkeypatch):
    path, remove_leftovers = write(PAIR), data_cache.remove_leftovers

    def late(folder):
        with monkeypatch.context() as m:
            m.setattr(data_cache, "remove_leftovers", remove_leftovers)
            load_pairs(path, tokenizer, 50, 50, cache)
        next(Path(cache).iterdir()).joinpath("theirs").touch()

    monkeypatch.setattr(data_cache, "remove_leftovers", late)
    load_pairs(path, tokenizer, 50, 50, cache)
    assert len(list(Path(cache).glob("*/theirs"))) == 1


def test_a_failed_cache_leaves_nothing_behind(tokenizer, write, cache):
    with pytest.raises(UserError, match="line 2 has no field 'rejected'"):
        load_pairs(write(PAIR, {"prompt": "a=1", "chosen": "1"}), tokenizer, 50, 50, cache)
    with pytest.raises(UserError, match="rows.jsonl, line 3: the tokenizer of .* cannot encode 'xyz"):
        load_pairs(write(PAIR, PAIR, {**PAIR, "chosen": "xyz"}, PAIR), tokenizer, 50, 50, cache)
    assert list(Path(cache).iterdir()) == []


def test_many_rows_keep_their_order(tokenizer, write, cache):
    rows = [{**PAIR, "prompt": "a=" + "1" * (1 + i % 7), "chosen": f"\\boxed{{{i}}}"} for i in range(500)]
    data = load_pairs(write(*rows), tokenizer, 50, 50, cache)
    assert len(data) == 500
    for i, row in enumerate(rows):
        text = tokenizer.backend.decode(sequence(data, 2 * i)[0].tolist(), skip_special_tokens=False)
        assert text == f"<user>{row['prompt']}<assistant>{row['chosen']}<eos>"


@pytest.mark.parametrize("header", [None, "{{ m['role'] }}:  "])
def test_tokens_that_start_after_the_prompt_are_learned(shared, write, cache, tmp_path, header):
    """Checked by each token's offset, also if a token straddles the border or one character is many tokens. The second
    header ends with two spaces, which are one token by themselves and two before a word."""
    folder = shared / "qwen2.5-tokenizer"
    if header:
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        config = json.loads((folder / "tokenizer_config.json").read_text())
        opened = "{% if add_generation_prompt %}assistant:  {% endif %}"
        config["chat_template"] = "{% for m in messages %}" + header + "{{ m['content'] }}{% endfor %}" + opened
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        folder = tmp_path
    tokenizer = Tokenizer(folder)
    answers = ["\n\nx", "\n", " a", "🤖🤖 b", "e\u0301", "\u0301a", "  ", "日本", "<think>\n", "\r\n", "\t1"]
    rows = [conversation(prompt, answer + "z 1") for prompt in ("1", "é", "🤖") for answer in answers]
    data = load_sft(write(*rows), tokenizer, 1000, cache)
    assert len(data) == len(rows)
    for i, row in enumerate(rows):
        prompt, completion = tokenizer.split(row["messages"])
        encoding = tokenizer.backend.encode(prompt + completion, add_special_tokens=False)
        tokens, learned = sequence(data, i)
        assert tokens.tolist() == [*encoding.ids, tokenizer.eos_id]
        assert learned.tolist() == [start >= len(prompt) for start, _ in encoding.offsets] + [bool(header)]


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", "line 2 is not JSON"),
        ("3", "line 2 has no field 'chosen'"),
        ({"prompt": "a=1", "chosen": "1"}, "line 2 has no field 'rejected'"),
        ({**PAIR, "prompt": ""}, "line 2: 'prompt' must be text"),
        ({**PAIR, "prompt": 5}, "line 2: 'prompt' must be text"),
        (
            {**PAIR, "chosen": [{"role": "user", "content": "1"}]},
            "line 2: 'chosen' must be one message of the assistant",
        ),
        ({**PAIR, "rejected": [{"role": "assistant", "content": "1"}] * 2}, "line 2: 'rejected' must be one message"),
    ],
)
def test_malformed_pairs_are_named(tokenizer, write, cache, row, words):
    with pytest.raises(UserError, match=words):
        load_pairs(write(PAIR, row), tokenizer, 50, 50, cache)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "a", "id": 3}, "line 2 has no field 'messages' .*; it holds 'text', 'id'"),
        ({"prompt": "a", "completion": "1", "label": False}, "line 2: 'label' is false; give the row a 'weight'"),
        ({**conversation(), "correct": False}, "line 2: 'correct' is false; .* or drop it"),
        ({"messages": "a"}, "line 2: messages is 'a'; it must be a list"),
        ({"messages": []}, "line 2 has no field 'messages' .*; it holds nothing"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must be the assistant's; its role is 'user'"),
        ({"messages": conversation()["messages"][1:]}, "line 2: there is no message before the assistant's"),
    ],
)
def test_malformed_conversations_are_named(tokenizer, write, cache, row, words):
    with pytest.raises(UserError, match=words):
        load_sft(write(conversation(), row), tokenizer, 50, cache)


def test_missing_and_empty_files(tokenizer, write, cache, tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        load_sft(str(tmp_path / "nowhere.jsonl"), tokenizer, 50, cache)
    with pytest.raises(UserError, match="is a folder: give the file in it that holds the rows"):
        load_sft(str(tmp_path), tokenizer, 50, cache)
    with pytest.raises(UserError, match="holds no rows"):
        load_sft(write(), tokenizer, 50, cache)
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        load_sft(str(tmp_path / "latin.jsonl"), tokenizer, 50, cache)
