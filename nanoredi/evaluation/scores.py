"""From responses to scores: a response is graded as a row of samples.jsonl, a benchmark's samples are summarised as a
row of the table, and two models are compared problem by problem.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from nanoredi.data.benchmarks import Benchmark
from nanoredi.grader import extract_answer, grade

KS = (1, 4, 16)  # the k of pass@k, if there are as many samples
_DRAWS, _SEED = 10_000, 0  # for the bootstrap
_WAIT = re.compile(r"\bWait\b")

Row = dict[str, Any]


def graded(
    model: str, benchmark: Benchmark, problem: int, sample: int, response: str, tokens: int | None, reason: str | None
) -> Row:
    """Grade a response, as a row of samples.jsonl.

    Args:
        model: the model's name in the table.
        problem: the problem's index in the benchmark, from 0.
        sample: the sample's number within the problem, from 0.
        response: the whole text, including its thinking.
        tokens: the response's length; None if another engine did not report it.
        reason: why the response ended: "stop" or "length"; None if another engine did not report it.
    """
    golds = benchmark.golds[problem]
    return {
        "model": model,
        "benchmark": benchmark.name,
        "problem": problem,
        "sample": sample,
        "correct": grade(response, golds),
        "correct_deepscaler": grade(response, golds, style="deepscaler"),
        "answer": extract_answer(response),
        "gold": golds,
        "tokens": tokens,
        "finish_reason": reason,
        "waits": len(_WAIT.findall(response)),
        "response": response,
    }


def summarise(samples: list[Row], n: int) -> Row:
    """The scores of a benchmark's samples, n for each problem. Shares are fractions of 1; a score is None if the
    samples lack what it needs.

    pass@1 is the mean over problems and samples. Its standard error is the paper's: s / sqrt(n), s being the standard
    deviation (ddof 0) of the n benchmark-wide accuracies, one for each sample number; a single sample has none. pass@k,
    for KS and n, is the mean over problems of the unbiased estimate 1 - C(n-c, k) / C(n, k), where c of the problem's n
    samples are correct.
    """
    correct = _matrix(samples, "correct", n)
    right = correct.sum(axis=1).astype(int)
    ks = sorted({k for k in (*KS, n) if k <= n})
    tokens = [s["tokens"] for s in samples if s["tokens"] is not None]
    waits = sum(s["waits"] for s in samples)
    reasons = [s["finish_reason"] for s in samples if s["finish_reason"] is not None]
    return {
        "problems": len(correct),
        "n": n,
        "pass@1": float(correct.mean()),
        "sem": float(correct.mean(axis=0).std() / math.sqrt(n)) if n > 1 else None,
        **{f"pass@{k}": float(np.mean([pass_at_k(n, c, k) for c in right.tolist()])) for k in ks if k > 1},
        "pass@1_deepscaler": float(_matrix(samples, "correct_deepscaler", n).mean()),
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
        "no_answer": float(np.mean([s["answer"] is None for s in samples])),
        "cut_off": float(np.mean([reason == "length" for reason in reasons])) if reasons else None,
        "waits_per_response": waits / len(samples),
        "waits_per_1000_tokens": 1000 * waits / sum(tokens) if len(tokens) == len(samples) and sum(tokens) else None,
    }


def step_of(model: str) -> float:
    """The optimiser step of a run's model, by its name in the table: 0 for the initial model, infinity for the last."""
    numbered = re.search(r"step-(\d{1,9})$", model)
    return int(numbered[1]) if numbered else 0 if model in ("SFT", "start") else math.inf


def mark_best(rows: list[Row]) -> tuple[list[Row], str]:
    """A run's rows sorted by step, with "best" true for the best of its checkpoints, and a line that names it and the
    last one. The best has the highest pass@1 on MATH-500 (as in the paper), or else on average; if equal, the first."""
    rows = sorted(rows, key=lambda row: step_of(row["model"]))
    own = [row for row in rows if step_of(row["model"])]
    own = [row for row in own if row["benchmark"] == "math500"] or own
    means = {m: float(np.mean([row["pass@1"] for row in own if row["model"] == m])) for m in [r["model"] for r in own]}
    best, last = max(means, key=means.__getitem__), own[-1]["model"]
    where = "on MATH-500" if own[0]["benchmark"] == "math500" else "over the benchmarks"
    text = f"by pass@1 {where} the best is {best}, {means[best]:.1%}; the last is {last}, {means[last]:.1%}"
    return [{**row, "best": row["model"] == best} for row in rows], text


def unended(samples: Iterable[Row], flag: str) -> list[str]:
    """A warning for each model with no end of thinking in over half of its boxed responses, with a flag to try."""
    thinks: dict[str, list[bool]] = {}
    for model, response in ((s["model"], s["response"]) for s in samples if "\\boxed" in s["response"]):
        thinks.setdefault(model, []).append("<think>" in response and "</think>" not in response)
    return [
        f"{model}: over half of the responses with a boxed answer have no </think>, and count as wrong; for a model "
        f"that does not think give {flag}"
        for model, own in thinks.items()
        if 2 * sum(own) > len(own)
    ]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that k of n samples, drawn without replacement, include one of the c correct ones."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def average(rows: list[Row]) -> Row:
    """One model's rows for several benchmarks as one row: plain means; `sem` is the standard error of that mean."""
    keys = [key for key in rows[0] if key not in ("model", "benchmark", "problems", "n")]
    values = {key: [row.get(key) for row in rows] for key in keys}
    means = {key: None if None in own else float(np.mean(own)) for key, own in values.items()}
    if means["sem"] is not None:
        means["sem"] = math.sqrt(sum(sem**2 for sem in values["sem"])) / len(rows)
    return {"model": rows[0]["model"], "benchmark": "average", **means}


def compare(samples: Iterable[Row], first: str, second: str) -> list[Row]:
    """The second model's pass@1 minus the first's, for each benchmark that both have, and for the average of several.

    Returns:
        Rows {benchmark, first, second, difference, low, high}: low and high bound a 95 % interval from a paired
        bootstrap, 10,000 draws of problems with replacement and with a fixed seed.
    """
    correct: dict[tuple[str, str], dict[int, list[bool]]] = {}  # {(benchmark, model): {problem: its samples}}
    for s in samples:
        correct.setdefault((s["benchmark"], s["model"]), {}).setdefault(s["problem"], []).append(s["correct"])
    rng = np.random.default_rng(_SEED)  # one for all: benchmarks of one size must not share their draws
    draws, rows = {}, []
    for benchmark in sorted({benchmark for benchmark, _ in correct}):
        one, other = (correct.get((benchmark, model), {}) for model in (first, second))
        if one and one.keys() == other.keys():
            of_problems = np.array([np.mean(other[p]) - np.mean(one[p]) for p in sorted(one)])
            drawn = np.array([rng.choice(of_problems, len(of_problems)).mean() for _ in range(_DRAWS)])
            draws[benchmark] = of_problems.mean(), drawn
    if len(draws) > 1:
        means, drawn = zip(*draws.values())
        draws["average"] = np.mean(means), np.mean(drawn, axis=0)
    for benchmark, (difference, drawn) in draws.items():
        low, high = np.percentile(drawn, [2.5, 97.5])
        ends = {"difference": float(difference), "low": float(low), "high": float(high)}
        rows.append({"benchmark": benchmark, "first": first, "second": second, **ends})
    return rows


def _matrix(samples: list[Row], key: str, n: int) -> np.ndarray:
    """Zeros and ones (problems, n)."""
    matrix = np.zeros((1 + max(s["problem"] for s in samples), n))
    for s in samples:
        matrix[s["problem"], s["sample"]] = s[key]
    return matrix
