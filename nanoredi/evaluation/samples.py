"""The samples of an evaluation on disk: added to as they end, and found again by a second start.

    samples.jsonl       a row a sample, in the order in which they ended, by whichever rank
    evaluation.json     what they depend on: settings, and digests of the models and benchmarks

A start that was killed leaves at most half a line, which the next one cuts off.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_json, read_rows, write_row
from nanoredi.config import EvaluateConfig
from nanoredi.data.benchmarks import Benchmark
from nanoredi.evaluation.scores import Row

_PARTS = ("*.json", "*.jinja", "*.safetensors")  # of a model's folder that a sample depends on


class Samples:
    """The samples in a folder."""

    def __init__(self, folder: Path):
        self.path = folder / "samples.jsonl"
        self.about = folder / "evaluation.json"

    def claim(self, models: dict[str, str | Path], benchmarks: list[Benchmark], config: EvaluateConfig) -> None:
        """Take the folder for samples of these models on these benchmarks, or go on with them. Call on one rank.

        Args:
            models: {name in the table: Hugging Face folder}.

        Raises:
            UserError: when the folder's samples depend on anything else.
        """
        settings = {f.name: getattr(config, f.name) for f in fields(EvaluateConfig) if not f.metadata["free"]}
        about = {
            "setting": {name: value for name, value in settings.items() if name not in ("benchmarks", "data", "limit")},
            "model": {name: _digest_of_files(Path(folder)) for name, folder in models.items()},
            "benchmark": {b.name: _digest(json.dumps([b.questions, b.golds]).encode()) for b in benchmarks},
        }
        if self.about.exists():
            before = read_json(self.about)
            # An evaluation that was begun before there was a setting has that one's default.
            defaults = {f.name: f.default for f in fields(EvaluateConfig) if f.name in about["setting"]}
            before["setting"] = {**defaults, **before.get("setting", {})}
            for kind, values in about.items():
                _refuse_others(self.path, kind, before.get(kind, {}), values)
        elif self.path.exists():
            raise UserError(
                f"{self.path} is there, and no {self.about.name} that says of what: move it away, or give another --out"
            )
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.about.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self._cut_torn_line()

    def append(self, row: Row) -> None:
        """Add a sample, as one whole line; several ranks may do so at once, on several machines, too."""
        with open(self.path, "ab", buffering=0) as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
            write_row(file, row)

    def rows(self) -> Iterator[Row]:
        """All samples, without their responses."""
        if self.path.exists():
            for _, row in read_rows(str(self.path)):
                row.pop("response")
                yield row

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - (1 << 16))
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            file.truncate(end)


def _refuse_others(path: Path, kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in {**before, **now}:
        if name not in before or name not in now:
            was, is_now = ("is", "is not") if name in before else ("is not", "is")
            raise UserError(
                f"{path} holds another evaluation: the {kind} {name} {was} part of it and {is_now} asked for; "
                "give another --out"
            )
        if before[name] != now[name]:
            difference = (
                f"is {before[name]!r} there and {now[name]!r} here" if kind == "setting" else "has changed since"
            )
            raise UserError(f"{path} holds another evaluation: the {kind} {name} {difference}; give another --out")


def _digest_of_files(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in _PARTS for path in folder.glob(pattern)):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
