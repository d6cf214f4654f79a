"""Finding training problems that share eight consecutive words with a benchmark problem, lower-cased and split at white
space. The original, and Open-R1 before it, look for contamination in this way.

Formulas and stock phrases also overlap by chance, so overlaps are listed, and dropped only on demand. A benchmark
problem of fewer than eight words overlaps with a problem of exactly the same words.
"""

import json
from pathlib import Path
from typing import Any

from nanoredi.data.benchmarks import read_problems
from nanoredi.data.filters import Traces

_SIZE = 8


class Overlap:
    """Benchmark problems by their n-grams, and the training rows that have been found to overlap with them.

    Args:
        files: files of rows with `problem` or `question`, in any of the formats.
        drop: whether the caller drops training rows that overlap; for the table.

    Attributes:
        rows: a dict for each training row and benchmark problem that overlap; `share` is the fraction of the benchmark
            problem's n-grams that the training row has, `words` the first of them.

    Raises:
        UserError: naming the file and the line that cannot be read.
    """

    def __init__(self, files: list[str], drop: bool = False):
        self.files, self.drop = files, drop
        self.rows: list[dict[str, Any]] = []
        self._problems: list[tuple[str, str, int]] = []  # (file, file and line, number of its n-grams)
        self._having: dict[str, list[int]] = {}  # {n-gram: indices of the problems that have it}
        for file in files:
            for where, row in read_problems(Path(file)):
                grams = _grams(row["problem"])
                for gram in grams:
                    self._having.setdefault(gram, []).append(len(self._problems))
                self._problems.append((file, where, len(grams)))

    def check(self, traces: Traces, in_pairs: bool) -> bool:
        """Whether a training problem overlaps; adds the overlaps to rows. in_pairs: it is in stage 2's data, too."""
        shared: dict[int, list[str]] = {}
        for gram in _grams(traces.problem):
            for number in self._having.get(gram, ()):
                shared.setdefault(number, []).append(gram)
        for number, grams in shared.items():
            file, where, total = self._problems[number]
            row = {
                "original_index": traces.index,
                "source": traces.source,
                "problem": traces.problem,
                "in_pairs": in_pairs,
                "benchmark": file,
                "benchmark_problem": where,
                "share": round(len(grams) / total, 3),
                "words": grams[0],
            }
            self.rows.append(row)
        return bool(shared)

    def write(self, path: Path) -> None:
        """Write the rows as JSONL, those with the largest share first."""
        rows = sorted(self.rows, key=lambda row: -row["share"])
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def table(self) -> str:
        """The number of rows that overlap with each file and with any, as a table to print."""
        heading = f"rows that share {_SIZE} words in a row with"
        width = max(map(len, (heading, *self.files)))
        lines = [f"{heading:{width}}  {'SFT':>9}  {'pairs':>9}"]
        for name, files in (*((file, (file,)) for file in self.files), ("any of them", self.files)):
            rows = {row["original_index"]: row["in_pairs"] for row in self.rows if row["benchmark"] in files}
            lines.append(f"{name:{width}}  {len(rows):>9,}  {sum(rows.values()):>9,}")
        return "\n".join([*lines, "They were dropped." if self.drop else "They were kept; --drop leaves them out."])


def _grams(text: str) -> list[str]:
    """A text's distinct n-grams, in order; a text of fewer words is a single one."""
    words = text.lower().split()
    return list(dict.fromkeys(" ".join(words[i : i + _SIZE]) for i in range(max(1, len(words) - _SIZE + 1))))
