"""The page and the figure that experiments/real.py makes of its runs; every result and verdict comes from them."""

import json
from collections.abc import Sequence
from pathlib import Path

METHODS = {
    "SFT continued": ["--objective", "sft"],
    "REDI 0.5": ["--alpha", "0.5"],
    "REDI 0.8": ["--alpha", "0.8"],
    "symmetric REDI": ["--alpha", "1"],
    "DPO": ["--objective", "dpo", "--beta", "0.1"],
    "SimPO": ["--objective", "simpo", "--beta", "2", "--gamma", "1"],
}


def run_name(method: str, lr: float) -> str:
    return f"{method.replace(' ', '-')}-{lr:g}"


def best_rates(out: Path, rates: Sequence[float]) -> dict[str, float]:
    """Each method's rate, the one with the highest pass@1 on the validation problems."""
    return {method: max(rates, key=lambda lr: validated(out, method, lr)["pass@1"]) for method in METHODS}


def validated(out: Path, method: str, lr: float) -> dict:
    return json.loads((out / "seed-1" / "validation" / run_name(method, lr) / "results.json").read_text())[0]


def write_page(out, sizes, seeds, docs):
    pass
