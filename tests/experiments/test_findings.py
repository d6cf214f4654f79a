"""The findings' page, from made-up runs: its verdicts follow the numbers."""

import json
from pathlib import Path

import pytest

from experiments.findings import METHODS, arms
from experiments.findings_page import STAGE_1, Results, claims, near, verdict, write_page

TUNED = {name: {1e-4: 0.3, 2e-4: 0.4, 3e-4: 0.5, 1e-3: 0.1} for name in METHODS}
ARMS = arms(TUNED)
SEEDS = (1, 2, 3)


def write_runs(out: Path, accuracy: dict[str, float]) -> Results:
    """Finished runs of all arms: pass@1 as given by method, otherwise 0.5, and slightly different on each seed."""
    results = Results.__new__(Results)
    results.out = out
    for arm in [STAGE_1, *ARMS]:
        for seed in SEEDS:
            file = results.file(arm, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            value = accuracy.get(arm[0], 0.5) + 0.01 * seed * (arm[0] in accuracy)
            row = {"benchmark": "toy", "pass@1": value, "sem": 0.01, "pass@16": 0.9, "problems": 200, "n": 16}
            row |= {"chosen_logp": -0.2, "rejected_logp": -0.3, "no_answer": 0.0}
            models = ["SFT"] if arm == STAGE_1 else ["step-000001", "end"]
            file.write_text(json.dumps([{"model": model, **row} for model in models]))
            if arm != STAGE_1:
                steps = [{"step": i, "chosen_logp": -0.2, "rejected_logp": -0.3, "update_norm": 0.1} for i in (1, 2)]
                (file.parent / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (out / "seconds.txt").write_text("250.0\n50.0\n")
    return Results(out, ARMS, SEEDS)


@pytest.mark.parametrize(
    "differences, want",
    [
        ([0.10, 0.11, 0.12], "**holds**"),
        ([-0.10, -0.11, -0.12], "**the opposite holds**"),
        ([0.01, 0.01, 0.30], "true on every seed, but the interval includes 0"),
        ([-0.01, -0.01, -0.30], "the opposite on every seed, but the interval includes 0"),
        ([0.1, -0.1, 0.2], "undecided: true on 2 of 3 seeds"),
        ([0.0, 0.0, 0.0], "undecided: true on 0 of 3 seeds"),
    ],
)
def test_a_verdict_follows_the_differences(differences, want):
    assert verdict(differences, 100, "points")[1] == want


def test_an_interval_is_student_s():
    # Mean 2, standard deviation 1, t(2 degrees) 4.30: 2 -+ 4.30 / sqrt(3).
    assert verdict([1, 2, 3], 1, "nats")[0] == "+2.00 nats (-0.48 to +4.48)"


def test_every_method_runs_at_its_best_rate_and_the_contested_ones_also_at_their_second():
    tuned = {**TUNED, "DPO": {1e-4: 0.2, 2e-4: 0.6, 3e-4: 0.59, 1e-3: 0.57}}
    trained = arms(tuned)
    assert trained[:7] == [(name, 2e-4 if name == "DPO" else 3e-4) for name in METHODS]
    assert trained[7:] == [
        ("REDI 0.8", 2e-4),
        ("DPO", 3e-4),
        ("SimPO", 2e-4),
        ("REDI 0.8", 1e-3),
        ("symmetric REDI", 1e-3),
    ]
    assert {claim.more for claim in claims(tuned)} | {claim.less for claim in claims(tuned)} <= {STAGE_1, *trained}
    assert near(tuned, trained) == "DPO at 0.001"


def test_the_page_says_what_the_runs_say(tmp_path):
    pytest.importorskip("matplotlib")
    for redi, dpo in ((0.9, 0.7), (0.7, 0.9)):
        write_runs(tmp_path / "runs", {"REDI 0.8": redi, "DPO": dpo - 0.01})
        write_page(tmp_path / "runs", TUNED, ARMS, SEEDS, 0, tmp_path)
        page = (tmp_path / "findings.md").read_text()
        line = next(line for line in page.splitlines() if "REDI is better than DPO" in line)
        assert f"pass@1 {100 * redi + 2:.1f} against {100 * dpo + 1:.1f}" in line
        assert ("**holds**" if redi > dpo else "**the opposite holds**") in line
        assert all(claim.text in page for claim in claims(TUNED))
        assert "| REDI 0.8 | 0.0003 |" in page and "| REDI 0.8 | 0.0002 |" in page
        assert "39 trainings with their evaluations, took 5.0 minutes on 2 cores, in 2 starts" in page
    assert (tmp_path / "findings.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "runs" / "seed-1" / "results.json").unlink()
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "runs", TUNED, ARMS, SEEDS, 0, tmp_path)
