"""What runs have come to, and what was in their way.

python -m nanoredi.report RUN ... [--paper] [--wide]         the course of one or several runs, and their results; --paper: the
                                                            paper's rows beside; --wide: all columns
python -m nanoredi.report RUN ... --out FIGURE.png          and the four panels of figures.py, drawn anew each time
python -m nanoredi.report --failures RUN [--only KIND]      each sample that is not right; KIND: wrong, cut_off, no_answer
python -m nanoredi.report --lengths DATA [--out FIGURE.png]  how long rows are (lengths.py)
"""

import pydoc
import sys
from dataclasses import dataclass
from pathlib import Path

from nanoredi.common.errors import UserError, run_script, visible
from nanoredi.common.flags import option, read_flags, resolve
from nanoredi.evaluation.scores import Row
from nanoredi.report import lengths
from nanoredi.report.failures import KINDS, failures
from nanoredi.report.figures import check_figure, draw, read_runs, summary
from nanoredi.report.tables import read_differences, read_results, show, tables


@dataclass
class ReportFlags:
    """The command's flags."""

    runs: list[str] = option([], "folders of runs; words that follow no flag are these")
    paper: bool = option(False, "show the rows of the paper's tables 1 to 4 beside")
    wide: bool = option(False, "show all columns of the table, however wide")
    out: str = option("", "PNG file for the figure")
    failures: str = option("", "folder of a run whose samples that are not right are shown")
    only: str = option("", "with --failures: one kind of them", choices=KINDS)


def main(argv: list[str]) -> None:
    if any(word.split("=")[0] == "--lengths" for word in argv):
        return lengths.main(argv)
    _, given = read_flags(__doc__, _with_runs(argv) or ["--help"], "report", ReportFlags, takes_recipe=False)
    flags = resolve(ReportFlags, "report", given)
    if flags.failures:
        return _show_failures(flags)
    if flags.only:
        raise UserError("--only goes with --failures RUN")
    if not flags.runs:
        raise UserError("there is nothing to report on: give the folders of runs")
    _show_runs(flags)


def _with_runs(argv: list[str]) -> list[str]:
    """The words with a flag before the folders, which stand without one."""
    runs, flags, takes_value = [], [], False
    for word in argv:
        is_flag = word.startswith("-")
        (flags if is_flag or takes_value else runs).append(word)
        takes_value = is_flag and "=" not in word and word not in ("--paper", "--wide")
    return [*(["--runs", *runs] if runs else []), *flags]


def _show_runs(flags: ReportFlags) -> None:
    if flags.out:
        check_figure(flags.out)
    trained, evaluated = (
        [f for f in flags.runs if (Path(f) / name).exists()] for name in ("metrics.jsonl", "results.json")
    )
    for folder in flags.runs:
        if folder not in trained + evaluated:
            raise UserError(f"{folder} holds no run: there is neither metrics.jsonl nor results.json in it")
    runs = read_runs(trained)
    for run in runs:
        print(summary(run), end="\n\n")
    if evaluated:
        rows = [row for folder in evaluated for row in _named(read_results(folder), folder, len(evaluated) > 1)]
        files = [Path(folder) / "differences.json" for folder in evaluated]
        compared = [row for file in files if file.exists() for row in read_differences(file)]
        print(show(tables(rows, compared, flags.paper), flags.wide))
    elif flags.paper:
        raise UserError("--paper needs results to stand beside: give the folder of a run that was evaluated")
    if flags.out:
        draw(runs, flags.out)
        print(f"drawn in {flags.out}")


def _named(rows: list[Row], folder: str, several: bool) -> list[Row]:
    """With several runs, a model's name tells whose it is."""
    return [{**row, "model": f"{folder}: {row['model']}"} if several else row for row in rows]


def _show_failures(flags: ReportFlags) -> None:
    if flags.runs:
        raise UserError(f"--failures takes one run's folder, and {flags.runs[0]} is another")
    text = "\n\n".join(failures(flags.failures, flags.only))
    if sys.stdout.isatty():
        pydoc.pager(visible(text))
    else:
        print(text)


if __name__ == "__main__":
    run_script(main)
