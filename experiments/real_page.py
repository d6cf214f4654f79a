"""Write docs/real-model.md and its figure from the runs of experiments/real.py, results and verdicts included."""

import json
import math
import statistics
import tomllib
from pathlib import Path

from nanoredi.common.files import read_rows
from nanoredi.evaluation.scores import Row, compare, summarise
from nanoredi.report.figures import Run, draw, read_runs

METHODS = {
    "SFT continued": ["--objective", "sft"],
    "REDI 0.5": ["--alpha", "0.5"],
    "REDI 0.8": ["--alpha", "0.8"],
    "symmetric REDI": ["--alpha", "1"],
    "DPO": ["--objective", "dpo", "--beta", "0.1"],
    "SimPO": ["--objective", "simpo", "--beta", "2", "--gamma", "1"],
}
_LOW, _ALL = (1e-5, 3e-5), (1e-5, 3e-5, 6e-5)
RATES = {method: _LOW if method in ("DPO", "SimPO") else _ALL for method in METHODS}
# The paper's claims (arXiv 2505.24850): the first method named has a higher pass@1 than the second.
CLAIMS = [
    ("Learning also from incorrect traces raises accuracy over stage 1", "REDI 0.8", "stage 1"),
    ("... and over continuing on the correct ones alone", "REDI 0.8", "SFT continued"),
    ("REDI is better than DPO", "REDI 0.8", "DPO"),
    ("REDI is better than SimPO", "REDI 0.8", "SimPO"),
    ("Alpha 0.8 is better than symmetric REDI", "REDI 0.8", "symmetric REDI"),
    ("Alpha 0.8 is better than 0.5", "REDI 0.8", "REDI 0.5"),
]
KINDS = [  # kinds of problems, by whether the first sample was right before and after stage 2
    ("wrong before, right after", (False, True)),
    ("right before, wrong after", (True, False)),
    ("wrong before and after", (False, False)),
]
GRID = """These runs repeat earlier ones, whose trainings had a fault: in bf16 on a CPU the forward pass went on reading the
embedding, which is also the output head, and the biases as they were at the start of the process, while the optimiser changed
them. The data's split, the settings and the grid are those of the earlier runs, which had been evaluated on the test problems
(stage 1 13.8 %, SFT continued 18.4 %, REDI 0.8 14.7 %). Nothing was changed after these runs.

The grid began as 3e-5 and 6e-5. When REDI 0.5 and 0.8 had been tried at these in the earlier runs, validation showed 6e-5 to
be too high for both and 3e-5 for REDI 0.8, so 1e-5 was added for every method; DPO and SimPO were then not tried at 6e-5.

The grid is not independent of the test problems, even if the choice within it is. A manual trial before the earlier runs and
with the same fault, from a stage 1 of a thousand rows, was evaluated on them: after 30 steps of 32 pairs, REDI 0.8 had 15.4 %
at 2e-5 and 7.6 % at 1e-4, against 14.9 % before. The rates of the first grid lie between those two, and stage 1's rate and
batch are those of the trial."""
NOT_SHOWN = """- Anything at the paper's scale: its model has 1.5 billion parameters, its traces are thousands of tokens long and come from a
  strong teacher, its problems are competition mathematics. Here the incorrect traces are the model's own, and short.
- What each method can do at its best. The grid is coarse, the choice within it rests on few answers, and stage 1's
  settings, DPO's beta and SimPO's beta and gamma were not swept at all.
- How much the results vary with the order of the data and with the samples that the pairs come from. The intervals are over
  problems and take the trained models as given; one seed says nothing of the variation between seeds.
- What a longer stage 2, or more pairs, would do.
- That SVAMP is new to the model: what SmolLM2 was trained on is not known here, and SVAMP's authors wrote its problems by
  varying ASDiv-A's, which are among the training problems.
"""
LAST = 5  # steps whose log-probs are averaged


def run_name(method: str, lr: float) -> str:
    return f"{method.replace(' ', '-')}-{lr:g}"


def best_rates(out: Path) -> dict[str, float]:
    """Each method's rate with the highest pass@1 on the validation problems; the lowest one in a tie."""
    return {
        method: max(rates, key=lambda lr: validated(out, run_name(method, lr))["pass@1"])
        for method, rates in RATES.items()
    }


def validated(out: Path, run: str) -> Row:
    """A run's row on the validation problems."""
    return json.loads((out / "seed-1" / "validation" / run / "results.json").read_text())[0]


class Results:
    """Each method's samples of the test problems, pooled over seeds."""

    def __init__(self, out: Path, chosen: dict[str, float], seeds: int):
        self.runs = {"stage 1": "stage-1", **{method: run_name(method, lr) for method, lr in chosen.items()}}
        self.out, self.chosen, self.seeds = out, chosen, seeds
        self.samples: dict[str, list[Row]] = {}
        for method, run in self.runs.items():
            rows = []
            for seed in range(1, seeds + 1):
                of_seed = [row for _, row in read_rows(str(out / f"seed-{seed}" / "test" / run / "samples.jsonl"))]
                n = 1 + max(row["sample"] for row in of_seed)
                rows += [{**row, "model": method, "sample": row["sample"] + (seed - 1) * n} for row in of_seed]
            self.samples[method] = rows
        self.n = n

    def summary(self, method: str) -> Row:
        return summarise(self.samples[method], self.seeds * self.n)

    def of_seeds(self, method: str) -> list[Row]:
        """A method's row of the evaluation's results, for each seed."""
        folders = [self.out / f"seed-{seed}" / "test" / self.runs[method] for seed in range(1, self.seeds + 1)]
        return [json.loads((folder / "results.json").read_text())[0] for folder in folders]

    def difference(self, more: str, less: str) -> Row:
        """{difference, low, high} of pass@1: `more` minus `less`, paired by problem."""
        return compare([*self.samples[less], *self.samples[more]], less, more)[0]

    def course(self, method: str) -> Run:
        """A method's training curve on the first seed, with its accuracy before and after."""
        [run] = read_runs([str(self.out / "seed-1" / self.runs[method])])
        ends = [(0, self.of_seeds("stage 1")[0]), (run.rows[-1]["step"], self.of_seeds(method)[0])]
        points = [(step, row["pass@1"], row["sem"]) for step, row in ends]
        return Run(f"{method}, lr {self.chosen[method]:g}", run.rows, {"test": points})


def points(difference: Row) -> str:
    """A difference and its interval, in points."""
    mean, low, high = (f"{100 * difference[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{mean} ({low} to {high})"


def verdict(difference: Row) -> str:
    if difference["low"] > 0:
        return "**holds**"
    return "**the opposite holds**" if difference["high"] < 0 else "undecided"


def results_table(results: Results) -> list[str]:
    lines = [
        f"| method | lr | pass@1 % | pass@{results.n} % | against stage 1 | against SFT continued | no answer % | logp chosen "
        "| logp rejected |",
        "| --- |" + " --- |" * 8,
    ]
    for method in results.runs:
        rows = results.of_seeds(method)
        mean = {key: statistics.fmean(row[key] for row in rows) for key in ("pass@1", "no_answer", f"pass@{results.n}")}
        by_seed = ", ".join(f"{100 * row['pass@1']:.1f}" for row in rows)
        against = [
            "" if other == method or method == "stage 1" else points(results.difference(method, other))
            for other in ("stage 1", "SFT continued")
        ]
        cells = [
            method,
            f"{results.chosen[method]:g}" if method in results.chosen else "",
            f"{100 * mean['pass@1']:.1f} ± {100 * results.summary(method)['sem']:.1f}"
            + f" ({by_seed})" * (len(rows) > 1),
            f"{100 * mean[f'pass@{results.n}']:.1f}",
            *against,
            f"{100 * mean['no_answer']:.1f}",
            *(last_logp(results, method, side) for side in ("chosen", "rejected")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def last_logp(results: Results, method: str, side: str) -> str:
    """The mean log-prob a token over the last steps on the first seed; empty if there are none."""
    if method not in results.chosen:
        return ""
    rows = results.course(method).rows[-LAST:]
    values = [row[f"{side}_logp"] for row in rows if row.get(f"{side}_logp") is not None]
    return f"{statistics.fmean(values):.2f}" if values else ""


def claims_table(results: Results) -> list[str]:
    lines = ["| the paper | pass@1 % here | difference (95 % interval) | verdict |", "| --- | --- | --- | --- |"]
    for text, more, less in CLAIMS:
        means = [f"{100 * results.summary(method)['pass@1']:.1f}" for method in (more, less)]
        difference = results.difference(more, less)
        lines.append(f"| {text} | {' against '.join(means)} | {points(difference)} | {verdict(difference)} |")
    return lines


def validation_table(out: Path, chosen: dict[str, float]) -> list[str]:
    rates = sorted({lr for tried in RATES.values() for lr in tried})
    lines = [f"| pass@1 % | {' | '.join(f'{lr:g}' for lr in rates)} |", "| --- |" + " --- |" * len(rates)]
    start = f"{100 * validated(out, 'stage-1')['pass@1']:.1f}"
    lines.append(f"| stage 1, before all of them | {' | '.join([start] * len(rates))} |")
    for method, best in chosen.items():
        cells = []
        for lr in rates:
            share = f"{100 * validated(out, run_name(method, lr))['pass@1']:.1f}" if lr in RATES[method] else ""
            cells.append(f"**{share}**" if lr == best else share)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def responses(results: Results, problems: list[str], method: str) -> list[str]:
    """For each kind, the number of problems and the first one, with both responses."""
    before, after = (
        {row["problem"]: row for row in results.samples[name] if row["sample"] == 0} for name in ("stage 1", method)
    )
    lines = []
    for kind, want in KINDS:
        found = [i for i in before if (before[i]["correct"], after[i]["correct"]) == want]
        lines += [f"**{kind[0].upper()}{kind[1:]}**: {len(found)} of {len(before)} problems.", ""]
        if found:
            first = min(found)
            said = [row["response"].replace("\n", " ⏎ ") for row in (before[first], after[first])]
            lines += [
                f"> {problems[first]} (answer: {before[first]['gold'][0]})",
                "",
                f"- stage 1: `{said[0]}`",
                f"- {method}: `{said[1]}`",
                "",
            ]
    return lines


def num_rows(path: Path) -> int:
    return sum(1 for _ in read_rows(str(path)))


def time_taken(out: Path) -> str:
    """How much CPU time the commands took."""
    rows = [row for _, row in read_rows(str(out / "stages.jsonl"))]
    whole = sum(not row["stage"].endswith("broken off") for row in rows)
    minutes = sum(row["cpu"] for row in rows) / 60
    return (
        f"The {whole} commands took {minutes:.0f} minutes of CPU time, which is {minutes / 2:.0f} minutes of two busy cores, "
        "including commands that were interrupted and restarted. The wall time was longer, because the cores were shared."
    )


def what_was_done(out: Path, results: Results) -> str:
    data, seed = out / "data", out / "seed-1"
    stage_1, stage_2 = (
        tomllib.loads((seed / run / "config.toml").read_text())[table]
        for run, table in (("stage-1", "sft"), (results.runs["REDI 0.8"], "redi"))
    )
    problems = len({row["prompt"] for _, row in read_rows(str(data / "stage-1.jsonl"))})
    prompts, samples, pairs = (
        num_rows(path) for path in (data / "prompts.jsonl", seed / "samples.jsonl", Path(stage_2["data"]))
    )
    summary = results.summary("stage 1")
    seen = stage_2["max_steps"] * stage_2["batch_size"]
    return f"""| step | what |
| --- | --- |
| model | SmolLM2-135M-Instruct from a GGUF file (Q4_1), converted to a Qwen2 whose logits agree with those of \
transformers' Llama on the same weights |
| stage 1 | `train_sft.py` on {num_rows(data / "stage-1.jsonl"):,} traces of {problems:,} problems, \
{stage_1["epochs"]} epochs, batches of {stage_1["batch_size"]}, lr {stage_1["lr"]:g} |
| pairs | `sample.py` at temperature 1 on {prompts:,} other problems, {samples // prompts} samples each, and \
`prepare --grade`: each of the {pairs:,} problems with both a right and a wrong sample gives a pair |
| stage 2 | `train_redi.py`, {stage_2["max_steps"]} steps of {stage_2["batch_size"]} pairs, {seen:,} in all, for every \
method (SFT continued takes only their correct traces); AdamW, bf16 with fp32 masters |
| learning rates | for each method the best of its grid by `evaluate.py` on {num_rows(data / "validation.jsonl")} validation problems |
| test | `evaluate.py` on {summary["problems"]:,} problems of SVAMP, {results.n} samples each, temperature 0.6, top-p 0.95 |
""".replace("\\\n", "")


def write_page(out: Path, seeds: int, docs: Path) -> None:
    """Write real-model.md and real-model.png into a folder.

    Args:
        out: the runs.
        seeds: how many seeds were run.
        docs: the folder.

    Raises:
        UserError: when a run is not finished.
    """
    chosen = best_rates(out)
    results = Results(out, chosen, seeds)
    on_validation = validated(out, "stage-1")
    error = 100 * math.sqrt(on_validation["pass@1"] * (1 - on_validation["pass@1"]) / on_validation["problems"])
    over = "one seed" if seeds == 1 else f"{seeds} seeds"
    at_ends = sum(lr in (RATES[method][0], RATES[method][-1]) for method, lr in chosen.items())
    draw([results.course(method) for method in METHODS], str(docs / "real-model.png"))
    problems = [row["problem"] for _, row in read_rows(str(out / "data" / "test.jsonl"))]
    redi, sft = (results.difference(method, "stage 1") for method in ("REDI 0.8", "SFT continued"))
    over_sft = results.difference("REDI 0.8", "SFT continued")
    # The pairs' correct traces alone may raise accuracy; what the incorrect ones add is the difference from SFT.
    answer = {
        "**holds**": "Yes, on these problems" if verdict(redi) == "**holds**" else "Not shown",
        "**the opposite holds**": "No, not here: continuing on the correct traces alone is better",
        "undecided": "Not shown",
    }[verdict(over_sft)]
    text = f"""# The claim on a real model

`python experiments/real.py` writes this page and its figure: each result and verdict below comes from its runs.

Does learning from incorrect traces raise the accuracy of a real language model, with real weights and real problems?
**{answer}.** In points of pass@1, with {over}
and 95 % intervals over problems:

- REDI with alpha 0.8 against stage 1: {points(redi)};
- continuing on the correct traces alone against stage 1: {points(sft)};
- REDI with alpha 0.8 against continuing on the correct ones alone: {points(over_sft)}.

{what_was_done(out, results)}
The training problems are from MAWPS and ASDiv-A, the test problems from SVAMP. A trace is a problem's equations between
`<think>` and `</think>`, followed by the answer in a box. Stage 1, the pairs and validation share no problem.

## Results

With {over}. ± is pass@1's standard error over {results.n} samples a problem. Differences are in points of pass@1, with a 95 %
interval from a paired bootstrap over problems (10,000 draws). Log-probs are in nats a token, on the training pairs: the
mean of the last {LAST} steps, each before its update.

{chr(10).join(results_table(results))}

![Accuracy, log-probs and the size of the update of every method, by step](real-model.png)

## The paper's claims

"Holds" means that the whole interval is above 0. Each method is at its own rate. The intervals are not corrected for their
number: the chance that at least one of {len(CLAIMS)} independent ones misses its true value is {100 * (1 - 0.95 ** len(CLAIMS)):.0f} %.

{chr(10).join(claims_table(results))}

## How the rates were chosen

pass@1 in % on {on_validation["problems"]} validation problems, which are training problems set aside, with {on_validation["n"]}
sample{"s" * (on_validation["n"] > 1)} each; the best of a row, in bold, has the rate used above. With so few answers the standard error
is about {error:.1f} points. In these runs the test problems were first answered after this choice. {at_ends} of {len(chosen)} bold
figures stand at an end of their row: there a rate outside the grid may be better.

{chr(10).join(validation_table(out, chosen))}

{GRID}

## Three responses

The first test problem of each kind, judged by the first sample of stage 1 and of REDI 0.8; ⏎ is a line break.

{chr(10).join(responses(results, problems, "REDI 0.8"))}
## What is not shown

{NOT_SHOWN}
## What it took

{time_taken(out)}
"""
    (docs / "real-model.md").write_text(text, encoding="utf-8")
