"""Results as tables, for a terminal of 80 columns and in Markdown, optionally with the paper's rows."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoredi.common.errors import visible
from nanoredi.common.files import write_json, write_text
from nanoredi.data.benchmarks import PAPER
from nanoredi.evaluation.scores import Row, average

# The results of arXiv 2505.24850 in percent: (model, recipe for the row, results in the order of PAPER, in table 2 also
# their mean). In table 1 the base model's row was measured by EMPO's authors, the Instruct one's by Qwen's.
_BASE = "qwen2.5-math-1.5b"
_PAPER = {
    "pass@1": {
        "table 1": [
            ("Qwen2.5-Math-1.5B", "", "52.2 10.0 42.5 10.7 25.2"),
            ("Qwen2.5-Math-1.5B-Instruct", "", "75.8 10.0 60.0 29.4 38.1"),
            ("DeepSeek-R1-Distill-Qwen-1.5B", "", "83.2 28.3 62.1 26.0 43.1"),
            ("SFT, 5 epochs", _BASE, "80.4 21.9 57.5 27.5 41.5"),
            ("REDI", _BASE, "83.1 28.1 62.4 28.8 45.2"),
        ],
        "table 2, from SFT of 3 epochs": [
            ("SFT, 3 epochs", f"{_BASE}-3-epochs", "76.7±0.3 18.1±1.1 52.8±0.6 24.6±0.5 37.5±0.3 41.9±0.3"),
            ("DPO 0.001, 2e-7", f"{_BASE}-dpo", "81.3±0.2 24.6±1.7 58.5±0.6 28.7±0.4 43.1±0.3 47.2±0.4"),
            ("SimPO 2, 1, 5e-7", f"{_BASE}-simpo", "81.1±0.3 24.8±1.9 58.8±0.6 29.1±0.2 42.2±0.3 47.2±0.4"),
            ("symmetric, 2e-7", f"{_BASE}-symmetric", "81.7±0.2 25.8±1.3 59.5±1.1 29.3±0.4 42.1±0.2 47.7±0.4"),
            ("REDI 0.8, 1e-6", f"{_BASE}-3-epochs", "81.7±0.2 27.3±1.4 58.8±0.8 30.4±0.5 43.4±0.3 48.3±0.3"),
        ],
    },
    "pass@16": {
        "table 3, from SFT of 3 epochs": [
            ("SFT, 3 epochs", f"{_BASE}-3-epochs", "94.6 53.3 86.7 57.7 63.1"),
            ("DPO 0.001, 2e-7", f"{_BASE}-dpo", "94.6 63.3 86.7 58.8 64.7"),
            ("SimPO 2, 1, 5e-7", f"{_BASE}-simpo", "94.8 60.0 89.2 58.5 63.3"),
            ("symmetric, 2e-7", f"{_BASE}-symmetric", "95.0 63.3 90.4 58.8 62.5"),
            ("REDI 0.8, 1e-6", f"{_BASE}-3-epochs", "95.0 66.7 81.9 59.9 63.9"),
        ],
        "table 4": [
            ("DeepSeek-R1-Distill-Qwen-1.5B", "", "95.6 63.3 92.8 56.6 65.8"),
            ("SFT, 5 epochs", _BASE, "95.6 56.7 86.7 56.3 64.3"),
            ("REDI, from 5 epochs", _BASE, "95.0 66.7 90.4 57.0 65.8"),
        ],
    },
}

# (key, heading, format), the most compared ones first; shares are shown in percent. pass@K stands for the largest k in
# the rows, pass@k for the others.
_COLUMNS = [
    ("model", "model", "{}"),
    ("benchmark", "benchmark", "{}"),
    ("pass@1", "pass@1 %", "{:.1%}"),
    ("sem", "SEM", "{:.1%}"),
    ("pass@K", "pass@k %", "{:.1%}"),
    ("mean_tokens", "tokens", "{:,.1f}"),
    ("cut_off", "cut off %", "{:.1%}"),
    ("chosen_logp", "chosen", "{:.3f}"),
    ("rejected_logp", "rejected", "{:.3f}"),
    ("no_answer", "no answer %", "{:.1%}"),
    ("pass@k", "pass@k %", "{:.1%}"),
    ("pass@1_deepscaler", "DeepScaleR's %", "{:.1%}"),
    ("waits_per_response", "Wait/response", "{:.2f}"),
    ("waits_per_1000_tokens", "Wait/1000 tokens", "{:.2f}"),
]
_LEAST = 7  # how many columns are always shown
_WIDTH = 80  # of a terminal

Lines = list[list[str]]  # a table's cells, the headings first; a line of one cell spans all columns


@dataclass
class Table:
    """A table, before it is laid out for a terminal or for Markdown."""

    lines: Lines
    left: int = 1  # how many columns are left-aligned
    least: int = 0  # columns shown at least, 0 for all: the first column moves above its lines before there are fewer

    def __post_init__(self):
        """Make each cell one visible line: a name from a file may hold line breaks and control characters."""
        self.lines = [[visible(" ".join(cell.split())) for cell in line] for line in self.lines]


def details(rows: list[Row]) -> Table:
    """A line for each model and benchmark, and an average if a model has several: shares in percent, log-probs in nats
    a token. Columns without any value are left out."""
    rows = [line for model in dict.fromkeys(row["model"] for row in rows) for line in _with_average(rows, model)]
    ks = sorted({int(key[5:]) for row in rows for key in row if re.fullmatch("pass@[0-9]+", key)} - {1})
    keys_of = {"pass@K": [f"pass@{k}" for k in ks[-1:]], "pass@k": [f"pass@{k}" for k in ks[:-1]]}
    columns = []
    for kind, heading, form in _COLUMNS:
        for key in keys_of.get(kind, [kind]):
            if any(row.get(key) is not None for row in rows):
                columns.append((key, heading.replace("pass@k", key), form))
    lines = [[_name(row), *(_cell(form, row.get(key)) for key, _, form in columns[1:])] for row in rows]
    return Table([[heading for _, heading, _ in columns], *lines], 2, _LEAST)


def scores(rows: list[Row], metric: str = "pass@1", paper: bool = False) -> Table:
    """A line for each model: a metric in percent on each benchmark (pass@1 with its standard error), and the mean. With
    `paper`, the paper's rows below, each with its recipe, and "-" for a benchmark that the paper does not have."""
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    columns = [*names, "average"] if len(names) > 1 else names
    lines = [[f"{metric} %", *("mean" if name == "average" else name.removesuffix("_bench") for name in columns)]]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["benchmark"]: row for row in _with_average(rows, model)}
        if not all(name in own for name in names):
            own.pop("average", None)
        lines.append([_name(next(iter(own.values()))), *(_with_error(own.get(name, {}), metric) for name in columns)])
    for title, known in _PAPER[metric].items() if paper else ():
        lines.append([f"the paper's {title} (*: {_BASE})"])
        for model, recipe, figures in known:
            of = dict(zip([*PAPER, "average"], figures.split()))
            if set(names) != set(PAPER) or "average" not in of:
                values = [float(of[name].split("±")[0]) for name in names if name in of]
                of["average"] = f"{sum(values) / len(values):.1f}" if len(values) == len(names) else "-"
            label = f"{model} ({recipe.replace(_BASE, '*')})" if recipe else model
            lines.append([label, *(of.get(name, "-").replace("±", " ± ") for name in columns)])
    return Table(lines)


def differences(compared: list[Row]) -> Table:
    """A line for each benchmark: by how many points the second model's pass@1 exceeds the first's, with an interval."""
    lines, models = [["pass@1", "points", "95 % interval"]], None
    for row in compared:
        if models != (row["second"], row["first"]):
            models = row["second"], row["first"]
            lines.append([" minus ".join(models)])
        points, low, high = (f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high"))
        lines.append([row["benchmark"], points, f"{low} to {high}"])
    return Table(lines)


def as_text(table: Table, width: int = 0) -> str:
    """Aligned columns in at most `width` characters; 0: as wide as they are."""
    lines, left = table.lines, table.left
    shown = len(lines[0])
    ways = [(lines, k) for k in range(shown, min(table.least or shown, shown) - 1, -1)]
    ways += [(_stacked(lines), k) for k in range(shown, 1, -1)]
    lines, k = next((way for way in ways if not width or sum(_widths(*way)) + 2 * (way[1] - 1) <= width), ways[-1])
    widths = _widths(lines, k)
    text = [
        _short(line[0], width)
        if len(line) == 1
        else "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    more = [f"{shown - k} more columns: python -m nanoredi.report RUN --wide"] if k < shown else []
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], *more])


def _widths(lines: Lines, k: int) -> list[int]:
    """The widths of the first k columns."""
    return [max(map(len, column)) for column in zip(*(line[:k] for line in lines if len(line) > 1))]


def _stacked(lines: Lines) -> Lines:
    """The table with the first column's cells on lines of their own, above the lines that they belong to."""
    stacked, above = lines[:1], None
    for first, *rest in lines[1:]:
        stacked = [*stacked, *([[first]] if first != above else []), *([["", *rest]] if rest else [])]
        above = first
    return stacked


def _short(text: str, width: int) -> str:
    return f"{text[: width // 2 - 2]}...{text[len(text) - width // 2 + 1 :]}" if 0 < width < len(text) else text


def as_markdown(table: Table) -> str:
    """The same as a Markdown table."""
    columns = len(table.lines[0])
    rule = ["---" if i < table.left else "---:" for i in range(columns)]
    lines = [line + [""] * (columns - len(line)) for line in [table.lines[0], rule, *table.lines[1:]]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def tables(rows: list[Row], compared: list[Row], paper: bool) -> list[Table]:
    """All tables of some results: details, scores if there are several benchmarks or `paper` is set, and differences
    of two models."""
    shown = [details(rows)]
    if paper or len({row["benchmark"] for row in rows}) > 1:
        shown.append(scores(rows, paper=paper))
    if paper:
        shown.append(scores(rows, "pass@16", paper))
    return [*shown, differences(compared)] if compared else shown


def show(shown: list[Table], wide: bool = False) -> str:
    """Tables as text for a terminal."""
    return "\n\n".join(as_text(one, 0 if wide else _WIDTH) for one in shown)


def write(out: Path, rows: list[Row], compared: list[Row], paper: bool, wide: bool = False) -> str:
    """Write results.json, differences.json for two models, results.txt, and results.md with all columns. Returns the
    text of results.txt."""
    write_json(out / "results.json", rows)
    if compared:
        write_json(out / "differences.json", compared)
    shown = tables(rows, compared, paper)
    text = show(shown, wide)
    write_text(out / "results.txt", text + "\n")
    write_text(out / "results.md", "\n\n".join(map(as_markdown, shown)) + "\n")
    return text


def _with_average(rows: list[Row], model: str) -> list[Row]:
    own = [row for row in rows if row["model"] == model]
    return [*own, average(own)] if len({row["benchmark"] for row in own}) > 1 else own


def _name(row: Row) -> str:
    return f"{row['model']} (best)" if row.get("best") else row["model"]


def _cell(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value).rstrip("%")


def _with_error(row: Row, metric: str) -> str:
    has_error = metric == "pass@1" and row.get("sem") is not None
    return _cell("{:.1%}", row.get(metric)) + (f" ± {100 * row['sem']:.1f}" if has_error else "")
