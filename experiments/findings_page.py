"""The page and the figure of experiments/findings.py; every result and verdict in them comes from its runs."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoredi.report.figures import Run, draw, read_runs

Arm = tuple[str, float]  # method and learning rate
STAGE_1: Arm = ("stage 1", 0.0)
HIGH: list[Arm] = [
    ("REDI 0.8", 1e-3),
    ("symmetric REDI", 1e-3),
]  # where the second should collapse and the first should not
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for an interval of 95 %, by the number of seeds


@dataclass(frozen=True)
class Claim:
    """What the paper says: that `more` is larger than `less` by a metric of the last evaluation.

    Attributes:
        text: the paper's claim (arXiv 2505.24850).
        more, less: the arms.
        key: the metric; shares are shown in points.
    """

    text: str
    more: Arm
    less: Arm
    key: str = "pass@1"


def ranked(at: dict[float, float]) -> list[float]:
    """A method's learning rates, the one with the highest pass@1 first."""
    return sorted(at, key=at.get, reverse=True)


def claims(tuned: dict[str, dict[float, float]]) -> list[Claim]:
    """The paper's claims, about the arms that the sweep chose."""
    best = {name: (name, ranked(at)[0]) for name, at in tuned.items()}
    second = {name: (name, ranked(at)[1]) for name, at in tuned.items()}
    redi, symmetric, (healthy, collapse) = best["REDI 0.8"], best["symmetric REDI"], HIGH
    return [
        Claim("Learning from incorrect traces, too, raises accuracy over stage 1", redi, STAGE_1),
        Claim("... and over continuing SFT on the correct ones alone", redi, best["SFT continued"]),
        Claim("REDI is better than DPO", redi, best["DPO"]),
        Claim("... both at their second-best rate", second["REDI 0.8"], second["DPO"]),
        Claim("REDI is better than SimPO", redi, best["SimPO"]),
        Claim("... both at their second-best rate", second["REDI 0.8"], second["SimPO"]),
        Claim("The higher pass@1 does not cost pass@16", redi, STAGE_1, "pass@16"),
        Claim("Symmetric REDI improves on stage 1 at a low rate", symmetric, STAGE_1),
        Claim("... and collapses at the high one: it ends below stage 1", STAGE_1, collapse),
        Claim("... where alpha 0.8 stays above stage 1", healthy, STAGE_1),
        Claim("REDI at its rate is better than symmetric REDI at its own", redi, symmetric),
        Claim("Alpha 0.8 is better than 0.5", redi, best["REDI 0.5"]),
        Claim("Alpha 0.8 is better than 0.2", redi, best["REDI 0.2"]),
        Claim("In a healthy run the chosen log-prob falls", STAGE_1, redi, "chosen_logp"),
        Claim("... and the rejected one", STAGE_1, redi, "rejected_logp"),
        Claim("In the collapse the chosen log-prob falls far lower", redi, collapse, "chosen_logp"),
        Claim("... and the rejected one", redi, collapse, "rejected_logp"),
    ]


class Results:
    """The last rows of all runs."""

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
    """The mean difference with its 95 % interval, and what that says of a claim that it is positive."""
    n, mean = len(differences), statistics.fmean(differences)
    half = T_95[n] * statistics.stdev(differences) / math.sqrt(n)
    wins = sum(d > 0 for d in differences)
    if mean - half > 0:
        word = "**holds**"
    elif mean + half < 0:
        word = "**the opposite holds**"
    elif wins == n:
        word = "holds on every seed, but the spread is as large"
    elif sum(d < 0 for d in differences) == n:
        word = "the opposite on every seed, but the spread is as large"
    else:
        word = f"undecided: {wins} of {n} seeds"
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
    lines = [
        f"| {headings} | {seeds} |",
        "| --- |" + " --- |" * (8 + len(results.seeds)),
    ]
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
    """The rates that came close to the best one, but were not trained on the seeds."""
    found = []
    for name, at in tuned.items():
        highest = max(at.values())
        rates = [f"{lr:g}" for lr, score in at.items() if (name, lr) not in arms and highest - score < 0.05]
        found += [f"{name} at {', '.join(rates)}"] if rates else []
    return "; ".join(found) or "none"


def mean_run(arm: Arm, results: Results) -> Run:
    """An arm's training curve, averaged over seeds; the accuracy's error is the standard error over seeds."""
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
    """The number of trainings, their minutes with evaluations, and how often the program was started."""
    seconds = list(map(float, (out / "seconds.txt").read_text().split()))
    return len(list(out.glob("seed-*/**/results.json"))), sum(seconds) / 60, len(seconds)


def write_page(
    out: Path, tuned: dict[str, dict[float, float]], arms: Sequence[Arm], seeds: Sequence[int], tuning: int, docs: Path
) -> None:
    """Write findings.md and findings.png into a folder.

    Args:
        out: the runs.
        tuned: {method: {learning rate: pass@1}} on the tuning seed.
        arms: what was trained on the seeds, a method's best rate first.
        seeds, tuning: the seeds, and the one that the rates were chosen on.
        docs: the folder.

    Raises:
        FileNotFoundError: when a run is not finished.
    """
    results = Results(out, arms, seeds)
    draw([mean_run(arm, results) for arm in arms], str(docs / "findings.png"))
    many, rates = f"{', '.join(map(str, seeds[:-1]))} and {seeds[-1]}", len(next(iter(tuned.values())))
    last = results.rows[arms[0], seeds[0]][-1]
    steps = read_runs([str(results.file(arms[0], seeds[0]).parent)])[0].rows[-1]["step"]
    trainings, minutes, starts = time_taken(out)
    restarts = f", in {starts} starts of the program" if starts > 1 else ""
    text = f"""# The paper's findings on the toy

Made by `python experiments/findings.py`, as is the figure: every result and every verdict below comes from its runs.

The toy (`nanoredi/toy.py`) was built to show how REDI works, and alpha 0.8 and DPO's beta were tuned on it. What
holds here is a demonstration, and what does not hold here says just as little about the paper, whose model is 4,600
times as large.

Stage 1 is trained once a seed, and stage 2 from it in {len(arms)} ways, each of {steps} steps. Their learning rates
were chosen on seed {tuning} alone, for every method from the same {rates} (the sweep is at the end); seeds {many} had
no part in it. pass@1 is over {last["problems"]} unseen problems with {last["n"]} samples each. Another seed gives
other data, another initialisation and another order.

## Results

Means over seeds {many}. SEM is the mean's standard error over samples, "over seeds" the standard deviation of the
seeds' pass@1; log-probs are nats a token on pairs kept out of training.

{chr(10).join(results_table(results))}

![Accuracy, log-probs and the size of the update of every method, by step](findings.png)

The lines are means over the seeds; accuracy's error bars are the standard error over seeds. During a run there
are fewer samples a problem than at its end.

## The paper's claims

A difference is between runs of the same seed. Its interval is Student's, of {len(seeds)} seeds, and wide: what is true
on every seed may still not be certain. A claim holds if the whole interval is above 0.

{chr(10).join(claims_table(results, tuned))}

## How the rates were chosen

pass@1 in % on seed {tuning}, with fewer samples a problem. The best of a row, in bold, is what the method has above;
where it stands at an end of the row, the grid was too small for this method.

{chr(10).join(sweep_table(tuned))}

A choice on one seed is rough, so REDI 0.8, DPO and SimPO are also above at their second-best rate. This rule was
made after an earlier run, in which SimPO's best rate did badly on these same seeds.
Not tried on the other seeds, though within 5 points of the best of their row:
{near(tuned, arms)}.

DPO has beta 0.1, SimPO the paper's beta 2 and gamma 1. Neither was swept; another value may do better.

All of it, {trainings} trainings with their evaluations, took {minutes:.1f} minutes on 2 cores{restarts}.
"""
    (docs / "findings.md").write_text(text, encoding="utf-8")
