"""Chat templates and token ids: golden facts of the real tokenizer, other kinds of templates, and what is refused."""

import json
import shutil

import pytest
import tokenizers
from templates import ANSWER_IDS, SYSTEM_IDS
from tokenizers import decoders, models

from nanoredi.common.errors import UserError
from nanoredi.data.messages import check_messages, user_message
from nanoredi.data.tokenizer import Stream, Tokenizer

CONVERSATION = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\\boxed{2}"},
]
# Like DeepSeek-R1-Distill's: <think> is opened in the generation prompt, and thinking dropped from answers.
R1_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% else %}<assistant>"
    "{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ c }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def edited(toy_data, tmp_path, **changes) -> Tokenizer:
    """The toy's tokenizer with changes to tokenizer_config.json."""
    shutil.copytree(toy_data / "model", tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Tokenizer(tmp_path / "t")


def test_real_template_and_special_tokens(real_tokenizer):
    assert (real_tokenizer.eos_id, real_tokenizer.pad_id, real_tokenizer.stop_ids) == (151643, 151643, [151643, 151645])
    system = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    prompt = system + "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert real_tokenizer.prompt(CONVERSATION[:1]) == prompt
    assert real_tokenizer.prompt(CONVERSATION[:1], think=True) == prompt.removesuffix("\n") + "<think>\n"
    assert real_tokenizer.split(CONVERSATION) == (prompt, "<think>\nAdd.\n</think>\n\\boxed{2}<|im_end|>\n")


def test_real_ids_are_pinned(real_tokenizer):
    prompt, completion = real_tokenizer.split(CONVERSATION)
    assert real_tokenizer.encode(prompt) == [*SYSTEM_IDS, 3838, 374, 220, 16, 10, 16, 30, *ANSWER_IDS]
    assert real_tokenizer.encode(completion) == [
        13708,
        766,
        397,
        2212,
        624,
        522,
        26865,
        397,
        59,
        79075,
        90,
        17,
        92,
        151645,
        198,
    ]


def test_real_streaming_holds_half_characters_back(real_tokenizer):
    ids = real_tokenizer.encode("∑ 😀 ü")
    stream = real_tokenizer.stream()
    pieces = []
    for i in ids:
        stream.push(i)
        pieces.append(stream.text[len("".join(pieces)) :])
    assert "".join(pieces) == "∑ 😀 ü" and "\ufffd" not in "".join(pieces)
    # Ends within a character, after invalid bytes: the text is that of decode().
    for ids in ([198, 84200, 44474, 139816], real_tokenizer.encode("🤖🧮")[:-1]):
        stream = real_tokenizer.stream()
        for i in ids:
            stream.push(i)
        stream.finish()
        assert stream.text == real_tokenizer.decode(ids) and stream.text.endswith("\ufffd")


def test_streaming_survives_a_byte_that_makes_earlier_ones_no_text():
    """Tokenizers with <0x41> for a byte decode a run of such tokens as a whole."""
    backend = tokenizers.Tokenizer(models.BPE({f"<0x{i:02X}>": i for i in range(256)} | {"b": 256, "c": 257}, []))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = Stream(backend, ["c"])
    for token in (0x41, 0xC3, 256, 256, 257):
        stream.push(token)
    stream.finish()
    assert (stream.text, stream.stopped) == ("A\ufffdbb", True)


def test_toy_round_trip(toy_data):
    tokenizer = Tokenizer(toy_data / "model")
    text = "<think>~c=7;Waita=3;b-2=1;</think>\\boxed{0}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == 21
    assert tokenizer.split([*user_message("a=3b-2"), {"role": "assistant", "content": text}]) == (
        "<user>a=3b-2<assistant>",
        text,
    )
    assert tokenizer.stop_ids == [tokenizer.eos_id] != [tokenizer.pad_id]
    with pytest.raises(UserError, match="cannot encode 'xyz'"):
        tokenizer.encode("xyz")


def test_a_template_that_drops_thinking_loses_none_of_it(toy_data, tmp_path):
    tokenizer = edited(toy_data, tmp_path, chat_template=R1_TEMPLATE)
    conversation = [*user_message("a=1"), {"role": "assistant", "content": "<think>b+1=2;</think>2"}]
    assert tokenizer.split(conversation) == ("<user>a=1<assistant><think>", "b+1=2;</think>2<eos>")
    assert (
        tokenizer.prompt(conversation[:1])
        == tokenizer.prompt(conversation[:1], think=True)
        == "<user>a=1<assistant><think>"
    )


def test_templates_in_a_list_and_in_a_file(toy_data, tmp_path):
    assert (
        edited(toy_data, tmp_path, chat_template=[{"name": "default", "template": R1_TEMPLATE}])
        .prompt(user_message("a"))
        .endswith("<think>")
    )
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    special = {name: config.pop(name) for name in ("eos_token", "pad_token")}
    config["chat_template"] = {"default": R1_TEMPLATE}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "t" / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = Tokenizer(tmp_path / "t")
    assert tokenizer.prompt(user_message("a")).endswith("<think>")
    assert (tokenizer.eos_id, tokenizer.pad_id) == tuple(map(tokenizer.backend.token_to_id, special.values()))
    (tmp_path / "t" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}~{% endfor %}")
    assert Tokenizer(tmp_path / "t").prompt(user_message("a=1")) == "a=1~"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"chat_template": None}, "has no chat template"),
        ({"chat_template": "{% if %}"}, "chat template of .* is broken"),
        ({"chat_template": "nothing"}, "shows the last answer 0 times"),
        ({"chat_template": "Q: {{ messages[-1].content }} A:"}, "shows an answer without its question"),
        ({"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}, "refuses the messages"),
        ({"eos_token": "<nope>"}, "eos_token is '<nope>', which is not in the vocabulary"),
        ({"eos_token": None}, "tokenizer_config.json: eos_token is missing$"),
        (
            {"chat_template": [{"name": "rag", "template": "x"}, {"name": "tools"}]},
            "no chat template named default, only rag, tools",
        ),
        ({"bos_token": 5}, "tokenizer_config.json: bos_token is 5; it must be text or an object or null"),
        ({"pad_token": {"content": ["x"]}}, "tokenizer_config.json: pad_token is "),
    ],
)
def test_unusable_templates_and_tokens(toy_data, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        edited(toy_data, tmp_path, **changes)


def test_a_template_s_refusal_is_shown(toy_data):
    with pytest.raises(UserError, match="the toy knows the roles user and assistant"):
        Tokenizer(toy_data / "model").prompt([{"role": "system", "content": "a"}])


def test_a_folder_with_a_tokenizer_further_down_is_not_mistaken_for_a_hub_name(toy_data, tmp_path):
    shutil.copytree(toy_data / "model", tmp_path / "models--org--name" / "snapshots" / "1a2b")
    with pytest.raises(UserError, match="is not a model's folder: give .*/snapshots/1a2b$"):
        Tokenizer(tmp_path / "models--org--name")
    with pytest.raises(UserError, match="hf download Qwen/Qwen2.5-Math-1.5B --local-dir Qwen2.5-Math-1.5B; then give"):
        Tokenizer("Qwen/Qwen2.5-Math-1.5B")


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json; it is not a model's folder"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer.json; copy the one of the model that it was made from"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        UserError, match="tokenizer.json only points to a file that git-lfs has not fetched: git lfs pull"
    ):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer .*tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("value", ["", "  ", [], None, 3, [{"role": "user"}], [{"role": "user", "content": 1}], ["a"]])
def test_malformed_messages_are_refused(value):
    with pytest.raises(UserError, match="here must be text, or a list of messages"):
        check_messages("here", value)


@pytest.mark.parametrize(
    "stops, text, stopped",
    [
        (["b+2"], "a=1", True),  # a stop string of several tokens
        (["+2c", "b+"], "a=1", True),  # the one that is completed first
        (["2d"], "a=1b+2c*3", False),
        (["3d"], "a=1b+2c*3", False),  # the possible start of a stop string is shown at the end
    ],
)
def test_streaming_ends_before_a_stop_text(toy_data, stops, text, stopped):
    tokenizer = Tokenizer(toy_data / "tokenizer")
    stream = tokenizer.stream(stops)
    shown = []
    for token in tokenizer.encode("a=1b+2c*3"):
        stream.push(token)
        shown.append(stream.text)
        if stream.stopped:
            break
    stream.finish()
    assert (stream.text, stream.stopped) == (text, stopped)
    assert all(text.startswith(piece) for piece in shown)
    assert stops != ["3d"] or shown[-1] == "a=1b+2c*"
