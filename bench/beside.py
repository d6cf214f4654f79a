"""How fast training is on a shared machine, beside another busy process.

    python bench/beside.py                       one process alone, then beside another; each uses every core
    python bench/beside.py --rounds 1 --steps 1                       shorter

OpenMP's threads spin for a while before they sleep when they wait for each other. On an idle machine that saves the
time of waking up; beside another process the spinning takes time from the very thread that they wait for. nanoredi lets
them sleep sooner (nanoredi/__init__.py) unless the environment says otherwise. The steps are those of
bench/train_step.py, with its model and the CPU's best dtype; the other process runs the same steps. Ideally a process
alone loses no speed by that, and one beside another keeps half of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from train_step import SIZES, Qwen2, compute_dtype, torch  # noqa: E402

HERE = Path(__file__).parent
WAITS = {
    "nanoredi": {"GOMP_SPINCOUNT": "4000"},  # as nanoredi/__init__.py sets it
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},  # libgomp's
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    flags = parser.parse_args()
    name, size = next(iter(SIZES.items()))
    dtype = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    print(f"{torch.get_num_threads()} threads; {name}, one pair a step, {dtype}\n")
    print("| wait | s a step alone | relative to default | s a step beside an equal process | speed kept |")
    print("| --- " * 5 + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        Qwen2(size.config).init_weights(0).save_pretrained(Path(folder), torch.float32)
        words = [sys.executable, str(HERE / "train_step.py"), "--one", "nanoredi", name, dtype, folder, "--pairs", "1"]
        alone: dict[str, list[float]] = {wait: [] for wait in WAITS}
        beside: dict[str, list[float]] = {wait: [] for wait in WAITS}
        for _ in range(flags.rounds):
            for wait in WAITS:
                alone[wait] += seconds(words, WAITS[wait], flags.steps)
                other = start(words, WAITS[wait], 10**6)
                time.sleep(10)  # until its steps have begun
                beside[wait] += seconds(words, WAITS[wait], flags.steps)
                other.kill()
                other.wait()
    own = statistics.median(alone["OpenMP's default"])
    for wait in WAITS:
        a, b = statistics.median(alone[wait]), statistics.median(beside[wait])
        print(f"| {wait} | {a:.3g} | {a / own:.3f} | {b:.3g} | {a / b:.0%} |", flush=True)


def start(words: list[str], wait: dict[str, str], steps: int) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | wait
    return subprocess.Popen([*words, "--steps", str(steps)], stdout=subprocess.PIPE, env=environment)


def seconds(words: list[str], wait: dict[str, str], steps: int) -> list[float]:
    """Seconds of each step of a fresh process."""
    out = start(words, wait, steps).communicate()[0]
    return json.loads(out.splitlines()[-1])["seconds"]


if __name__ == "__main__":
    main()
