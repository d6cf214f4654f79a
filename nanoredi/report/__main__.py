"""What runs have come to, and what was in their way.

python -m nanoredi.report RUN ... [--paper] [--wide]         the course of one or several runs, and their results; --paper: the
                                                            paper's rows beside; --wide: all columns
python -m nanoredi.report RUN ... --out FIGURE.png          and the four panels of figures.py, --entropy: all eight
python -m nanoredi.report --failures RUN [--only KIND]      each sample that is not right; KIND: wrong, cut_off, no_answer
python -m nanoredi.report --lengths DATA                    how long rows are (lengths.py)
"""

import pydoc
import sys
from dataclasses import dataclass
from pathlib import Path

from nanoredi.common.errors import UserError, run_script, visible
from nanoredi.common.files import check, read_json
from nanoredi.common.flags import option, read_flags, resolve
from nanoredi.evaluation.samples import DIFFERENCE, read_results
from nanoredi.report import lengths
from nanoredi.report.failures import KINDS, failures
from nanoredi.report.figures import check_figure, draw, read_runs, summary
from nanoredi.report.tables import show, tables


@dataclass
class ReportFlags:
    """The command's flags."""

    runs: list[str] = option([], "folders of runs; words that follow no flag are these")
    paper: bool = option(False, "show the rows of the paper's tables 1 to 4 beside")
    wide: bool = option(False, "show all columns of the table, however wide")
    out: str = option("", "PNG file for the figure")
    entropy: bool = option(False, "with --out: draw token entropy, and the log-probs' change since the start, too")
    failures: str = option("", "folder of a run whose samples that are not right are shown")
    only: str = option("", "with --failures: one kind of them", choices=KINDS)
    lengths: str = option("", "rows whose lengths are shown: a folder that prepare wrote, or a JSONL file")
    tokenizer: str = option("", "with --lengths: Hugging Face folder to measure rows that do not hold their lengths")
    max_prompt_tokens: int = option(800, "with --lengths: longest prompt of a pair", low=1)
    max_response_tokens: int = option(19_000, "with --lengths: longest response of a pair", low=1)


def main(argv: list[str]) -> None:
    _, given = read_flags(__doc__, argv or ["--help"], "report", ReportFlags, positional="runs")
    flags = resolve(ReportFlags, "report", given)
    for other in ("lengths", "failures"):
        if getattr(flags, other) and (flags.runs or flags.out):
            more = flags.runs[0] if flags.runs else "--out"
            raise UserError(f"--{other} takes one folder and makes a report of its own: leave out {more}")
    if flags.lengths:
        print(lengths.show(flags.lengths, flags.tokenizer, flags.max_prompt_tokens, flags.max_response_tokens))
    elif flags.failures:
        _show_failures(flags)
    elif flags.only:
        raise UserError("--only goes with --failures RUN")
    elif not flags.runs:
        raise UserError("there is nothing to report on: give the folders of runs")
    else:
        _show_runs(flags)


def _show_runs(flags: ReportFlags) -> None:
    if flags.out:
        check_figure(flags.out)
    elif flags.entropy:
        raise UserError("--entropy says what is drawn: give --out FIGURE.png, too")
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
        rows = []
        for folder in evaluated:
            whose = f"{folder}: " if len(evaluated) > 1 else ""
            rows += [{**row, "model": f"{whose}{row['model']}"} for row in read_results(folder)]
        files = [Path(folder) / "differences.json" for folder in evaluated]
        compared = [
            row for file in files if file.exists() for row in check(str(file), read_json(file, list), [DIFFERENCE])
        ]
        print(show(tables(rows, compared, flags.paper), flags.wide))
    elif flags.paper:
        raise UserError("--paper needs results to stand beside: give the folder of a run that was evaluated")
    if flags.out:
        draw(runs, flags.out, flags.entropy)
        print(f"drawn in {flags.out}")


def _show_failures(flags: ReportFlags) -> None:
    text = "\n\n".join(failures(flags.failures, flags.only))
    if sys.stdout.isatty():
        pydoc.pager(visible(text))
    else:
        print(text)


if __name__ == "__main__":
    run_script(main)
