"""A test of the paper's findings on the toy: REDI and its rivals, each at its best learning rate.

    python experiments/findings.py               everything, in a quarter of an hour on 2 cores; finished runs are kept
    python experiments/findings.py --page        only the page and its figure, from the finished runs

Stage 1 is trained once for each seed. On a tuning seed every method is trained at every rate of one grid, and the rate
with the highest pass@1 is chosen. At these rates, and three of them also at their second-best rate, the methods are
trained on the other seeds, and evaluated during the run and at its end. docs/findings.md and docs/findings.png are
written from these runs.
"""

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.findings_page import HIGH, Arm, ranked, run_name, write_page  # noqa: E402
from nanoredi import toy  # noqa: E402
from nanoredi.common.errors import Stopped, UserError  # noqa: E402
from nanoredi.common.files import write_json  # noqa: E402
from nanoredi.common.flags import read_recipe, resolve  # noqa: E402
from nanoredi.common.runs import open_run  # noqa: E402
from nanoredi.config import EvaluateConfig, RediConfig, SftConfig, ToyConfig  # noqa: E402
from nanoredi.data import benchmarks  # noqa: E402
from nanoredi.evaluation.evaluate import evaluate  # noqa: E402
from nanoredi.trainer.distributed import World, world  # noqa: E402
from nanoredi.trainer.loop import train  # noqa: E402

TUNING_SEED, SEEDS = 0, (1, 2, 3)
RATES = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3)
METHODS = {
    "SFT continued": {"objective": "sft"},
    "DPO": {"objective": "dpo", "beta": 0.1},
    "SimPO": {"objective": "simpo", "beta": 2.0, "gamma": 1.0},
    "REDI 0.2": {"alpha": 0.2},
    "REDI 0.5": {"alpha": 0.5},
    "REDI 0.8": {"alpha": 0.8},
    "symmetric REDI": {"alpha": 1.0},
}
CONTESTED = ("REDI 0.8", "DPO", "SimPO")  # also trained at their second-best rate, since one seed is a rough choice
ALONG, N_ALONG, N_END = 22, 4, 16  # steps between evaluations; samples a problem, during the run and at its end


class Bench:
    """The runs, in folders under `out`; a finished one has a results.json."""

    def __init__(self, out: Path, ranks: World):
        self.out, self.ranks = out, ranks
        self.tables = read_recipe("toy")

    def stage_1(self, seed: int) -> None:
        """Make a seed's data, train its stage 1 and evaluate it."""
        folder = self.out / f"seed-{seed}"
        if (folder / "results.json").exists():
            return
        data = folder / "data"
        toy.make(data, resolve(ToyConfig, "toy", self.tables), seed)
        config = replace(
            resolve(SftConfig, "sft", self.tables),
            model=str(data / "model"),
            data=str(data / "sft.jsonl"),
            out=str(folder / "sft"),
            cache=str(self.out / "cache"),
            seed=seed,
        )
        self.train("sft", config)
        self.finish(folder, seed, [("SFT", folder / "sft" / "final", N_END)])

    def stage_2(self, seed: int, name: str, parameters: dict, lr: float, tuning: bool) -> float:
        """Train a method from a seed's stage 1 and evaluate it. Returns the final pass@1."""
        start = self.out / f"seed-{seed}"
        folder = start / run_name(name, lr)
        if not (folder / "results.json").exists():
            config = replace(
                resolve(RediConfig, "redi", self.tables, {"redi": parameters}),
                model=str(start / "sft" / "final"),
                data=str(start / "data" / "pairs.jsonl"),
                out=str(folder),
                cache=str(self.out / "cache"),
                seed=seed,
                lr=lr,
                save_every=0 if tuning else ALONG,
                log_every=1000,
                evaluate=False,
            )
            self.train("redi", config)
            steps = [(path.name, path, N_ALONG) for path in sorted(folder.glob("step-*"))]
            self.finish(folder, seed, [*steps, ("end", folder / "final", N_ALONG if tuning else N_END)])
        return json.loads((folder / "results.json").read_text())[-1]["pass@1"]

    def train(self, table: str, config: SftConfig | RediConfig) -> None:
        with open(self.out / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            if not open_run(config.out, {table: config}):
                train(config, self.ranks)

    def finish(self, folder: Path, seed: int, models: list[tuple[str, Path, int]]) -> None:
        """Evaluate models and write results.json."""
        data = self.out / f"seed-{seed}" / "data"
        problems = [benchmarks.load(str(data / "toy.jsonl"), "", 0)]
        watch = RediConfig(watch=str(data / "watch.jsonl"), cache=str(self.out / "cache"))
        rows = []
        for name, model, n in models:
            (folder / "samples.jsonl").unlink(missing_ok=True)
            config = replace(resolve(EvaluateConfig, "evaluate", self.tables), n=n)
            rows += evaluate(name, model, problems, config, folder, self.ranks, pairs=watch)
        (folder / "samples.jsonl").unlink(missing_ok=True)
        write_json(folder / "results.json", rows)
        print(f"{folder}: pass@1 {rows[-1]['pass@1']:.1%}", flush=True)


@contextlib.contextmanager
def timed(out: Path) -> Iterator[None]:
    """Append to seconds.txt how long this start of the program ran, even if it was interrupted."""
    start = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command resumes"))
    try:
        yield
    finally:
        with open(out / "seconds.txt", "a") as file:
            file.write(f"{time.perf_counter() - start:.1f}\n")


def run_all(out: Path) -> None:
    """Do every run that is not finished yet."""
    out.mkdir(parents=True, exist_ok=True)
    with timed(out), world() as ranks:
        bench = Bench(out, ranks)
        bench.stage_1(TUNING_SEED)
        tuned = {
            name: {lr: bench.stage_2(TUNING_SEED, name, parameters, lr, tuning=True) for lr in RATES}
            for name, parameters in METHODS.items()
        }
        (out / "tuned.json").write_text(json.dumps(tuned, indent=1) + "\n")
        for seed in SEEDS:
            bench.stage_1(seed)
            for name, lr in arms(tuned):
                bench.stage_2(seed, name, METHODS[name], lr, tuning=False)


def arms(tuned: dict[str, dict[float, float]]) -> list[Arm]:
    """The runs for each seed: every method at its best rate, then some also at another one."""
    best = [(name, ranked(at)[0]) for name, at in tuned.items()]
    second = [(name, ranked(tuned[name])[1]) for name in CONTESTED]
    return list(dict.fromkeys([*best, *second, *HIGH]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/findings", help="folder of the runs [runs/findings]")
    parser.add_argument("--page", action="store_true", help="only write the page")
    flags = parser.parse_args()
    out = Path(flags.out)
    try:
        if not flags.page:
            run_all(out)
        tuned = {
            name: {float(lr): score for lr, score in at.items()}
            for name, at in json.loads((out / "tuned.json").read_text()).items()
        }
        write_page(out, tuned, arms(tuned), SEEDS, TUNING_SEED, ROOT / "docs")
    except (UserError, Stopped, FileNotFoundError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
