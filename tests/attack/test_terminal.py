"""What a terminal would obey reaches none, whichever way it goes; and what a run with broken weights says."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

import train_sft
from nanoredi.common.errors import UserError, run_script
from nanoredi.report import __main__ as report

RED, SHOWN = "\x1b[31m\x9b2J\u202e\r", "\\x1b[31m\\x9b2J\\u202e\\r"


def test_control_characters_are_shown_escaped(capsys, monkeypatch):
    def main(argv):
        print(f"{RED}\tas it is\n\x1b[2mdim\x1b[0m")
        raise UserError(f"no {RED}\nfile")

    monkeypatch.setattr(sys.stdout, "write", sys.stdout.write)
    with pytest.raises(SystemExit):
        run_script(main)
    said = capsys.readouterr()
    assert said.out == f"{SHOWN}\tas it is\n\x1b[2mdim\x1b[0m\n" and said.err == f"error: no {SHOWN}\\nfile\n"


@pytest.mark.parametrize("error, code", [("Stopped", 0), ("UserError", 2)])
def test_the_last_words_may_find_the_terminal_gone(error, code):
    reader, writer = os.pipe()
    os.close(reader)
    raises = f"from nanoredi.common import errors\ndef main(_): raise errors.{error}('words')\nerrors.run_script(main)"
    done = subprocess.run([sys.executable, "-c", raises], stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == code


@pytest.mark.parametrize(
    "does, code",
    [
        ("print(sys.stdin.read())", 0),
        ("raise UserError('x')", 2),
        ("sys.exit(open(os.devnull).fileno())", 3),  # what libraries print at 1 and 2 does not go into such a file
    ],
)
def test_a_job_may_be_started_without_streams(does, code):
    program = f"import os, sys; from nanoredi.common.errors import *\ndef main(_): {does}\nrun_script(main)"
    done = subprocess.run(["/bin/sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, program], check=False)
    assert done.returncode == code


def test_the_pager_gets_them_escaped_too(tmp_path, monkeypatch):
    row = {"model": RED, "benchmark": "b", "problem": 0, "sample": 0, "correct": False, "correct_deepscaler": False}
    row |= {"answer": RED, "gold": [RED], "tokens": None, "finish_reason": None, "waits": 0, "response": RED}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    shown = []
    monkeypatch.setattr(report.pydoc, "pager", shown.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report.main(["--failures", str(tmp_path)])
    assert shown[0].count(SHOWN[:-2]) == 4 and not {"\x1b", "\x9b", "\u202e", "\r"} & set(shown[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_names_weights_that_are_not_finite(value, toy_data, tmp_path):
    shutil.copytree(toy_data / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "model/model.safetensors")
    data = ["--data", str(toy_data / "sft.jsonl"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight holds numbers that are not finite"):
        train_sft.main(["--model", str(tmp_path / "model"), *data])
