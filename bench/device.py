"""All that is to be measured on a new device, in one command and a given time.

    python -m bench.device --minutes 9       into runs/device: device.md and device.json
    python -m bench.device --dry             the same parts at toy size, to see that all of it runs

First the device's tests, then nanoredi's loss, optimiser steps and sampling, then the peers that are installed, each in a
fresh process. Every row is written the moment it is there, so that a device that is taken away leaves what was measured
by then; a part that fails or runs out of time is a row that says so. Floors are what the same device reaches in one large
matrix product, or in reading memory; a share is the floor's time over the measured one.
"""

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from allowance import allowance  # noqa: E402

from bench import kernels, sampler, train_step  # noqa: E402
from nanoredi.model.config import Qwen2Config  # noqa: E402
from nanoredi.model.qwen2 import Qwen2  # noqa: E402
from nanoredi.trainer.distributed import compute_dtype, matrix_rate  # noqa: E402

TESTS = ["tests/device", "tests/kernels", "tests/model", "tests/sampler"]
# The longest that a part may take, in seconds.
TESTS_TAKE, PART_TAKES = 150, 120

# What a part of each kind is measured on.
TOY = Qwen2Config(512, 64, 128, 2, 4, 2, 1_024, tie_word_embeddings=True)
ATTENTION = {"FlashAttention 2": "", "FlashAttention 3": "FA3"}

Part = dict[str, Any]
Row = dict[str, Any]


def sizes(dry: bool) -> dict[str, Any]:
    if dry or not torch.cuda.is_available():
        steps = {"toy pairs": train_step.Size(TOY, 2, (20, 50), (50, 200), 400)}
        sampling = sampler.Size("toy", TOY, 4, 2, (5, 20), (5, 40), 8, 4, 2)
        return {"kernels": [(200, 32, 512, "float32")], "steps": steps, "sampling": sampling}
    return {"kernels": kernels.SIZES, "steps": train_step.SIZES, "sampling": replace(sampler.SIZE, prompts=16)}


def parts(dry: bool) -> list[Part]:
    """In the order of what matters most."""
    own, peers = [], []

    def add(kind: str, size: Any, method: str, attention: str = "FlashAttention 2") -> None:
        part = {"kind": kind, "size": size, "method": method, "attention": attention}
        (own if "nanoredi" in method else peers).append(part)

    chosen = sizes(dry)
    for size in chosen["kernels"]:
        for method in kernels.METHODS:
            add("kernels", size, method)
    for name in chosen["steps"]:
        for method in train_step.METHODS:
            for attention in ATTENTION if method == "nanoredi" else ["FlashAttention 2"]:
                add("steps", name, method, attention)
    for method in sampler.METHODS:
        add("sampling", chosen["sampling"].name, method)
    if dry:  # a peer of each kind
        peers = list({part["kind"]: part for part in peers[::-1]}.values())
    return [{"kind": "tests"}, *own, *peers]


def measured(part: Part, folder: str, dry: bool) -> Row:
    """A part's figures, in this process."""
    if ATTENTION[part["attention"]]:
        torch.nn.attention.activate_flash_attention_impl(ATTENTION[part["attention"]])
    size, device = sizes(dry)[part["kind"]], kernels.DEVICE
    name = compute_dtype("auto", device)
    if part["kind"] == "sampling":
        floor = allowance(size.config, sampler.requests_of(size), name)
        got = sampler.measure(part["method"], size, name, folder, False)
        return {"seconds": got["seconds"], "floor": floor, "tokens": got["tokens"], "bytes": got["bytes"]}
    if part["kind"] == "steps":
        size, rate = size[part["size"]], matrix_rate(name, device)
        got = train_step.measure(part["method"], size, name, folder, 1 if dry else 3, False)
        tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in train_step.draw_pairs(size))
        seconds = statistics.median(got["seconds"])
        return {"seconds": seconds, "floor": train_step.flops(size) / rate, "tokens": tokens, "bytes": got["bytes"]}
    n, d, v, dtype = size = tuple(part["size"])
    rate = matrix_rate(getattr(torch, dtype), device)
    got = kernels.measure(part["method"], size, 2 if dry else 10, False)
    seconds = statistics.median(got["seconds"])
    return {"seconds": seconds, "floor": 6 * n * d * v / rate, "tokens": n, "bytes": got["bytes"]}


def in_time(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None: it took too long), stdout and stderr of a command, which is ended with all that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, "", ""
    return process.returncode, out, err


def row_of(part: Part, folder: str, dry: bool, left: float) -> Row:
    """The part with its figures, or with the reason why there are none."""
    if left <= 0:
        return {**part, "note": "no time was left"}
    start = time.monotonic()
    if part["kind"] == "tests":
        tests = ["tests/device/test_world.py"] if dry else TESTS
        command, limit = [sys.executable, "-m", "pytest", "-q", *tests], min(left, TESTS_TAKE)
    else:
        command = [sys.executable, "-m", "bench.device", "--part", json.dumps(part), "--folder", folder]
        command, limit = command + ["--dry"] * dry, min(left, PART_TAKES)
    code, out, err = in_time(command, limit)
    took = round(time.monotonic() - start, 1)
    if code is None:
        return {**part, "note": f"ended after {limit:.0f} s", "took": took}
    last = ([line for line in out.splitlines() if line.strip()] or [""])[-1]
    if part["kind"] == "tests":
        return {**part, "note": last, "took": took}
    if code:
        said = [line for line in err.splitlines() if line.strip()] or ["killed"]
        return {**part, "note": said[-1].strip()[:160], "took": took}
    return {**part, **json.loads(last), "took": took}


def markdown(about: dict[str, str], rows: list[Row]) -> str:
    lines = [f"{', '.join(f'{name} {value}' for name, value in about.items())}.", ""]
    lines += ["| part | size | method | s | tokens/s | floor, s | share | peak GB | note |", "| --- " * 9 + "|"]
    for row in rows:
        size = row.get("size", "")
        size = size if isinstance(size, str) else "N = {:,}, D = {:,}, V = {:,}, {}".format(*size)
        cells = [row["kind"], size, row.get("method", "")]
        if row.get("attention") == "FlashAttention 3":
            cells[2] += ", FlashAttention 3"
        if "seconds" in row:
            rate = row["tokens"] / row["seconds"]
            cells += [f"{row['seconds']:.4g}", f"{rate:,.0f}", f"{row['floor']:.4g}"]
            cells += [f"{row['floor'] / row['seconds']:.0%}", f"{row['bytes'] / 1e9:.2f}"]
        else:
            cells += [""] * 5
        lines.append(f"| {' | '.join([*cells, row.get('note', '').replace('|', '/')])} |")
    return "\n".join(lines) + "\n"


def write(out: Path, about: dict[str, str], rows: list[Row]) -> None:
    for name, text in (("json", json.dumps({**about, "rows": rows}, indent=1) + "\n"), ("md", markdown(about, rows))):
        beside = out / f"device.{name}.writing"
        beside.write_text(text)
        beside.rename(out / f"device.{name}")


def about() -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = {"device": device, "torch": torch.__version__, "CUDA": torch.version.cuda or "none"}
    return {**versions, "date": datetime.date.today().isoformat()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take [9]")
    parser.add_argument("--dry", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, default=Path("runs/device"), help="folder of the tables [runs/device]")
    parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)  # what the fresh processes are told
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part:
        print(json.dumps(measured(flags.part, flags.folder, flags.dry)))
        return
    end = time.monotonic() + 60 * flags.minutes
    flags.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    folder = flags.out / ("toy-model" if flags.dry else "model")
    for part in parts(flags.dry):
        if part["kind"] in ("steps", "sampling") and not folder.exists():
            make_model(folder, flags.dry)
        rows.append(row_of(part, str(folder.resolve()), flags.dry, end - time.monotonic()))
        write(flags.out, about(), rows)
        print(markdown({}, rows[-1:]).splitlines()[-1], flush=True)


def make_model(folder: Path, dry: bool) -> None:
    """Random weights, which all steps and the sampling share."""
    chosen = sizes(dry)
    assert {size.config == chosen["sampling"].config for size in chosen["steps"].values()} == {True}
    model = Qwen2(chosen["sampling"].config).init_weights(0)
    model.save_pretrained(folder, compute_dtype("auto", kernels.DEVICE))


if __name__ == "__main__":
    main()
