"""Results as tables: for the terminal, in Markdown, beside the paper's."""

import json
import re
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_json
from nanoredi.data.benchmarks import PAPER
from nanoredi.evaluation.scores import Row, average

# pass@1 in percent, in the order of PAPER: table 1 of arXiv 2505.24850, as the authors' repository prints it
# (github.com/Tim-Siu/reinforcement-distillation). The base model's row is EMPO's, the Instruct model's Qwen's own.
PAPER_ROWS = {
    "Qwen2.5-Math-1.5B (paper)": (52.2, 10.0, 42.5, 10.7, 25.2),
    "Qwen2.5-Math-1.5B-Instruct (paper)": (75.8, 10.0, 60.0, 29.4, 38.1),
    "DeepSeek-R1-Distill-Qwen-1.5B (paper)": (83.2, 28.3, 62.1, 26.0, 43.1),
    "SFT, 5 epochs (paper)": (80.4, 21.9, 57.5, 27.5, 41.5),
    "REDI (paper)": (83.1, 28.1, 62.4, 28.8, 45.2),
}

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


def _with_average(rows: list[Row], model: str) -> list[Row]:
    own = [row for row in rows if row["model"] == model]
    return [*own, average(own)] if len(own) > 1 else own


def _cell(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value).rstrip("%")
