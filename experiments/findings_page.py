"""Write docs/findings.md and its figure from the runs of experiments/findings.py, results and verdicts included."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoredi.report.figures import Run, draw, read_runs

Arm = tuple[str, float]  # method and learning rate
STAGE_1: Arm = ("stage 1", 0.0)
# Not from the sweep: at this rate the second arm should collapse and the first should not.
HIGH: list[Arm] = [("REDI 0.8", 1e-3), ("symmetric REDI", 1e-3)]
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for a 95 % interval, by the number of seeds


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: a metric of the last evaluation is larger for `more` than for `less`.

    Attributes:
        text: the claim in words (arXiv 2505.24850).
        more, less: the arms.
        key: the metric; shares are shown in percentage points.
    """

    text: str
    more: Arm
    less: Arm
    key: str = "pass@1"


def ranked(at: dict[float, float]) -> list[float]:
    """A method's learning rates, the one with the highest pass@1 first."""
    return sorted(at, key=at.get, reverse=True)


def claims(tuned: dict[str, dict[float, float]]) -> list[Claim]:
    """The paper's claims, as comparisons of the arms that the sweep chose."""
    best = {name: (name, ranked(at)[0]) for name, at in tuned.items()}
    second = {name: (name, ranked(at)[1]) for name, at in tuned.items()}
    redi, symmetric, (healthy, collapse) = best["REDI 0.8"], best["symmetric REDI"], HIGH
    return [
        Claim("Learning also from incorrect traces raises accuracy over stage 1", redi, STAGE_1),
        Claim("... and over continuing on the correct ones alone", redi, best["SFT continued"]),
        Claim("REDI is better than DPO", redi, best["DPO"]),
        Claim("... both at their second-best rate", second["REDI 0.8"], second["DPO"]),
        Claim("REDI is better than SimPO", redi, best["SimPO"]),
        Claim("... both at their second-best rate", second["REDI 0.8"], second["SimPO"]),
        Claim("The higher pass@1 is not at the expense of pass@16", redi, STAGE_1, "pass@16"),
        Claim("Symmetric REDI improves on stage 1 at a low rate", symmetric, STAGE_1),
        Claim("... and collapses at the high one: it ends below stage 1", STAGE_1, collapse),
        Claim("... at which alpha 0.8 stays above stage 1", healthy, STAGE_1),
        Claim("REDI is better than symmetric REDI, each at its best rate", redi, symmetric),
        Claim("Alpha 0.8 is better than 0.5", redi, best["REDI 0.5"]),
        Claim("Alpha 0.8 is better than 0.2", redi, best["REDI 0.2"]),
        Claim("In a healthy run the chosen log-prob falls", STAGE_1, redi, "chosen_logp"),
        Claim("... and so does the rejected one", STAGE_1, redi, "rejected_logp"),
        Claim("In the collapse the chosen log-prob falls far lower", redi, collapse, "chosen_logp"),
        Claim("... and so does the rejected one", redi, collapse, "rejected_logp"),
    ]


class Results:
    """The rows of results.json of all runs, by arm and seed."""

    def __init__(self, out: Path, arms: Sequence[Arm], seeds: Sequence[int]):
        self.out, self.arms, self.seeds = out, [STAGE_1, *arms], seeds
        self.rows = {(arm, seed): json.loads(self.file(arm, seed).read_text()) for arm in self.arms for seed in seeds}

    def file(self, arm: Arm, seed: int) -> Path:
        folder = self.out / f"seed-{seed}"
        return (folder if arm == STAGE_1 else folder / run_name(*arm)) / "results.json"

    def values(self, arm: Arm, key: str) -> list[float]:
        """A metric of an arm's last evaluation, for each seed."""
        return [self.rows[arm, seed][-1][key] for seed in self.seeds]


def run_name(method: str, lr: float) -> str:
    return f"{method.replace(' ', '-')}-{lr:g}"


def verdict(differences: Sequence[float], scale: float, unit: str) -> tuple[str, str]:
    """The mean difference with its 95 % interval, and the verdict on a claim that it is positive."""
    n, mean = len(differences), statistics.fmean(differences)
    half = T_95[n] * statistics.stdev(differences) / math.sqrt(n)
    wins = sum(d > 0 for d in differences)
    if mean - half > 0:
        word = "**holds**"
    elif mean + half < 0:
        word = "**the opposite holds**"
    elif wins == n:
        word = "true on every seed, but the interval includes 0"
    elif sum(d < 0 for d in differences) == n:
        word = "the opposite on every seed, but the interval includes 0"
    else:
        word = f"undecided: true on {wins} of {n} seeds"
    form = "+.1f" if unit == "points" else "+.2f"
    ends = f"{scale * (mean - half):{form}} to {scale * (mean + half):{form}}"
    return f"{scale * mean:{form}} {unit} ({ends})", word


def claims_table(results: Results, tuned: dict[str, dict[float, float]]) -> list[str]:
    lines = ["| the paper | on the toy | difference (95 % interval) | verdict |", "| --- | --- | --- | --- |"]
    for claim in claims(tuned):
        more, less = results.values(claim.more, claim.key), results.values(claim.less, claim.key)
        share = claim.key.startswith("pass@")
        scale, unit, form = (100, "points", ".1f") if share else (1, "nats", ".2f")
        means = " against ".join(f"{scale * statistics.fmean(v):{form}}" for v in (more, less))
        what = {"chosen_logp": "chosen ", "rejected_logp": "rejected "}.get(claim.key, f"{claim.key} ")
        difference, word = verdict([a - b for a, b in zip(more, less)], scale, unit)
        lines.append(f"| {claim.text} | {what}{means} | {difference} | {word} |")
    return lines


def results_table(results: Results) -> list[str]:
    seeds = " | ".join(f"seed {seed}" for seed in results.seeds)
    headings = "method | lr | pass@1 % | SEM | over seeds ± | pass@16 % | logp chosen | logp rejected | no answer %"
    lines = [f"| {headings} | {seeds} |", "| --- |" + " --- |" * (8 + len(results.seeds))]
    for arm in results.arms:
        value = {
            key: results.values(arm, key)
            for key in ("pass@1", "sem", "pass@16", "chosen_logp", "rejected_logp", "no_answer")
        }
        mean = {key: statistics.fmean(v) for key, v in value.items()}
        # The standard error of the mean over seeds; the runs' samples are independent.
        sem = math.sqrt(sum(s**2 for s in value["sem"])) / len(value["sem"])
        cells = [
            arm[0],
            f"{arm[1]:g}" if arm[1] else "",
            f"{100 * mean['pass@1']:.1f}",
            f"{100 * sem:.1f}",
            f"{100 * statistics.stdev(value['pass@1']):.1f}",
            f"{100 * mean['pass@16']:.1f}",
            f"{mean['chosen_logp']:.2f}",
            f"{mean['rejected_logp']:.2f}",
            f"{100 * mean['no_answer']:.1f}",
            *(f"{100 * v:.1f}" for v in value["pass@1"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sweep_table(tuned: dict[str, dict[float, float]]) -> list[str]:
    rates = list(next(iter(tuned.values())))
    lines = [f"| pass@1 % | {' | '.join(f'{lr:g}' for lr in rates)} |", "| --- |" + " --- |" * len(rates)]
    for name, at in tuned.items():
        cells = [f"{100 * at[lr]:.1f}" for lr in rates]
        best = rates.index(ranked(at)[0])
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def near(tuned: dict[str, dict[float, float]], arms: Sequence[Arm]) -> str:
    """The rates within 5 points of their method's best that were tried on the tuning seed alone."""
    found = []
    for name, at in tuned.items():
        highest = max(at.values())
        rates = [f"{lr:g}" for lr, score in at.items() if (name, lr) not in arms and highest - score < 0.05]
        found += [f"{name} at {', '.join(rates)}"] if rates else []
    return "; ".join(found) or "none"


def mean_run(arm: Arm, results: Results) -> Run:
    """An arm's training curve, averaged over seeds; accuracy's error bar is the standard error over seeds."""
    runs = read_runs([str(results.file(arm, seed).parent) for seed in results.seeds])
    keys = ("chosen_logp", "rejected_logp", "update_norm")
    rows = []
    for parts in zip(*(run.rows for run in runs)):
        # A skipped step has no metrics.
        means = {k: statistics.fmean(v) if None not in (v := [row[k] for row in parts]) else None for k in keys}
        rows.append({"step": parts[0]["step"], **means})
    shares = [
        [row["pass@1"] for row in (results.rows[STAGE_1, seed][-1], *results.rows[arm, seed])] for seed in results.seeds
    ]
    saved = [int(row["model"].removeprefix("step-")) for row in results.rows[arm, results.seeds[0]][:-1]]
    points = [
        (step, statistics.fmean(at), statistics.stdev(at) / math.sqrt(len(at)))
        for step, at in zip((0, *saved, rows[-1]["step"]), zip(*shares))
    ]
    return Run(f"{arm[0]}, lr {arm[1]:g}", rows, {"toy": points})


def time_taken(out: Path) -> tuple[int, float, int]:
    """The number of training runs, their minutes with evaluations, and how often the program was started."""
    seconds = list(map(float, (out / "seconds.txt").read_text().split()))
    return len(list(out.glob("seed-*/**/results.json"))), sum(seconds) / 60, len(seconds)


def write_page(
    out: Path, tuned: dict[str, dict[float, float]], arms: Sequence[Arm], seeds: Sequence[int], tuning: int, docs: Path
) -> None:
    """Write findings.md and findings.png into a folder.

    Args:
        out: the runs.
        tuned: {method: {learning rate: pass@1}} on the tuning seed.
        arms: those trained on the seeds, the best rates first.
        seeds, tuning: the seeds of the results, and the one on which the rates were chosen.
        docs: the folder to write into.

    Raises:
        FileNotFoundError: when a run is not finished.
    """
    results = Results(out, arms, seeds)
    draw([mean_run(arm, results) for arm in arms], str(docs / "findings.png"))
    many, rates = f"{', '.join(map(str, seeds[:-1]))} and {seeds[-1]}", len(next(iter(tuned.values())))
    last = results.rows[arms[0], seeds[0]][-1]
    sweep_high = 100 * tuned[HIGH[1][0]][HIGH[1][1]]
    along = results.rows[arms[0], seeds[0]][0]["n"]
    steps = read_runs([str(results.file(arms[0], seeds[0]).parent)])[0].rows[-1]["step"]
    trainings, minutes, starts = time_taken(out)
    restarts = f", in {starts} starts of the program" if starts > 1 else ""
    text = f"""# The paper's findings on the toy

`python experiments/findings.py` writes this page and its figure: each result and verdict below comes from its runs.

The toy (`nanoredi/toy.py`) was built to show how REDI works, and alpha 0.8 and DPO's beta were found to work on it
while it was being built. What holds here is a demonstration, and what does not hold here says as little about the paper,
whose model is 4,600 times as large.

Each seed has its own data, initialisation and order, one stage 1, and from it {len(arms)} runs of stage 2, each of {steps}
steps: {len(tuned)} methods at the best of {rates} learning rates, some also at another. The best was chosen on seed {tuning} (the
sweep is at the end); the results are of seeds {many}. pass@1 is over {last["problems"]} unseen problems, {last["n"]} samples each.

## Results

Means over seeds {many}. SEM is the mean's standard error over samples, for these models and problems; "over seeds" is
the standard deviation of the seeds' pass@1. Log-probs are in nats a token, on held-out pairs.

{chr(10).join(results_table(results))}

![Accuracy, log-probs and the size of the update of every method, by step](findings.png)

Lines are means over seeds, bars the standard error over seeds; accuracy between start and end has {along} samples a problem.

## The paper's claims

A difference is the mean over {len(seeds)} seeds of the difference between two runs of a seed. Its interval is Student's, wide
with so few seeds, and not corrected for the number of claims. "Holds" means that the whole interval is above 0. The
high rate, {HIGH[1][1]:g}, is not chosen by the sweep; in the sweep, on seed {tuning}, {HIGH[1][0]} has {sweep_high:.1f} % at it.

{chr(10).join(claims_table(results, tuned))}

## How the rates were chosen

pass@1 in % on seed {tuning}, {along} samples a problem. The best of a row, in bold, has the rate used above; where it stands
at an end of the row, a rate outside the grid may be better.

{chr(10).join(sweep_table(tuned))}

One seed is a rough guide, so REDI 0.8, DPO and SimPO are also compared at their second-best rate. That rule was made
after an earlier experiment, in which SimPO at its best rate had done badly on these same seeds.
Within 5 points of the best of their row, but not tried on the other seeds:
{near(tuned, arms)}.

DPO has beta 0.1, SimPO the paper's beta 2 and gamma 1. Neither was swept; other values may do better. Another processor
rounds differently and gives other figures ([measured](measured.md#the-toy)).

All of this, {trainings} trainings with their evaluations, took {minutes:.1f} minutes on 2 cores{restarts}.
"""
    (docs / "findings.md").write_text(text, encoding="utf-8")
