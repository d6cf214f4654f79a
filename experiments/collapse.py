"""Does the collapse watch trip in time, and only in a collapse? On the toy, over several seeds.

    python experiments/collapse.py                       10 seeds; stage 1 of each takes a minute or more
    python experiments/collapse.py --seeds 42            one seed

For each seed stage 1 is trained once, and stage 2 from it twice: with alpha 1.0 at a high learning rate, which
collapses, and with alpha 0.8 at the toy's own rate. The table has pass@1 in %, 4 samples a problem, of five models:
stage 1's, the one that the watch names as the last good one when it trips, the last one saved before it trips, the one
saved 10 steps later, and the final one.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nanoredi.config import RediConfig  # noqa: E402
from nanoredi.trainer.guards import CollapseWatch  # noqa: E402

ARMS = (("1.0", "1e-3"), ("0.8", "5e-4"))


def run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def tripped(out: Path) -> tuple[int | None, int]:
    """The step at which the watch trips on a run's metrics, and the last good step that it names then."""
    watch = CollapseWatch(RediConfig().collapse_nats)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if watch.observe(row["step"], row["chosen_logp"], row["update_norm"]):
            break
    return watch.tripped, watch.last_good


def accuracies(folder: Path, seed_folder: Path, models: list[Path]) -> list[float]:
    """pass@1 of models, in %."""
    if not (folder / "results.json").exists():
        flags = ["--recipe", "toy", "--benchmarks", seed_folder / "data" / "toy.jsonl", "--n", "4", "--out", folder]
        run(ROOT / "evaluate.py", *flags, "--model", *models)
    rows = json.loads((folder / "results.json").read_text())
    return [100 * row["pass@1"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", default=[str(s) for s in (42, *range(1, 10))], help="[42 1 2 ... 9]")
    parser.add_argument("--out", default="runs/collapse", help="folder of the runs [runs/collapse]")
    flags = parser.parse_args()
    print(
        "| seed | alpha, lr | tripped at | stage 1 | named as good | before it tripped | 10 steps later | at the end |"
    )
    print("| --- " * 8 + "|")
    for seed in flags.seeds:
        sft = Path(flags.out).absolute() / f"sft-{seed}"
        run(ROOT / "train_sft.py", "--seed", seed, "--out", sft)
        for alpha, lr in ARMS:
            out = sft.with_name(f"alpha-{alpha}-lr-{lr}-{seed}")
            words = ["--recipe", "toy", "--model", sft / "final", "--data", sft / "data" / "pairs.jsonl", "--out", out]
            words += ["--alpha", alpha, "--lr", lr, "--seed", seed, "--evaluate", "false"]
            if not (out / "final").exists():
                run(ROOT / "train_redi.py", *words, "--save_every", "2", "--log_every", "1")
            trip, good = tripped(out)
            steps = []
            if trip:
                before = (trip - 1) // 2 * 2
                steps = [out / f"step-{step:06d}" for step in (good // 2 * 2, before, before + 10)]
            name = out.with_name(f"{out.name}-trip-{trip}")
            start, *between, end = (f"{a:.0f}" for a in accuracies(name, sft, [sft / "final", *steps, out / "final"]))
            cells = [str(trip or "never"), start, *(between or [""] * 3), end]
            print(f"| {seed} | {alpha}, {lr} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
