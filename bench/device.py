"""Everything to measure on a new device, in one command and within a given time.

    python -m bench.device --minutes 9       into runs/device: device.md and device.json
    python -m bench.device --dry             the same parts at toy size, to check that all of them run

First the device's tests, whose output goes to tests.txt, then nanoredi's loss, optimiser steps and sampling, then the
peers that are installed, each in a fresh process; with --dry and no GPU, all but the tests in this process. Every row
is written as soon as it is measured, so that nothing is lost when the device is taken away; a part that fails, times
out or needs a missing package gets a row that says so, and what it printed goes to errors.txt. A floor is the time at
the rate that the device reaches in one large matrix product, or in reading memory; a share is the floor divided by the
measured time.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import re
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
from nanoredi.model import attention  # noqa: E402
from nanoredi.model.config import Qwen2Config  # noqa: E402
from nanoredi.model.qwen2 import Qwen2  # noqa: E402
from nanoredi.trainer.dtype import compute_dtype, matrix_rate  # noqa: E402

ON_GPU = torch.cuda.is_available()
# The tests that run code for the GPU, first those that can run nowhere else.
TESTS = ["tests/device/test_gpu.py", "tests/kernels", "tests/sampler", "tests/trainer"]
# Seconds that a part may take.
TESTS_TAKE, PART_TAKES = 150, 120

# The model of a dry run.
TOY = Qwen2Config(512, 64, 128, 2, 4, 2, 1_024, tie_word_embeddings=True)
ATTENTION = {"FlashAttention-2": "torch", "FlashAttention-3": "flash-attn-3"}  # the package that each is in

# The methods of each kind, the most important ones first, and each peer's package.
OWN = {
    "kernels": ["nanoredi weighted_cross_entropy", "nanoredi linear_logprob"],
    "steps": ["nanoredi"],
    "sampling": ["nanoredi", *["nanoredi, not batch_invariant"] * ON_GPU],
}
PEERS = {
    "kernels": {
        "Liger fused linear cross-entropy": "liger-kernel",
        "cut-cross-entropy": "cut-cross-entropy",
        "torch linear_cross_entropy": "torch",
        "torch linear_cross_entropy, chunked": "torch",
    },
    "steps": {"the original's way": "transformers"},
    "sampling": {"transformers generate": "transformers", "vllm": "vllm"},
}

Part = dict[str, Any]
Row = dict[str, Any]


def sizes(dry: bool) -> dict[str, Any]:
    if dry or not ON_GPU:
        steps = {
            f"toy, {name} pairs": train_step.Size(TOY, 2, (20, 50), response, 400)
            for name, response in (("mixed", (50, 200)), ("longest", (200, 200)))
        }
        sampling = sampler.Size("toy", TOY, 4, 2, (5, 20), (5, 40), 8, 4, 2)
        return {"kernels": [(200, 32, 512, "float32")], "steps": steps, "sampling": sampling}
    # So long that transformers' `generate`, too, ends within a part's time; every row has a slot from the start.
    sampling = replace(sampler.SIZE, prompts=16, completion=(20, 2_048), batch_size=256)
    return {"kernels": kernels.SIZES, "steps": train_step.SIZES, "sampling": sampling}


def parts(dry: bool) -> list[Part]:
    """All parts, the most important ones first."""
    chosen = sizes(dry)
    names = {"kernels": chosen["kernels"], "steps": list(chosen["steps"]), "sampling": [chosen["sampling"].name]}
    found: list[Part] = [{"kind": "tests"}]
    for methods in (OWN, PEERS):
        for kind, sizes_of in names.items():
            for name in ATTENTION if (methods, kind) == (OWN, "steps") else ["FlashAttention-2"]:
                found += [
                    {"kind": kind, "size": size, "method": method, "attention": name}
                    for size in sizes_of
                    for method in methods[kind]
                ]
    return found


def measured(part: Part, folder: str, dry: bool) -> Row:
    """Measure a part in this process."""
    if part["attention"] == "FlashAttention-2":
        attention.flash_attention = lambda: "FlashAttention-2"  # by default nanoredi uses FlashAttention-3 where it can
    elif (said := attention.flash_attention()) != part["attention"]:
        raise RuntimeError(said)
    size, device = sizes(dry)[part["kind"]], kernels.DEVICE
    name = compute_dtype("auto", device)
    if part["kind"] == "sampling":
        requests = sampler.requests_of(size)
        floor = allowance(size.config, requests, name) / sum(request.max_tokens for request in requests)  # a token's
        got = sampler.measure(part["method"], size, name, folder, False)
        return {
            "seconds": got["seconds"],
            "floor": floor * got["tokens"],
            "tokens": got["tokens"],
            "bytes": got["bytes"],
        }
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
    """Exit code (None: it timed out), stdout and stderr of a command, which is ended with all its children."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints the failures so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            return None, *process.communicate(timeout=10)
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    return process.returncode, out, err


def row_of(part: Part, folder: Path, dry: bool, left: float) -> Row:
    """A row of the table: the part with its measurements, or with the reason why there are none.

    Args:
        folder: the model's weights, made if need be; the tests' output and errors.txt are written beside it.
    """
    start = time.monotonic()
    peer = PEERS.get(part["kind"], {}).get(part.get("method"))
    package, note = peer or ATTENTION.get(part.get("attention"), "torch"), None
    if not _is_installed(package):
        return {**part, "note": f"{package} is not installed"}
    if peer == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        note = "this torch has none"
    elif left <= 0:
        note = "no time was left"
    version = {"version": f"{peer} {importlib.metadata.version(peer)}"} if peer else {}
    if note:
        return {**part, **version, "note": note}
    if part["kind"] == "tests":
        found = _tested(folder.parent / "tests.txt", dry, min(left, TESTS_TAKE))
    else:
        found = _measured(part, folder, dry, min(left, PART_TAKES))
    return {**part, **version, **found, "took": round(time.monotonic() - start, 1)}


def _is_installed(package: str) -> bool:
    return any(importlib.metadata.distributions(name=package))


def _tested(output: Path, dry: bool, seconds: float) -> Row:
    tests = ["tests/device/test_world.py"] if dry else TESTS
    code, out, err = in_time([sys.executable, "-m", "pytest", "-q", "--tb=short", *tests], seconds)
    output.write_text(out + err)
    return {"note": (f"ended after {seconds:.0f} s: " if code is None else "") + _last_line(out.strip() or err)}


def _measured(part: Part, folder: Path, dry: bool, seconds: float) -> Row:
    try:
        if part["kind"] in ("steps", "sampling") and not folder.exists():
            make_model(folder, dry)
        if dry and not ON_GPU:
            return measured(part, str(folder), dry)
    except Exception as error:
        return {"note": f"{type(error).__name__}: {error}"[:160]}
    command = [sys.executable, "-m", "bench.device", "--part", json.dumps(part), "--folder", str(folder.resolve())]
    code, out, err = in_time(command + ["--dry"] * dry, seconds)
    figures = "\n".join(line for line in out.splitlines() if line.startswith('{"seconds"'))  # libraries print, too
    if code == 0 and figures:
        return json.loads(_last_line(figures))
    with open(folder.parent / "errors.txt", "a") as file:
        file.write(f"{json.dumps(part)}\n{out}{err}\n")
    if code is None:
        return {"note": f"ended after {seconds:.0f} s"}
    # CUDA's errors go on for some lines of advice.
    errors = "\n".join(line for line in err.splitlines() if re.match(r"[\w.]*(Error|Exception)\b|error: ", line))
    return {"note": (_last_line(errors) or _last_line(err) or "killed")[:160]}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def markdown(about: dict[str, str], rows: list[Row]) -> str:
    lines = [f"{', '.join(f'{name} {value}' for name, value in about.items())}.", ""]
    lines += ["| part | size | method | s | tokens/s | floor, s | share | peak GB | note |", "| --- " * 9 + "|"]
    for row in rows:
        size = row.get("size", "")
        size = size if isinstance(size, str) else "N = {:,}, D = {:,}, V = {:,}, {}".format(*size)
        cells = [row["kind"], size, row.get("method", "")]
        if row.get("attention") == "FlashAttention-3":
            cells[2] += ", FlashAttention-3"
        if "version" in row:
            cells[2] += f" ({row['version']})"
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
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    versions = {"device": device, "torch": torch.__version__, "CUDA": torch.version.cuda or "none"}
    for package in ("triton", "flash_attn_3"):
        versions[package] = importlib.metadata.version(package) if _is_installed(package) else "none"
    return {**versions, "date": datetime.date.today().isoformat()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit [9]")
    parser.add_argument("--dry", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, default=Path("runs/device"), help="folder of the tables [runs/device]")
    parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)  # for the fresh processes
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.part:
        print(json.dumps(measured(flags.part, flags.folder, flags.dry)))
        return
    end = time.monotonic() + 60 * flags.minutes
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "errors.txt").unlink(missing_ok=True)
    rows: list[Row] = []
    folder = flags.out / ("toy-model" if flags.dry else "model")
    for part in parts(flags.dry):
        rows.append(row_of(part, folder, flags.dry, end - time.monotonic()))
        write(flags.out, about(), rows)
        print(markdown({}, rows[-1:]).splitlines()[-1], flush=True)


def make_model(folder: Path, dry: bool) -> None:
    """Random weights, for all steps and the sampling."""
    chosen = sizes(dry)
    assert {size.config == chosen["sampling"].config for size in chosen["steps"].values()} == {True}
    with kernels.DEVICE:  # where random numbers are drawn fast
        model = Qwen2(chosen["sampling"].config)
    model.init_weights(0).save_pretrained(folder, compute_dtype("auto", kernels.DEVICE))
    del model
    torch.cuda.empty_cache()  # so that the measured processes can use the memory


if __name__ == "__main__":
    main(sys.argv[1:])
