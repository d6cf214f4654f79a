"""The training curves of runs: the paper's four panels as a picture, and a summary of each curve in numbers.

The panels show accuracy (where the run was evaluated), the log-prob a token of the chosen and of the rejected traces,
and the size of the parameter update, all by optimiser step. Together they tell a healthy run from a collapse, in which
both log-probs plunge while the updates grow. Four optional panels show the entropy of the model's predictions on chosen
and rejected traces, and how far their log-probs have moved since the start. Nothing is smoothed.
"""

import itertools
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoredi.common.disk import regular, writing
from nanoredi.common.errors import UserError
from nanoredi.common.files import read_text
from nanoredi.common.runs import metrics_row
from nanoredi.data.benchmarks import unique_names
from nanoredi.data.messages import SIDES
from nanoredi.evaluation.samples import read_results
from nanoredi.evaluation.scores import step_of
from nanoredi.report.tables import Table, as_text

# (key of metrics.jsonl, heading, format)
SERIES = [
    ("loss", "loss", ".4f"),
    *((f"{side}_logp", f"{side} log-prob (nats/token)", ".4f") for side in SIDES),
    ("margin", "margin (nats/token)", ".4f"),
    *((f"{side}_entropy", f"{side} entropy (nats/token)", ".4f") for side in SIDES),
    *((f"watch_{side}_logp", f"watched pairs' {side} log-prob", ".4f") for side in SIDES),
    *((f"watch_{side}_entropy", f"watched pairs' {side} entropy", ".4f") for side in SIDES),
    ("grad_norm", "gradient norm", ".2e"),
    ("update_norm", "update size (L2 norm)", ".2e"),
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("peak_memory_gb", "peak memory (GB)", ".2f"),
]
LOGPS, ENTROPIES = ("chosen_logp", "rejected_logp"), ("chosen_entropy", "rejected_entropy")
# Title, unit, and what an empty panel says, in the order of the panels; the last four are drawn with --entropy.
PANELS = [
    ("Accuracy{}", "pass@1 ± standard error (%)", "not evaluated"),
    ("Size of the parameter update", "L2 norm", "not recorded"),
    ("Log-prob of chosen traces", "nats/token (mean)", "not recorded"),
    ("Log-prob of rejected traces", "nats/token (mean)", "no rejected traces in the loss"),
    *((f"Token entropy on {side} traces", "nats/token (mean)", "not recorded") for side in SIDES),
    *((f"Change of {side} log-prob (watched pairs)", "nats/token (mean)", "not recorded") for side in SIDES),
]
# Okabe and Ito's palette, which is safe for the colour-blind, without its yellow, which is invisible on white.
# Neighbours also differ in lightness and line style, for grey prints.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^v*"
DRAWN_BY = "nanoredi.report.__main__"

Accuracy = dict[str, list[tuple[int, float, float]]]  # {benchmark: [(step, pass@1, its standard error), ...]}


@dataclass(frozen=True)
class Run:
    """The training curves of a run."""

    name: str  # the folder's name, with as much of its path as distinguishes it from the others
    rows: list[dict[str, Any]]  # the rows of metrics.jsonl
    accuracy: Accuracy

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column of metrics.jsonl; NaN where a row has none."""
        values = [row.get(key) for row in self.rows]
        return [row["step"] for row in self.rows], [math.nan if v is None else v for v in values]

    def watched(self, key: str) -> list[tuple[int, float]]:
        """(step, value) for the watched pairs at each step where they were scored; step 0 is the initial model."""
        scored = [(0, row.get(f"start_{key}")) for row in self.rows[:1]]
        scored += [(row["step"], row.get(f"watch_{key}")) for row in self.rows]
        return [(step, value) for step, value in scored if value is not None]


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in folders, all different. A run that has not logged a step yet has no rows.

    Raises:
        UserError: if a folder holds no run, or a broken file.
    """
    paths = [Path(folder).resolve() for folder in folders]
    metrics = [_metrics(path / "metrics.jsonl") for path in paths]
    return [Run(name, rows, _accuracy(path, rows)) for path, name, rows in zip(paths, unique_names(paths), metrics)]


def summary(run: Run) -> str:
    """The first, last, lowest and highest value of each of a run's curves, as text."""
    if not run.rows:
        return f"{run.name}: no steps yet"
    lines = [["", "first", "last", "lowest", "highest"]]
    for key, heading, form in SERIES:
        values = [v for v in run.series(key)[1] if math.isfinite(v)]
        if values:
            lines.append([heading, *(format(v, form) for v in (values[0], values[-1], min(values), max(values)))])
    return f"{run.name}: steps {run.rows[0]['step']:,} to {run.rows[-1]['step']:,}\n{as_text(Table(lines))}"


def check_figure(path: str) -> None:
    """Raise a UserError if no figure may be written to a path. It may replace a figure of nanoredi's, but nothing else."""
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise UserError(f"the figure is a PNG: give --out a name that ends in .png, not {path}")
    if not file.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {file.parent}")
    if file.is_dir() or regular(file).exists() and DRAWN_BY.encode() not in file.read_bytes()[:1024]:
        raise UserError(f"{path} exists and is no figure of nanoredi's: give another --out")


def draw(runs: list[Run], path: str, entropy: bool = False) -> None:
    """Draw the four panels, or with `entropy` all eight, of the runs with steps, into a PNG that check_figure allows.

    Raises:
        UserError: if there is nothing to draw, or matplotlib is missing.
    """
    runs = [run for run in runs if run.rows]
    if not runs:
        raise UserError("there is nothing to draw: no run has a line in metrics.jsonl yet")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError("drawing a figure takes matplotlib: pip install matplotlib") from None

    lines = 4 if entropy else 2
    figure = Figure(figsize=(10, 3.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, 2, sharex=True)
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.accuracy))
    markers = dict(zip(benchmarks, itertools.cycle(MARKERS)))
    handles = []
    for run, colour, style in zip(runs, itertools.cycle(COLOURS), itertools.cycle(STYLES)):
        look = {"color": colour, "linestyle": style, "linewidth": 1.1}
        handles.append(Line2D([], [], label=_literal(run.name), **look))
        _draw_run(run, panels, markers, look)
    _label(panels, f" on {_literal(benchmarks[0])}" if len(benchmarks) == 1 else "")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    # Legends are outside the panels, where they cover no line.
    width = max(len(run.name) for run in runs) + 8
    if any(run.watched(key) for run in runs for key in LOGPS):
        handles.append(Line2D([], [], color="0.3", linestyle="", marker="x", label="watched pairs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(4, 110 // width)))
    if len(benchmarks) > 1:
        shapes = [Line2D([], [], color="0.3", marker=markers[b], linestyle="", label=_literal(b)) for b in benchmarks]
        figure.legend(handles=shapes, loc="outside upper center", ncols=5)
    with writing(Path(path)) as beside:
        figure.savefig(beside, format="png", dpi=150, metadata={"Software": DRAWN_BY})


def _literal(name: str) -> str:
    """A name for matplotlib, which would read what is between two dollars as a formula."""
    return name.replace("$", r"\$")


def _draw_run(run: Run, panels: Any, markers: dict[str, str], look: dict[str, Any]) -> None:
    accuracy, update = panels[0]
    for name, points in run.accuracy.items():
        steps, shares, errors = zip(*points)
        percent = [[100 * x for x in xs] for xs in (shares, errors)]
        accuracy.errorbar(steps, *percent, marker=markers[name], markersize=5, capsize=3, **look)
    cross = {"color": look["color"], "linestyle": "", "marker": "x"}
    for axes, key in zip((update, *panels[1:3].flat), ("update_norm", *LOGPS, *ENTROPIES)):
        # Without markers a single step would be invisible.
        axes.plot(*run.series(key), marker="." if len(run.rows) < 50 else None, **look)
        if scored := run.watched(key):
            axes.plot(*zip(*scored), **cross)
    for axes, key in zip(panels[3:].flat, LOGPS):
        if (scored := run.watched(key)) and scored[0][0] == 0:
            axes.plot(*zip(*((step, value - scored[0][1]) for step, value in scored)), **look | cross)


def _label(panels: Any, where: str) -> None:
    """Set the panels' titles, units and scales, and say in the middle of those without any line why they have none."""
    for axes, (title, unit, nothing) in zip(panels.flat, PANELS):
        axes.set_title(title.format(where))
        axes.set_ylabel(unit)
        axes.grid(color="0.9")
        if not any(math.isfinite(y) for line in axes.lines for y in line.get_ydata()):
            axes.text(0.5, 0.5, nothing, transform=axes.transAxes, ha="center", va="center")
            axes.set_yticks([])
    if any(y > 0 for line in panels[0, 1].lines for y in line.get_ydata()):
        panels[0, 1].set_yscale("log", nonpositive="mask")
    for axes in panels[-1]:
        axes.set_xlabel("optimiser step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        low, high = axes.get_xlim()
        axes.set_xlim(low - (high - low < 1), high + (high - low < 1))  # ticks at whole steps


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without an incomplete last line."""
    *lines, last = read_text(path).split("\n")
    rows = [metrics_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    with suppress(UserError):
        rows.append(metrics_row(str(path), last))
    return rows


def _accuracy(folder: Path, rows: list[dict[str, Any]]) -> Accuracy:
    """The evaluations in a run's results.json, each at the step in its model's name. In results of former
    versions a second SFT is the final model of a run with the objective sft."""
    if not rows or not (folder / "results.json").exists():
        return {}
    benchmarks: dict[str, dict[int, tuple[float, float]]] = {}
    for row in read_results(folder):
        model, points = row["model"], benchmarks.setdefault(row["benchmark"], {})
        step = min(step_of(model), rows[-1]["step"])
        points[rows[-1]["step"] if step in points else step] = row["pass@1"], row["sem"] or 0.0
    return {name: [(step, *points[step]) for step in sorted(points)] for name, points in benchmarks.items()}
