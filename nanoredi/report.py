"""Tables from a run's files, and the samples that failed.

python -m nanoredi.report RUN ... [--paper]                the results of one or several runs; the paper's rows beside
python -m nanoredi.report --failures RUN [--only KIND]     each sample that is not right: its answer, the gold one, the
                                                           response's tail; KIND: wrong, cut_off, no_answer
"""

import json
import pydoc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoredi.benchmarks import PAPER
from nanoredi.errors import UserError, nearest, run_script
from nanoredi.files import read_json, read_rows
from nanoredi.scores import Row, average

# pass@1 in percent, in the order of PAPER: table 1 of arXiv 2505.24850, as the authors' repository prints it
# (github.com/Tim-Siu/reinforcement-distillation). The base model's row is EMPO's, the Instruct model's Qwen's own.
PAPER_ROWS = {
    "Qwen2.5-Math-1.5B (paper)": (52.2, 10.0, 42.5, 10.7, 25.2),
    "Qwen2.5-Math-1.5B-Instruct (paper)": (75.8, 10.0, 60.0, 29.4, 38.1),
    "DeepSeek-R1-Distill-Qwen-1.5B (paper)": (83.2, 28.3, 62.1, 26.0, 43.1),
    "SFT, 5 epochs (paper)": (80.4, 21.9, 57.5, 27.5, 41.5),
    "REDI (paper)": (83.1, 28.1, 62.4, 28.8, 45.2),
}
KINDS = ("wrong", "cut_off", "no_answer")
_TAIL = 600  # characters of a response that --failures shows

# (key, heading, format); shares are shown in percent. pass@k stands for those that the rows have.
_COLUMNS = [
    ("model", "model", "{}"),
    ("benchmark", "benchmark", "{}"),
    ("pass@1", "pass@1 %", "{:.1%}"),
    ("sem", "SEM", "{:.1%}"),
    ("pass@k", "pass@k %", "{:.1%}"),
    ("pass@1_deepscaler", "DeepScaleR's %", "{:.1%}"),
    ("mean_tokens", "mean tokens", "{:,.1f}"),
    ("no_answer", "no answer %", "{:.1%}"),
    ("cut_off", "cut off %", "{:.1%}"),
    ("waits_per_response", "Wait/response", "{:.2f}"),
    ("waits_per_1000_tokens", "Wait/1000 tokens", "{:.2f}"),
    ("chosen_logp", "logp chosen", "{:.3f}"),
    ("rejected_logp", "logp rejected", "{:.3f}"),
]

Lines = list[list[str]]  # of a table's cells, the headings first


def table(rows: list[Row]) -> str:
    """Rows of results.json as text (details has the columns)."""
    return as_text(details(rows))


def details(rows: list[Row]) -> Lines:
    """A line a model and benchmark: shares in percent, log-probs in nats a token, columns that no row fills left out;
    an average under a model's several benchmarks."""
    rows = [line for model in dict.fromkeys(row["model"] for row in rows) for line in _with_average(rows, model)]
    ks = sorted({int(key[5:]) for row in rows for key in row if re.fullmatch("pass@[0-9]+", key)} - {1})
    columns = []
    for key, heading, form in _COLUMNS:
        keys = [f"pass@{k}" for k in ks] if key == "pass@k" else [key]
        columns += [(key, heading.replace("pass@k", key), form) for key in keys]
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    return [
        [heading for _, heading, _ in columns],
        *([_cell(form, row.get(key)) for key, _, form in columns] for row in rows),
    ]


def scores(rows: list[Row], paper: bool = False) -> Lines:
    """A line a model: pass@1 with its standard error on each benchmark, in percent, and their average; the paper's rows
    below on request, and - for a benchmark that is not the paper's."""
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    models = dict.fromkeys(row["model"] for row in rows)
    lines = [["pass@1 %", *names, *(["average"] if len(names) > 1 else [])]]
    for model in models:
        own = {row["benchmark"]: row for row in _with_average(rows, model)}
        complete = all(name in own for name in names)
        cells = [f"{own[n]['pass@1']:.1%} ± {own[n]['sem']:.1%}" if n in own else "-" for n in lines[0][1:]]
        lines.append([model, *(cell.replace("%", "") for cell in (cells if complete else [*cells[: len(names)], "-"]))])
    for model, figures in PAPER_ROWS.items() if paper else ():
        known = [dict(zip(PAPER, figures)).get(name) for name in names]
        mean = [None if None in known else sum(known) / len(known)] if len(names) > 1 else []
        lines.append([model, *(_cell("{:.1f}", value) for value in [*known, *mean])])
    return lines


def differences(compared: list[Row]) -> Lines:
    """A line a benchmark: by how many points the second model's pass@1 is above the first's, with its interval."""
    heading = f"{compared[0]['second']} less {compared[0]['first']}"
    return [
        [heading, "points", "95 % interval"],
        *(
            [
                row["benchmark"],
                f"{100 * row['difference']:+.1f}",
                f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            ]
            for row in compared
        ),
    ]


def as_text(lines: Lines, left: int = 2) -> str:
    """Columns in step, the first so many to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def as_markdown(lines: Lines, left: int = 2) -> str:
    """The same as a Markdown table."""
    rule = ["---" if i < left else "---:" for i in range(len(lines[0]))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [lines[0], rule, *lines[1:]]
    )


def tables(rows: list[Row], compared: list[Row], paper: bool) -> list[tuple[Lines, int]]:
    """All there is to show of results: the details; scores where there are several benchmarks, or the paper's rows to
    show; differences of two models. With each, how many of its columns stand to the left."""
    shown = [(details(rows), 2)]
    if paper or len({row["benchmark"] for row in rows}) > 1:
        shown.append((scores(rows, paper), 1))
    if compared:
        shown.append((differences(compared), 1))
    return shown


def write(out: Path, rows: list[Row], compared: list[Row], paper: bool) -> str:
    """Write results.json (differences.json for two models), results.txt and results.md; the text."""
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if compared:
        (out / "differences.json").write_text(json.dumps(compared, indent=2) + "\n", encoding="utf-8")
    shown = tables(rows, compared, paper)
    text = "\n\n".join(as_text(*one) for one in shown)
    (out / "results.txt").write_text(text + "\n", encoding="utf-8")
    (out / "results.md").write_text("\n\n".join(as_markdown(*one) for one in shown) + "\n", encoding="utf-8")
    return text


def read_results(folder: str | Path) -> list[Row]:
    """The rows of a run's results.json.

    Raises:
        UserError: when it is missing or broken.
    """
    path = Path(folder) / "results.json"
    rows = read_json(path, list)
    if not rows or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise UserError(f"{path} holds no results")
    return rows


def failures(folder: str, only: str = "") -> Iterator[str]:
    """Each sample of a run that is not right, as a paragraph; first their number.

    Args:
        folder: of a run of evaluate.py or of train_redi.py, with samples.jsonl.
        only: one of KINDS: wrong (an answer that is not the gold one), cut_off (by length), no_answer (neither).

    Raises:
        UserError: when the file is missing or broken.
    """
    path = Path(folder) / "samples.jsonl"
    counts, shown = dict.fromkeys(("right", *KINDS), 0), []
    for where, row in read_rows(str(path)):
        try:
            kind = "right" if row["correct"] else _kind(row)
            counts[kind] += 1
            if kind == only or not only and kind != "right":
                shown.append(_paragraph(kind, row))
        except (KeyError, TypeError):
            raise UserError(f"{where} is no sample that was graded") from None
    yield f"{folder}: " + ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items())
    yield from shown


def _kind(row: Row) -> str:
    if row["finish_reason"] == "length":
        return "cut_off"
    return "no_answer" if row["answer"] is None else "wrong"


def _paragraph(kind: str, row: Row) -> str:
    head = f"--- {row['model']}, {row['benchmark']}, problem {row['problem'] + 1}, sample {row['sample']}: "
    tokens = "" if row["tokens"] is None else f" after {row['tokens']:,} tokens"
    answer = "none" if row["answer"] is None else row["answer"]
    tail = row["response"][-_TAIL:].strip()
    cut = "..." if len(row["response"]) > _TAIL else ""
    text = (
        f"{head}{kind.replace('_', ' ')}{tokens}\nanswer  {answer}\ngold    {' or '.join(row['gold'])}\n\n{cut}{tail}"
    )
    # A response is anybody's text: no escape sequence of it reaches the terminal.
    return re.sub(r"[^\n\t -~\u00a0-\ud7ff\ue000-\U0010ffff]", "\ufffd", text)


def _with_average(rows: list[Row], model: str) -> list[Row]:
    own = [row for row in rows if row["model"] == model]
    return [*own, average(own)] if len(own) > 1 else own


def _cell(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value).rstrip("%")


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    flags = ("--paper", "--failures", "--only")
    for word in argv:
        if word.startswith("-") and word not in flags:
            raise UserError(f"there is no flag {word}{nearest(word, flags)}; give the folders of runs")
    if "--failures" in argv:
        _show_failures([word for word in argv if word != "--failures"])
        return
    if "--only" in argv:
        raise UserError("--only goes with --failures RUN")
    folders = [word for word in argv if word != "--paper"]
    if not folders:
        raise UserError("--paper needs a run to stand beside: give its folder")
    rows = [row for folder in folders for row in read_results(folder)]
    files = [Path(folder) / "differences.json" for folder in folders]
    compared = [row for file in files if file.exists() for row in read_json(file, list)]
    print("\n\n".join(as_text(*one) for one in tables(rows, compared, "--paper" in argv)))


def _show_failures(words: list[str]) -> None:
    only = ""
    if "--only" in words:
        at = words.index("--only")
        only, words = "".join(words[at + 1 : at + 2]), words[:at] + words[at + 2 :]
        if only not in KINDS:
            raise UserError(f"--only takes {', '.join(KINDS)}, not {only!r}{nearest(only, KINDS)}")
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError("--failures takes one run's folder")
    text = "\n\n".join(failures(words[0], only))
    if sys.stdout.isatty():
        pydoc.pager(text)
    else:
        print(text)


if __name__ == "__main__":
    run_script(main)
