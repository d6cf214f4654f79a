"""Training problems that share words with a benchmark's: eight in a row, lower-cased and split at white space, which is
how the original, and Open-R1 before it, looked for contamination.

Formulas and stock phrases overlap by chance too, so what overlaps is listed first, and dropped only on demand. A
benchmark problem of fewer than eight words overlaps with a problem of the very same words.
"""

import json
from pathlib import Path
from typing import Any

from nanoredi.data.benchmarks import read_problems
from nanoredi.data.filters import Traces

_SIZE = 8


class Overlap:
    """Benchmark problems by their words, and the training rows that have overlapped with them.

    Args:
        files: of rows with `problem` or `question`, in any of the formats.
        drop: whether training rows that overlap are to be dropped.

    Attributes:
        rows: a dict for each training row and benchmark problem that overlap; `share` is the part of the benchmark
            problem's words in a row that the training row has, `words` the first of these.

    Raises:
        UserError: naming the file, and the line or problem, that cannot be read.
    """

    def __init__(self, files: list[str], drop: bool = False):
        self.files = files
        self.drop = drop
        self.rows: list[dict[str, Any]] = []
        self._problems: list[tuple[str, str, int]] = []  # (file, where it stands, number of its n-grams)
        self._having: dict[str, list[int]] = {}  # {n-gram: numbers of the problems that have it}
        for file in files:
            for where, row in read_problems(Path(file)):
                grams = _grams(row["problem"])
                for gram in grams:
                    self._having.setdefault(gram, []).append(len(self._problems))
                self._problems.append((file, where, len(grams)))

    def check(self, traces: Traces, in_pairs: bool) -> bool:
        """Whether a problem of stage 1, and where in_pairs says so of stage 2, overlaps; if so it is kept in rows."""
        shared: dict[int, list[str]] = {}
        for gram in _grams(traces.problem):
            for number in self._having.get(gram, ()):
                shared.setdefault(number, []).append(gram)
        for number, grams in shared.items():
            file, where, total = self._problems[number]
            self.rows.append(
                {
                    "original_index": traces.index,
                    "source": traces.source,
                    "problem": traces.problem,
                    "in_pairs": in_pairs,
                    "benchmark": file,
                    "benchmark_problem": where,
                    "share": round(len(grams) / total, 3),
                    "words": grams[0],
                }
            )
        return bool(shared)

    def write(self, path: Path) -> None:
        """The rows as JSONL, those that share most first."""
        rows = sorted(self.rows, key=lambda row: -row["share"])
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def table(self) -> str:
        """How many rows overlap with each file and with any, to be read."""
        heading = f"rows that share {_SIZE} words in a row with"
        width = max(map(len, (heading, *self.files)))
        lines = [f"{heading:{width}}  {'SFT':>9}  {'pairs':>9}"]
        for name, files in (*((file, (file,)) for file in self.files), ("any of them", self.files)):
            rows = {row["original_index"]: row["in_pairs"] for row in self.rows if row["benchmark"] in files}
            lines.append(f"{name:{width}}  {len(rows):>9,}  {sum(rows.values()):>9,}")
        return "\n".join([*lines, "These were dropped." if self.drop else "They were kept; --drop leaves them out."])


def _grams(text: str) -> list[str]:
    """A text's n-grams, each once; a text of fewer words is one by itself."""
    words = text.lower().split()
    return list(dict.fromkeys(" ".join(words[i : i + _SIZE]) for i in range(max(1, len(words) - _SIZE + 1))))
