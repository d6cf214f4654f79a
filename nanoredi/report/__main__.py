"""What runs have come to, and what was in their way.

python -m nanoredi.report RUN ... [--paper]                 the course of one or several runs, and their results; --paper: the
                                                            paper's rows beside
python -m nanoredi.report RUN ... --out FIGURE.png          and the four panels of figures.py, drawn anew each time
python -m nanoredi.report --failures RUN [--only KIND]      each sample that is not right; KIND: wrong, cut_off, no_answer
python -m nanoredi.report --lengths DATA [--out FIGURE.png]  how long rows are (lengths.py)
"""

import pydoc
import sys
from pathlib import Path

from nanoredi.common.errors import UserError, nearest, run_script
from nanoredi.common.files import read_json
from nanoredi.evaluation.scores import Row
from nanoredi.report import lengths
from nanoredi.report.failures import KINDS, failures
from nanoredi.report.figures import check_figure, draw, read_runs, summary
from nanoredi.report.tables import as_text, read_results, tables


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if any(word.split("=")[0] == "--lengths" for word in argv):
        return lengths.main(argv)
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    figure, only = _take(words, "--out"), _take(words, "--only")
    flags = {flag: flag in words for flag in ("--paper", "--failures")}
    folders = [word for word in words if word not in flags]
    for word in folders:
        if word.startswith("-"):
            raise UserError(f"there is no flag {word}{nearest(word, [*flags, '--out', '--only'])}; --help lists them")
    if flags["--failures"]:
        return _show_failures(folders, only)
    if only:
        raise UserError("--only goes with --failures RUN")
    if not folders:
        raise UserError("there is nothing to report on: give the folders of runs")
    _show_runs(folders, figure, flags["--paper"])


def _take(words: list[str], flag: str) -> str:
    """A flag's value, taken out of the words; empty without it."""
    if flag not in words:
        return ""
    at = words.index(flag)
    if at + 1 == len(words):
        raise UserError(f"{flag} needs a value")
    del words[at]
    return words.pop(at)


def _show_runs(folders: list[str], figure: str, paper: bool) -> None:
    if figure:
        check_figure(figure)
    trained, evaluated = (
        [f for f in folders if (Path(f) / name).exists()] for name in ("metrics.jsonl", "results.json")
    )
    for folder in folders:
        if folder not in trained + evaluated:
            raise UserError(f"{folder} holds no run: there is neither metrics.jsonl nor results.json in it")
    runs = read_runs(trained)
    for run in runs:
        print(summary(run), end="\n\n")
    if evaluated:
        rows = [row for folder in evaluated for row in _named(read_results(folder), folder, len(evaluated) > 1)]
        files = [Path(folder) / "differences.json" for folder in evaluated]
        compared = [row for file in files if file.exists() for row in read_json(file, list)]
        print("\n\n".join(as_text(*one) for one in tables(rows, compared, paper)))
    elif paper:
        raise UserError("--paper needs results to stand beside: give the folder of a run that was evaluated")
    if figure:
        draw(runs, figure)
        print(f"drawn in {figure}")


def _named(rows: list[Row], folder: str, several: bool) -> list[Row]:
    """With several runs, a model's name tells whose it is."""
    return [{**row, "model": f"{folder}: {row['model']}"} if several else row for row in rows]


def _show_failures(folders: list[str], only: str) -> None:
    if only and only not in KINDS:
        raise UserError(f"--only takes {', '.join(KINDS)}, not {only!r}{nearest(only, KINDS)}")
    if len(folders) != 1:
        raise UserError("--failures takes one run's folder")
    text = "\n\n".join(failures(folders[0], only))
    if sys.stdout.isatty():
        pydoc.pager(text)
    else:
        print(text)


if __name__ == "__main__":
    run_script(main)
