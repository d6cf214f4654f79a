"""The samples of an evaluation on disk, so that an interrupted evaluation can be resumed.

    samples.jsonl       one row a sample, in the order in which the ranks finish them
    evaluation.json     what the samples depend on: settings, and digests of the models and benchmarks

A killed job leaves at most one partial line; the next job drops it, like any other damaged row. Only one job at a time
can use the folder.
"""

import fcntl
import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from itertools import compress
from pathlib import Path
from typing import Any

from nanoredi.common.disk import digest, lock, writing
from nanoredi.common.errors import UserError
from nanoredi.common.files import check, parse_json, read_json, read_rows, write_json, write_row
from nanoredi.config import EvaluateConfig
from nanoredi.data.benchmarks import Benchmark
from nanoredi.evaluation.scores import Row
from nanoredi.trainer.dtype import settled_dtype

# The files of a model's folder that a sample depends on. Others may come and go: samples may be written there, too.
_MODEL_FILES = ("*config.json", "*token*.json", "vocab.json", "*.index.json", "*.jinja", "*.safetensors")
_KEY = ("model", "benchmark", "problem", "sample")
_COUNT = range(2**31)
SAMPLE = {
    **dict.fromkeys(("model", "benchmark", "response"), str),
    **dict.fromkeys(("problem", "sample", "waits"), _COUNT),
    **dict.fromkeys(("correct", "correct_deepscaler"), bool),
    **dict.fromkeys(("answer", "finish_reason"), (str, None)),
    "gold": [str],
    "tokens": (_COUNT, None),
}
_RESULT = {"model": str, "benchmark": str, "pass@1": float, "sem": (float, None)}
# A row of differences.json:
DIFFERENCE = dict.fromkeys(("benchmark", "first", "second"), str) | dict.fromkeys(("difference", "low", "high"), float)
_DEFAULTS = {f.name: f.default for f in fields(EvaluateConfig)}


class Samples:
    """The samples in a folder."""

    def __init__(self, folder: Path):
        self.path = folder / "samples.jsonl"
        self.about = folder / "evaluation.json"

    def claim(
        self, models: Mapping[str, str | Path], benchmarks: list[Benchmark], config: EvaluateConfig, adds: bool = False
    ) -> str:
        """Claim the folder for samples of these models on these benchmarks, new or resumed, as claim does for a file.
        Returns their dtype. Call on one rank.

        Args:
            models: {name in the table: Hugging Face folder}.
            adds: whether the folder may also hold samples of other models, which are kept.
        """
        settings = {f.name: getattr(config, f.name) for f in fields(EvaluateConfig) if not f.metadata["free"]}
        about = {
            "setting": {name: value for name, value in settings.items() if name not in ("benchmarks", "data", "limit")},
            "model": {name: digest_of_files(Path(folder)) for name, folder in models.items()},
            "benchmark": {b.name: digest(json.dumps([b.questions, b.golds]).encode()) for b in benchmarks},
        }
        lock(self.path.parent)
        results = self.path.with_name("results.json")  # of samples that may have been deleted to save space
        dtype = claim(self.path, self.about, about, "model" if adds else "", results)
        if self.path.exists():
            problems = {b.name: range(len(b.questions)) for b in benchmarks}
            self._drop_damaged_rows(about["model"], problems, range(config.n))
        return dtype

    def append(self, row: Row) -> None:
        """Add a sample, as one whole line. Several ranks, also on several machines, may do so at once."""
        with open(self.path, "ab", buffering=0) as file:
            with suppress(OSError):  # a disk without locks: lock() has warned
                fcntl.lockf(file, fcntl.LOCK_EX)  # released when the file is closed
            write_row(file, row)

    def rows(self) -> Iterator[Row]:
        """All samples, without their responses."""
        if self.path.exists():
            for _, row in read_rows(str(self.path)):
                row.pop("response")
                yield row

    def _drop_damaged_rows(self, models: Container[str], problems: dict[str, range], numbers: range) -> None:
        """Keep only undamaged rows of this evaluation, each sample once. The others are made again."""
        seen: set[tuple] = set()
        kept: list[bool] = []
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{self.path}, line {number}"
                try:
                    row = check(where, parse_json(where, line.decode(errors="replace")), SAMPLE)
                    model, benchmark, problem, sample = key = tuple(row[name] for name in _KEY)
                    is_wanted = model in models and problem in problems.get(benchmark, ()) and sample in numbers
                    if key in seen or not is_wanted:
                        which = "a second" if key in seen else "no"
                        raise UserError(f"{where} holds {which} sample of this evaluation")
                    seen.add(key)
                    kept.append(True)
                except UserError as error:
                    kept.append(False)
                    if line.endswith(b"\n"):  # without it: the partial line of a killed job
                        print(f"warning: {error}; it is dropped, and missing samples are made again", flush=True)
        if not all(kept):
            with writing(self.path) as beside, open(beside, "wb") as file, open(self.path, "rb") as lines:
                file.writelines(compress(lines, kept))


def claim(path: Path, about_path: Path, about: dict[str, dict[str, Any]], adds: str = "", *others: Path) -> str:
    """Claim a file for samples, new or resumed.

    Args:
        about: {kind: {name: value}}: what the samples depend on, kept in about_path. Its setting dtype, if "auto", is
            replaced by the existing samples' dtype, or else by the best one for this device.
        adds: a kind that may gain new names; about and about_path then have the former ones, too.
        others: further files that depend on the same.

    Returns:
        The dtype.

    Raises:
        UserError: if existing samples depend on anything else, or about_path is another program's.
    """
    setting, before = about["setting"], None
    has_samples, *has_others = (file.exists() and file.stat().st_size > 0 for file in (path, *others))
    # A full disk, or a kill before the first sample, leaves both empty.
    if about_path.exists() and (has_samples or about_path.stat().st_size):
        before = check(str(about_path), read_json(about_path), dict.fromkeys(about, dict))
    elif has_samples:
        raise UserError(f"{path} lacks the {about_path.name} that describes it: move it away, or give another --out")
    if before is None or not (has_samples or any(has_others)):  # nothing is there that could depend on something else
        setting["dtype"] = settled_dtype(setting["dtype"])
        write_json(about_path, about)
        return setting["dtype"]
    # A setting that did not exist yet has its default.
    before["setting"] = {name: _DEFAULTS[name] for name in setting if name in _DEFAULTS} | before["setting"]
    setting["dtype"] = settled_dtype(setting["dtype"], before["setting"]["dtype"])
    if before["setting"]["dtype"] == "auto":
        before["setting"]["dtype"] = setting["dtype"]
    for kind, values in about.items():
        then = before[kind]
        if kind == adds:
            then, about[kind] = {**values, **then}, {**then, **values}
        _refuse_others(path, kind, then, about[kind])
    if adds and about != before:
        write_json(about_path, about)
    return setting["dtype"]


def read_results(folder: str | Path) -> list[Row]:
    """The rows of a run's results.json. Raises a UserError if it is missing or broken."""
    path = Path(folder) / "results.json"
    rows = check(str(path), read_json(path, list), [_RESULT])
    if not rows:
        raise UserError(f"{path} holds no results")
    check(str(path), [{**row, "model": None, "benchmark": None} for row in rows], [{str: (float, bool, None)}])
    return rows


def kept_results(folder: Path, num_samples: int = 0) -> list[Row]:
    """The rows of results.json for models with at least this many samples; none if the file is missing or broken."""
    counts = Counter(row["model"] for row in Samples(folder).rows()) if num_samples else Counter()
    try:
        return [row for row in read_results(folder) if counts[row["model"]] >= num_samples]
    except UserError:  # missing, or cut short by a full disk
        return []


def _refuse_others(path: Path, kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in {**before, **now}:
        if name not in before or name not in now:
            how = f"is {'not ' * (name in now)}part of it and is {'not ' * (name in before)}asked for"
        elif before[name] != now[name]:
            since = "has changed since" + ", or --limit" * (kind == "benchmark")
            how = f"is {before[name]!r} there and {now[name]!r} here" if kind == "setting" else since
        else:
            continue
        raise UserError(f"{path} holds other samples: the {kind} {name} {how}; give another --out")


def digest_of_files(folder: Path) -> str:
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    return digest(*(part for path in paths for part in (path.name.encode(), path)))
