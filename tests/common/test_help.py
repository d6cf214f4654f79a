"""The commands' --help, in a terminal of 80 columns."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoredi.common.flags import read_flags
from nanoredi.config import EvaluateConfig


@pytest.mark.parametrize(
    "file",
    "train_sft.py train_redi.py sample.py evaluate.py nanoredi/prepare.py nanoredi/report/__main__.py".split(),
)
def test_examples_in_help_fit_the_terminal(file):
    source = (Path(__file__).parent.parent.parent / file).read_text()
    examples = [line for line in ast.get_docstring(ast.parse(source)).splitlines() if line.startswith("    ")]
    assert max(map(len, examples)) <= 80


def test_help_fits_the_terminal_and_shows_no_empty_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="nanoredi.report.__main__"))
    text = "In a word.\n\n" + "word " * 30 + "\n\n    python x.py  # an example"
    with pytest.raises(SystemExit):
        read_flags(text, ["--help"], "evaluate", EvaluateConfig)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "\n    python x.py  # an example\n" in shown
    assert (
        " []" not in shown
        and "[[" not in shown
        and "[math500 aime24 " in " ".join(shown.split())
        and "[true|false]\n" in shown
    )
    assert shown.startswith("usage: python -m nanoredi.report [FLAGS]\n")
