"""Tables from a run's files.

python -m nanoredi.report RUN ...                               the results of one or several runs
python -m nanoredi.report --lengths DATA [--out FIGURE.png]     how long rows are (lengths.py)
"""

from pathlib import Path
from typing import Any

from nanoredi import lengths
from nanoredi.errors import UserError, run_script
from nanoredi.files import read_json

# (key, heading, format); shares are shown in percent.
_COLUMNS = [
    ("model", "model", "{}"),
    ("benchmark", "benchmark", "{}"),
    ("pass@1", "pass@1 %", "{:.1%}"),
    ("sem", "SEM", "{:.1%}"),
    ("pass@n", "pass@{n} %", "{:.1%}"),
    ("mean_tokens", "mean tokens", "{:,.1f}"),
    ("no_answer", "no answer %", "{:.1%}"),
    ("cut_off", "cut off %", "{:.1%}"),
    ("chosen_logp", "logp chosen", "{:.3f}"),
    ("rejected_logp", "logp rejected", "{:.3f}"),
]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of results.json as text: shares in percent, log-probs in nats a token, columns that no row fills left
    out."""
    n = rows[0].get("n", 1)
    lines: list[list[str]] = [[], *([] for _ in rows)]
    for key, heading, form in _COLUMNS:
        key, heading = key.replace("@n", f"@{n}"), heading.format(n=n)
        if key == "pass@1" and "pass@1 %" in lines[0] or all(row.get(key) is None for row in rows):
            continue  # of one sample, pass@n is pass@1
        lines[0].append(heading)
        for line, row in zip(lines[1:], rows):
            line.append("-" if row.get(key) is None else form.format(row[key]).rstrip("%"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's results.json.

    Raises:
        UserError: when it is missing or broken.
    """
    path = Path(folder) / "results.json"
    rows = read_json(path, list)
    if not rows or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise UserError(f"{path} holds no results")
    return rows


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if any(word.split("=")[0] == "--lengths" for word in argv):
        lengths.main(argv)
        return
    for word in argv:
        if word.startswith("-"):
            raise UserError(f"there is no flag {word}; give the folders of runs")
    print(table([row for folder in argv for row in read_results(folder)]))


if __name__ == "__main__":
    run_script(main)
