"""sample.py: prompts in all their forms, their frame, what ends a completion, and resuming a file."""

import fcntl
import io
import json
import shutil
import sys

import pytest

import sample
from nanoredi.common.errors import UserError
from nanoredi.data.messages import conversation, pair, prompt_of


@pytest.fixture
def said(toy_data, tmp_path, monkeypatch, capsys):
    """Run sample.py with arguments in an empty folder. Returns its output."""
    monkeypatch.chdir(tmp_path)

    def said(*words):
        capsys.readouterr()
        sample.main(["--model", str(toy_data / "model"), "--max_tokens", "9", "--dtype", "float32", *words])
        return capsys.readouterr().out

    return said


@pytest.fixture
def asked(monkeypatch):
    """The prompts that were sent to the model, as text."""
    texts, prompt = [], sample.Tokenizer.prompt
    monkeypatch.setattr(sample.Tokenizer, "prompt", lambda self, m: texts.append(prompt(self, m)) or texts[-1])
    return texts


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def completions(path):
    """Completions by the prompt's row and the sample's number."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    added = ("completion", "finish_reason", "tokens")
    return {json.dumps({k: v for k, v in row.items() if k not in added}): row["completion"] for row in rows}


TURNS = [{"role": "user", "content": "a=1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "b=3"}]


@pytest.mark.parametrize(
    "name, text, prompts",
    [
        (
            "p.jsonl",
            '{"prompt": "a=1"}\n\n{"problem": "a=2"}\n{"Question": "a=3", "answer": "3"}\n',
            ["a=1", "a=2", "a=3"],
        ),
        ("p.jsonl", json.dumps({"prompt": TURNS}) + "\n", ["a=1<assistant>2<user>b=3"]),
        ("p.jsonl", json.dumps({"prompt": None, "messages": TURNS}) + "\n", ["a=1<assistant>2<user>b=3"]),
        ("p.jsonl", json.dumps({"conversations": [{"from": "human", "value": "a=1"}]}) + "\n", ["a=1"]),
        ("p.jsonl", '{"instruction": "a=1", "input": "", "output": "4"}\n', ["a=1"]),
        ("p.csv", "problem,answer\na=1,1\na=2,2\n", ["a=1", "a=2"]),
        ("p.csv", """messages,problem\n"[{'role': 'user', 'content': 'a=2'}]",a=1\n""", ["a=1"]),
        ("p.CSV", "problem,answer\na=1,1\na=2,2\n", ["a=1", "a=2"]),
        ("-", json.dumps([{"prompt": "a=1"}, {"problem": "a=2"}], indent=1), ["a=1", "a=2"]),
        ("-", '["a=1", "a=2"]', ["a=1", "a=2"]),
        ("p.json", '["a=1", "a=2"]', ["a=1", "a=2"]),
        ("p.jsonl", '"a=1"\n"a=2"\n', ["a=1", "a=2"]),
        ("p.txt", "a=1\n\n a=2 \r\n", ["a=1", "a=2"]),
        ("prompts", "\ufeffa=1\na=2", ["a=1", "a=2"]),
        ("prompts", '\ufeff{"problem": "a=1"}\n', ["a=1"]),
        ("-", "a=1\na=2\n", ["a=1", "a=2"]),
        ("-", '{"question": "a=1"}\n', ["a=1"]),
    ],
)
def test_prompts_in_their_forms(said, asked, tmp_path, monkeypatch, name, text, prompts):
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    else:
        (tmp_path / name).write_bytes(text.encode())
    assert f": {len(prompts)} sample" in said("--prompts", name)
    assert asked == [f"<user>{prompt}<assistant>" for prompt in prompts]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.jsonl", '{"promt": "a=1", "id": 3}\n', "line 1 must hold 'prompt', .*; it holds 'promt', 'id'"),
        ("p.jsonl", '{"prompt": "  "}\n', "line 1 must hold 'prompt'"),
        ("p.jsonl", '{"prompt": "a=1", "Prompt": "a=2"}\n', "line 1 has 'prompt' in two spellings"),
        ("p.csv", """prompt\n"[{'role': 'user', 'content': 'a=1'}]"\n""", "'prompt' has messages written as text"),
        ("p.jsonl", '{"instruction": "a=2", "question": "a=1"}', "has 'question' and 'instruction': one field"),
        ("p.jsonl", '{"query": "a=2", "context": "a=1"}', "has 'query' and 'context': one field"),
        (
            "p.jsonl",
            '{"question": "a=2", "context": {"title": ["a=1"]}}',
            "line 1: context is {'title.*; it must be text",
        ),
        ("p.jsonl", "[1]\n", "must hold 'prompt', .*; it holds no fields"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: 'messages' must be text, or a list of messages"),
        ("p.jsonl", "a=1\n", "line 1 is not JSON"),
        ("prompts", '{"prompt": "a=1"}\n{\n', "prompts, line 2 is not JSON"),
        ("prompts", '[{"prompt": "a=1"},]\n', "prompts is not JSON"),
        ("p.txt", "\n\n", "p.txt holds no rows"),
        ("p.txt", None, "cannot read p.txt: No such file"),
        ("p.txt", b"\xff\xfe", "p.txt is not UTF-8 text"),
    ],
)
def test_files_without_prompts_are_refused(said, tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        said("--prompts", name)


def test_a_row_s_own_system_message_comes_before_the_flag_s():
    flags = sample.SampleFlags(system="F")
    for row in ({"system": "S", "prompt": "Q"}, {"messages": [{"role": "user", "content": "Q"}], "System": "S"}):
        assert [m["content"] for m in sample._messages("here", row, flags)] == ["S", "Q"]
    assert [m["content"] for m in sample._messages("here", {"problem": "Q"}, flags)] == ["F", "Q"]
    solved = {"problem": "Q", "messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "A"}]}
    assert [m["content"] for m in sample._messages("here", solved, flags)] == ["F", "Q"]


def test_an_instruction_is_asked_with_its_input_and_a_question_after_its_context():
    flags = sample.SampleFlags(template="{problem}!")
    for row in ({"instruction": "I", "input": "X", "output": "A"}, {"context": "I", "question": "X"}):
        assert [m["content"] for m in sample._messages("here", row, flags)] == ["I\nX!"]


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "P", "messages": TURNS},
        {"problem": "P", "messages": TURNS[:2], "instruction": None},
        {"prompt": "P", "messages": TURNS, "context": "C"},
        {"question": "P", "context": "C", "conversations": TURNS},
        {"query": "P", "id": 3},
        {"input": TURNS[:1]},
        {"problem": "P", "messages": [], "conversations": TURNS},
        {"problem": "P", "instruction": "P", "context": []},
    ],
)
def test_a_row_s_prompt_in_sampling_is_the_one_in_training(row):
    asked = sample._messages("here", row, sample.SampleFlags())
    assert asked == prompt_of("here", row) == pair("here", {**row, "chosen": "B", "rejected": "C"})[0]
    assert asked == conversation("here", {**row, "completion": "B"})[:-1]


def test_a_row_that_makes_no_prompt_is_named(said, tmp_path):
    write(tmp_path / "p.jsonl", {"messages": TURNS}, {"messages": TURNS[:2]})
    with pytest.raises(
        UserError, match="p.jsonl, line 2: the last message is the assistant's; a prompt must end with "
    ):
        said("--prompts", str(tmp_path / "p.jsonl"))
    write(tmp_path / "p.jsonl", {"messages": TURNS}, {"prompt": [{"role": "tool", "content": "1"}]})
    with pytest.raises(UserError, match="p.jsonl, line 2: .* the toy knows the roles"):
        said("--prompts", str(tmp_path / "p.jsonl"))


def test_a_prompt_without_a_flag_and_in_a_template(said, asked):
    text = said("a=1", "--n", "2", "--template", "b=2+{problem}")
    assert ": 2 samples at temperature" in text and "--- b=2+a=1\n" in text and "--- b=2+a=1  [sample 1]" in text
    assert asked == ["<user>b=2+a=1<assistant>"]
    with pytest.raises(UserError, match="the toy knows the roles user and assistant"):
        said("a=1", "--system", "a")
    for words in (["a=1", "b=1"], ["a=1", "--prompt", "b=1"]):
        with pytest.raises(UserError, match="follows no flag"):
            said(*words)
    with pytest.raises(UserError, match="give --prompt or --prompts"):
        said("a=1", "--prompts", "x")
    with pytest.raises(UserError, match="give --chat or --out"):
        said("--chat", "--out", "x")


def test_neither_a_negative_number_nor_what_follows_two_dashes_is_a_flag():
    for prompt in ("--x", "-x", "--chat"):
        argv = ["--stop", "-1e-6", "-2", "--", prompt]
        given = sample.read_flags("", argv, "evaluate", sample.SampleFlags, positional="prompt")[1]
        assert given == {"evaluate": {"stop": ["-1e-6", "-2"], "prompt": prompt}}


def test_a_stop_text_ends_a_completion(said, tmp_path):
    write(tmp_path / "p.jsonl", {"prompt": "a=1"})
    said("--prompts", "p.jsonl", "--n", "30", "--out", "free")
    free = completions(tmp_path / "free")
    said("--prompts", "p.jsonl", "--n", "30", "--out", "ended", "--stop", "Wait", "=", "7")
    ended = completions(tmp_path / "ended")
    assert {
        key: min((text.split(stop)[0] for stop in ("Wait", "=", "7")), key=len) for key, text in free.items()
    } == ended
    assert sum(free[key] != ended[key] for key in free) > 4
    for row in map(json.loads, (tmp_path / "ended").read_text().splitlines()):
        assert (row["finish_reason"] == "length") <= (row["tokens"] == 9)
    shown = said("a=1", "--stop", "Wait", "=", "7")
    assert f"--- a=1\n\n{ended[json.dumps({'prompt': 'a=1', 'sample': 0})]}\n\n(" in shown
    assert "\n\n(1 token, cut off)\n" in said("a=1", "--max_tokens", "1")


def test_the_same_command_resumes(said, tmp_path):
    write(tmp_path / "p.jsonl", {"prompt": "a=1", "id": 0}, {"prompt": "a=2"}, {"problem": "a=1"})
    words, path = ["--prompts", "p.jsonl", "--n", "3", "--batch_size", "2", "--out", "made/o"], tmp_path / "made" / "o"
    assert said(*words) == "made/o: 9 completions\n"
    whole, lines = completions(path), path.read_text().splitlines(keepends=True)
    assert len(set(whole.values())) == 9, "the third prompt is the first one; its samples are further ones"
    assert sorted(json.loads(line)["sample"] for line in lines) == [0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert said(*words) == "made/o: 9 completions are there, 0 are missing\nmade/o: 9 completions\n"
    path.write_text("".join(lines[:4]) + lines[4][:20])
    assert "4 completions are there, 5 are missing" in said(*words, "--batch_size", "8")
    assert completions(path) == whole
    before = path.read_text()
    for other, sentence in (
        (["--temperature", "0.5"], "the setting temperature is 0.6 there and 0.5 here"),
        (["--stop", "7"], r"the setting stop is \[\] there and \['7'\] here"),
        (["--dtype", "bfloat16"], "the setting dtype is 'float32' there and 'bfloat16' here"),
    ):
        with pytest.raises(UserError, match=sentence):
            said(*words, *other)
    with open(path, "ab") as file, pytest.raises(UserError, match="another process writes to made/o"):
        fcntl.flock(file, fcntl.LOCK_EX)
        said(*words)
    path.write_text(before + "5\n")
    with pytest.raises(UserError, match="made/o, line 10 is no completion of these prompts"):
        said(*words)
    path.write_text(before)
    write(tmp_path / "p.jsonl", {"prompt": "a=1", "id": 0}, {"prompt": "a=2"})
    with pytest.raises(UserError, match="made/o, line .* is no completion of these prompts"):
        said(*words)
    assert path.read_text() == before
    (tmp_path / "mine").write_text("my own\n")
    with pytest.raises(UserError, match="mine lacks the mine.settings.json that describes it"):
        said("a=1", "--out", "mine")
    assert (tmp_path / "mine").read_text() == "my own\n"
    (tmp_path / "new.settings.json").write_text('{"dark": true}')  # another program's
    with pytest.raises(UserError, match="new.settings.json: the object has no field 'setting'"):
        said("a=1", "--out", "new")
    assert (tmp_path / "new.settings.json").read_text() == '{"dark": true}'


def test_what_identifies_a_sample_is_short_and_depends_on_the_prompt_and_the_number_alone():
    row = {"prompt": "a=1", "solution": "x" * 10_000, "sample": 0}
    assert len(sample._key(row)) < 100 and sample._key(row) == sample._key({**row, "completion": "2", "tokens": 1})
    assert len({sample._key({**row, **change}) for change in ({}, {"sample": 1}, {"prompt": "a=2"})}) == 3


@pytest.mark.parametrize("name", ["o.csv", "o.Parquet", "o.jsonl.gz"])
def test_completions_are_not_written_under_another_format_s_name(said, tmp_path, name):
    with pytest.raises(UserError, match="give --out a name that ends in .jsonl, not "):
        said("a=1", "--out", name)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_will_do(said, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert said("a=1", "--out", "o") == (
        "warning: o cannot be locked (Function not implemented): do not start a second process on it\no: 1 completions\n"
    )


def test_completions_beside_the_model_resume(said, toy_data, tmp_path):
    shutil.copytree(toy_data / "model", tmp_path / "m")
    for name in ("a.jsonl", "b.json"):
        assert said("a=1", "--model", "m", "--out", f"m/{name}") == f"m/{name}: 1 completions\n"
    for model in ("./m/", str(tmp_path / "m")):
        for name in ("a.jsonl", "b.json"):
            assert "1 completions are there, 0 are missing" in said("a=1", "--model", model, "--out", f"m/{name}")
