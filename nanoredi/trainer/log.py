"""A run's log: metrics.jsonl, a row a step, and a line on the screen every few steps.

The metrics of a step stay on the device until a line is due; only then does the loop wait for the device.
"""

import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoredi.common.errors import UserError
from nanoredi.common.files import write_row, write_text
from nanoredi.common.runs import metrics_row
from nanoredi.config import StageConfig
from nanoredi.trainer.distributed import World

_HEADER_EVERY = 20  # lines on the screen
COLUMNS = ("chosen_logp", "rejected_logp", "chosen_entropy", "rejected_entropy")  # of watched pairs


@dataclass
class Step:
    """One optimiser step, for the log and the guards."""

    number: int  # counted from 1
    epoch: float  # passes over the data so far
    lr: float
    metrics: Tensor  # (7,), as train_step returns them, on the device
    tokens: int  # over all ranks
    flops: float  # of forward and backward, without recomputation
    rows: np.ndarray  # of the data, counted from 0
    # The watched pairs' mean log-probs and entropies a token, chosen and rejected: (2, 2) on the device. "start":
    # before the run's first step; "watch": after this step, if the watched pairs were scored then.
    watched: dict[str, Tensor]


class Log:
    """Every rank has one and adds the same steps; rank 0's writes them."""

    def __init__(self, config: StageConfig, first: int, total: int, matrix_rate: float, world: World, negatives: bool):
        """Begin after step number `first` of `total`: rows of later steps, which will be computed again, are dropped.

        Args:
            matrix_rate: FLOP/s that this rank's device reaches in a large matrix product.
            negatives: whether rows of stage 1 have weights below 0, so that there are rejected traces.
        """
        self.config, self.total, self.matrix_rate, self.world = config, total, matrix_rate, world
        self.path = Path(config.out) / "metrics.jsonl"
        self.has_rejected = negatives or config.objective != "sft" and config.alpha != 0
        self.waiting: list[Step] = []
        self.start = self.last = time.perf_counter()
        self.first, self.line, self.num_lines = first, "no step yet", 0
        world.first(lambda: drop_steps_after(self.path, first))
        self.board = _tensorboard(Path(config.out), first) if config.tensorboard and world.rank == 0 else None

    def add(self, step: Step) -> list[tuple[Step, dict[str, Any]]]:
        """Keep a step, and flush when a line is due."""
        self.waiting.append(step)
        due = step.number == self.first + 1 or step.number % self.config.log_every == 0 or step.number == self.total
        return self.flush() if due else []

    def flush(self) -> list[tuple[Step, dict[str, Any]]]:
        """Write the steps that wait, or raise a UserError on every rank. Returns them with their rows of metrics.jsonl."""
        if not self.waiting:
            return []
        values = torch.stack([step.metrics for step in self.waiting]).tolist()  # the one wait for the device
        now = time.perf_counter()
        seconds = now - self.last
        rate = sum(step.flops for step in self.waiting) / seconds / self.world.size
        # The product may have been measured at a slow moment: the device reaches at least the rate of its steps.
        self.matrix_rate = max(self.matrix_rate, rate)
        common = {
            "tokens_per_s": round(sum(step.tokens for step in self.waiting) / seconds, 1),
            "peak_memory_gb": round(peak_memory_gb(self.world.device), 3),
            "matrix_share": round(rate / self.matrix_rate, 4),
        }
        rows = [{**self._row(step, v), **common} for step, v in zip(self.waiting, values)]
        pairs, self.waiting, self.last = list(zip(self.waiting, rows)), [], now
        self.world.first(lambda: self._write(rows))
        return pairs

    def status(self) -> str:
        """The last line, and how long ago it was printed."""
        since = time.perf_counter() - self.last
        return f"{self.config.label}, {clock(since)} after this line, {len(self.waiting)} steps on:\n{self.line}"

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with open(self.path, "ab", buffering=0) as file:
            for row in rows:
                write_row(file, row)
        header, line = self._lines(rows[-1])
        self.num_lines, self.line = self.num_lines + 1, f"{header}\n{line}"
        self.world.say(self.line if self.num_lines % _HEADER_EVERY == 1 else line)
        for row in rows:
            for when, words in (("start", "before"), ("watch", "after")):
                if f"{when}_chosen_logp" in row:
                    chosen, rejected = (_show(row[f"{when}_{side}_logp"], ".4f") for side in ("chosen", "rejected"))
                    self.world.say(f"watched pairs {words} step {row['step']}: chosen {chosen}  rejected {rejected}")
            for key, value in row.items():
                if self.board and value is not None and key != "step":
                    self.board.add_scalar(key, value, row["step"])
        if rows[-1]["step"] == self.total:
            share = f"{rows[-1]['matrix_share']:.0%} of a large matrix product's rate at the end"
            self.world.say(f"{self.config.label}: at most {rows[-1]['peak_memory_gb']:.1f} GB, {share}")

    def _row(self, step: Step, values: list[float]) -> dict[str, Any]:
        chosen, rejected, grad_norm, update, loss, *entropies = _finite(values)
        both = self.has_rejected and chosen is not None and rejected is not None
        row = {
            "step": step.number,
            "epoch": round(step.epoch, 4),
            "loss": loss,
            "chosen_logp": chosen,
            "rejected_logp": rejected if self.has_rejected else None,
            "margin": chosen - rejected if both else None,
            "chosen_entropy": entropies[0],
            "rejected_entropy": entropies[1] if self.has_rejected else None,
            "grad_norm": grad_norm,
            "update_norm": update,
            "lr": step.lr,
        }
        if None in (chosen, rejected, grad_norm, update, loss):
            row["skipped"] = True
        for when, means in step.watched.items():
            row |= {f"{when}_{name}": value for name, value in zip(COLUMNS, _finite(means.flatten().tolist()))}
        return row

    def _lines(self, row: dict[str, Any]) -> tuple[str, str]:
        """The names of the columns, and a row under them, each at most 80 characters wide."""
        left = (self.last - self.start) / (row["step"] - self.first) * (self.total - row["step"])
        columns = {
            "step": f"{row['step']}/{self.total}".rjust(max(4, 2 * len(str(self.total)) + 1)),
            "loss": _show(row["loss"], "7.4f"),
            "chosen": _show(row["chosen_logp"], "7.4f"),
            **({"rejected": _show(row["rejected_logp"], "8.4f")} if self.has_rejected else {}),
            "grad": _show(row["grad_norm"], "7.1e"),
            "update": _show(row["update_norm"], "7.1e"),
            "lr": f"{row['lr']:7.1e}",
            "tok/s": f"{row['tokens_per_s']:8,.0f}",
            "left": f"{clock(left):>8}",
        }
        return " ".join(name.rjust(len(text)) for name, text in columns.items()), " ".join(columns.values())


def _finite(values: list[float]) -> list[float | None]:
    """None for each value that is not finite, which JSON cannot hold."""
    return [value if math.isfinite(value) else None for value in values]


def _show(value: float | None, form: str) -> str:
    return format(math.nan if value is None else value, form)


def drop_steps_after(path: Path, step: int) -> None:
    """Keep the rows of metrics.jsonl up to a step; the later ones will be written again."""
    if not path.exists():
        return
    kept, lines = {}, path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = metrics_row(f"{path}, line {number}", line)
        except UserError as error:
            if number < len(lines):  # a kill leaves half a row at the end, or nothing
                print(f"warning: {error}; this row is left out", flush=True)
        else:
            if row["step"] <= step:
                kept[row["step"]] = line + "\n"
    write_text(path, "".join(kept[step] for step in sorted(kept)))


def _tensorboard(out: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: by tensors on the GPU, or by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
