"""Show the training curves and results of runs, what went wrong in them, and how long the rows of data are.

    python -m nanoredi.report RUN ...            # curves in numbers, results
    python -m nanoredi.report RUN ... --out FIGURE.png     # and as a figure
    python -m nanoredi.report --failures RUN           # the incorrect samples
    python -m nanoredi.report --lengths DATA

RUN is the folder of a training run or an evaluation, DATA one that prepare wrote, or a JSONL file.
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

    runs: list[str] = option([], "folders of runs; the flag's name may be left out")
    paper: bool = option(False, "add the rows of the paper's tables 1 to 4")
    wide: bool = option(False, "show all columns of the table, however wide")
    out: str = option("", "PNG file for the figure")
    entropy: bool = option(False, "with --out: also draw token entropy, and how the log-probs changed since the start")
    failures: str = option("", "folder of a run: show its samples that are not correct")
    only: str = option("", "with --failures: show one kind only", choices=KINDS)
    lengths: str = option("", "show how long rows are: of a folder that prepare wrote, or of a JSONL file")
    tokenizer: str = option("", "with --lengths: Hugging Face folder, to tokenise rows that do not say their lengths")
    max_prompt_tokens: int = option(800, "with --lengths: longest prompt of a pair", low=1)
    max_response_tokens: int = option(19_000, "with --lengths: longest response of a pair", low=1)


_FLAGS_OF = {"lengths": ("tokenizer", "max_prompt_tokens", "max_response_tokens"), "failures": ("only",)}


def main(argv: list[str]) -> None:
    _, given = read_flags(__doc__, argv or ["--help"], "report", ReportFlags, positional="runs")
    flags = resolve(ReportFlags, "report", given)
    kind = next((name for name in _FLAGS_OF if getattr(flags, name)), "runs")
    for name in given.get("report", {}):
        of = next((other for other, names in _FLAGS_OF.items() if name in (other, *names)), "runs")
        if of != kind == "runs":
            raise UserError(f"--{name} goes with --{of}")
        if of != kind:
            more = flags.runs[0] if name == "runs" else f"--{name}"
            raise UserError(f"--{kind} takes one folder and makes a report of its own: leave out {more}")
    if flags.lengths:
        print(lengths.show(flags.lengths, flags.tokenizer, flags.max_prompt_tokens, flags.max_response_tokens))
    elif flags.failures:
        text = "\n\n".join(failures(flags.failures, flags.only))
        if sys.stdout.isatty():
            pydoc.pager(visible(text))
        else:
            print(text)
    elif not flags.runs:
        raise UserError("there is nothing to report on: give the folders of runs")
    else:
        _show_runs(flags)


def _show_runs(flags: ReportFlags) -> None:
    if flags.out:
        check_figure(flags.out)
    elif flags.entropy:
        raise UserError("--entropy says what is drawn: give --out FIGURE.png, too")
    files = "metrics.jsonl", "results.json"
    trained, evaluated = ([folder for folder in flags.runs if Path(folder, file).exists()] for file in files)
    for folder in flags.runs:
        if folder not in trained + evaluated:
            raise UserError(f"{folder} holds no run: there is neither metrics.jsonl nor results.json in it")
    runs = read_runs(trained)
    for run in runs:
        print(summary(run), end="\n\n")
    rows, compared = [], []
    for folder in evaluated:
        whose = f"{folder}: " if len(evaluated) > 1 else ""
        rows += [{**row, "model": whose + row["model"]} for row in read_results(folder)]
        if (file := Path(folder) / "differences.json").exists():
            pairs = check(str(file), read_json(file, list), [DIFFERENCE])
            compared += [{**row, "first": whose + row["first"], "second": whose + row["second"]} for row in pairs]
    if rows:
        print(show(tables(rows, compared, flags.paper), flags.wide))
    elif flags.paper:
        raise UserError("--paper needs results to compare: give the folder of a run that was evaluated")
    if flags.out:
        draw(runs, flags.out, flags.entropy)
        print(f"drawn in {flags.out}")


if __name__ == "__main__":
    run_script(main)
