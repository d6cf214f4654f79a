"""Raw rows to sft.jsonl and pairs.jsonl, compared with results written out here, with `datasets`, and with plain loops
over the real sample."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
from raw_rows import COUNTS, LIMITS, ROWS, prepared, raw, read, write
from templates import DEEPSEEK, small_folder

from nanoredi import prepare
from nanoredi.data.sequences import load_pairs
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.report.lengths import read_lengths

SYSTEM = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer(toy_data) -> Tokenizer:
    return Tokenizer(toy_data / "tokenizer")


SFT = {
    "plain pair": 0,
    "spaces and case": 0,
    "null label": 1,
    "all correct": 0,
    "first of each": 2,
    "prompt fits": 0,
    "prompt too long": 0,
    "responses fit": 0,
    "chosen too long": 0,
    "rejected too long": 0,
    "empty generation": 1,
}

PAIRS = {
    "plain pair": (0, 1),
    "spaces and case": (0, 1),
    "null label": (1, 0),
    "first of each": (2, 0),
    "prompt fits": (0, 1),
    "responses fit": (0, 1),
    "empty generation": (1, 3),
}

TOO_LONG = ("prompt too long", "chosen too long", "rejected too long")


def measured(message: list[dict]) -> int:
    return len(message[0]["content"]) + 2


def test_every_kind_of_row(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", ROWS.values())
    counts = prepared([file], tokenizer, tmp_path / "out", **LIMITS)
    assert list(counts.values()) == COUNTS

    names = list(ROWS)
    order = [names[i] for i in np.random.default_rng(42).permutation(len(names))]
    assert order != names
    sft, pairs, too_long = [], [], []
    for name in order:
        row = ROWS[name]
        answers = [[{"role": "assistant", "content": text}] for text in row["generations"] or []]
        prompt = [{"role": "user", "content": row["problem"]}]
        facts = {"original_index": names.index(name), "source": row["source"]}
        if name in SFT:
            lengths = {"prompt_tokens": measured(prompt), "response_tokens": measured(answers[SFT[name]])}
            row = {"messages": prompt + answers[SFT[name]], **facts, "generation_index": SFT[name], **lengths}
            sft.append(row)
        if name in PAIRS or name in TOO_LONG:
            good, bad = PAIRS.get(name, (0, 1))
            row = {
                **facts,
                "chosen_index": good,
                "rejected_index": bad,
                "prompt_tokens": measured(prompt),
                "chosen_tokens": measured(answers[good]),
                "rejected_tokens": measured(answers[bad]),
            }
            texts = {"prompt": prompt, "chosen": answers[good], "rejected": answers[bad]}
            pairs.append(texts | row) if name in PAIRS else too_long.append(row)
    assert read(tmp_path / "out" / "sft.jsonl") == sft
    assert read(tmp_path / "out" / "pairs.jsonl") == pairs
    assert read(tmp_path / "out" / "too_long.jsonl") == too_long
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pairs.jsonl", "sft.jsonl", "too_long.jsonl"]


def test_lengths_are_those_of_training_where_the_template_strips(tmp_path):
    """DeepSeek's template drops the thinking, but traces with long thinking are too long all the same."""
    tokenizer = Tokenizer(small_folder(tmp_path / "t", DEEPSEEK))
    traces = [f"<think>\n{'long' * n}\n</think>\n\n{n}" for n in (20, 30)]
    file = write(tmp_path / "raw.jsonl", [raw(generations=traces), raw(generations=("short", "1"))])
    prepared([file], tokenizer, tmp_path / "out")
    pairs = load_pairs(str(tmp_path / "out" / "pairs.jsonl"), tokenizer, 800, 19_000, str(tmp_path))
    assert len(pairs) == 2
    for i, row in enumerate(read(tmp_path / "out" / "pairs.jsonl")):
        lengths = [int(sequence.learned.sum()) for sequence in pairs.row(i)]
        assert [row["chosen_tokens"], row["rejected_tokens"]] == lengths
        assert row["prompt_tokens"] == int((~pairs.row(i)[0].learned).sum())
    found = read_lengths(tmp_path / "out" / "pairs.jsonl", tokenizer)
    longest = int(found["rejected"].max())
    assert longest > 120 and found["rejected"].tolist() == [
        r["rejected_tokens"] for r in read(tmp_path / "out" / "pairs.jsonl")
    ]
    for limit, kept in ((longest, 2), (longest - 1, 1)):
        counts = prepared([file], tokenizer, tmp_path / f"out-{limit}", max_response_tokens=limit)
        assert [*counts.values()][-1] == kept


def test_a_fraction_of_pairs_is_swapped(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", [raw(f"a={i}", (f"b={i}", f"c={i}1")) for i in range(40)])
    prepared([file], tokenizer, tmp_path / "plain")
    plain = read(tmp_path / "plain" / "pairs.jsonl")
    for share, number in ((0.25, 10), (1.0, 40)):
        out = tmp_path / str(share)
        prepared([file], tokenizer, out, swap=share)
        rows = read(out / "pairs.jsonl")
        assert [row.pop("swapped", False) for row in rows].count(True) == number
        back = [(row if row["chosen_index"] == 0 else exchanged(row)) for row in rows]
        assert back == plain and sum(row["chosen_index"] for row in rows) == number
        assert (out / "sft.jsonl").read_bytes() == (tmp_path / "plain" / "sft.jsonl").read_bytes()
    prepared([file], tokenizer, tmp_path / "again", swap=0.25)
    assert (tmp_path / "again" / "pairs.jsonl").read_bytes() == (tmp_path / "0.25" / "pairs.jsonl").read_bytes()


def exchanged(row: dict) -> dict:
    names = {f"chosen{end}": f"rejected{end}" for end in ("", "_index", "_tokens")}
    names |= {other: name for name, other in names.items()}
    return {name: row[names.get(name, name)] for name in row}


def test_strict_negatives_are_false_for_both_verifiers(tmp_path, tokenizer):
    rows = [
        raw("a=1", ("a", "b", "c"), (True, True, False), (True, False, False)),
        raw("a=2", ("a", "b"), (True, True), (True, False)),
        raw("a=3", ("a", "b", "c"), (True, None, False), (True, False, False)),
    ]
    for strict, found in ((False, [1, 1, 1]), (True, [2, 2])):
        out = tmp_path / str(strict)
        prepared([write(tmp_path / "raw.jsonl", rows)], tokenizer, out, strict_negatives=strict)
        assert [row["rejected_index"] for row in read(out / "pairs.jsonl")] == found


def test_generations_without_anything_to_learn_are_skipped_and_counted(tmp_path, tokenizer, capsys):
    rows = [
        raw("a=1", (" \n", "b", "", "c"), (True, True, False, False), (True,) * 4),
        raw("a=2", ("b", "b", "c"), (True, False, False), (True,) * 3),
        raw("a=3", ("b", "b")),
    ]
    prepared([write(tmp_path / "raw.jsonl", rows)], tokenizer, tmp_path / "out")
    pairs = read(tmp_path / "out" / "pairs.jsonl")
    assert sorted((row["original_index"], row["chosen_index"], row["rejected_index"]) for row in pairs) == [
        (0, 1, 3),
        (1, 0, 2),
    ]
    said = capsys.readouterr().err
    assert "2 generations are empty or white space: neither correct nor incorrect." in said
    assert "2 generations are incorrect, but have the same text as the correct one: skipped." in said


def test_a_row_that_no_tokenizer_can_encode_is_dropped_and_named(tmp_path, tokenizer, capsys):
    file = write(tmp_path / "raw.jsonl", [raw(), raw("a=\ud83d"), raw(generations=("b", "\ude00")), raw("a=2")])
    assert [*prepared([file], tokenizer, tmp_path / "out").values()][::9] == [4, 2]
    said = capsys.readouterr().err
    assert "Dropped 2 of 4 rows, whose text holds half a surrogate pair" in said
    assert "raw.jsonl, line 2; " in said and "raw.jsonl, line 3." in said


def original(rows: list[dict]) -> tuple[list, list]:
    """The raw rows that the original's scripts keep, with `datasets` for the numbering and the shuffle: (number,
    problem, generation) of SFT rows, (number, problem, chosen, rejected) of pairs before their lengths are looked at.
    Written from the description of the scripts; an empty generation is skipped, as nanoredi does on purpose."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(rows).map(lambda row, i: {"original_index": i}, with_indices=True)
    sft, pairs = [], []
    for row in dataset.shuffle(seed=42):
        valid, texts, labels = row["problem_is_valid"], row["generations"], row["correctness"]
        if not isinstance(valid, str) or valid.strip().lower() != "yes" or row["source"] == "cn_k12":
            continue
        if not row["problem"] or not texts or not labels:
            continue
        llama, math = labels["llama_verification"], labels["math_verify_reparsed_answer"]
        if llama is None or math is None or not len(llama) == len(math) == len(texts):
            continue
        right = [i for i, text in enumerate(texts) if text and llama[i] and math[i]]
        wrong = [i for i, text in enumerate(texts) if text and not (llama[i] and math[i])]
        if right:
            sft.append((row["original_index"], row["problem"], texts[right[0]]))
            if wrong:
                pairs.append((row["original_index"], row["problem"], texts[right[0]], texts[wrong[0]]))
    return sft, pairs


def test_ten_thousand_rows_as_the_original(tmp_path, tokenizer):
    rng = random.Random(0)
    rows = [defective(rng.choice([*ROWS.values()]), rng) for _ in range(10_000)]
    sft, pairs = original(rows)
    pairs = [row for row in pairs if len(row[1]) + 2 <= 8 and max(map(len, row[2:])) + 2 <= 10]
    counts = prepared([write(tmp_path / "raw.jsonl", rows)], tokenizer, tmp_path / "out", **LIMITS)
    assert [
        (row["original_index"], *(message["content"] for message in row["messages"]))
        for row in read(tmp_path / "out" / "sft.jsonl")
    ] == sft
    assert [
        (row["original_index"], *(row[side][0]["content"] for side in ("prompt", "chosen", "rejected")))
        for row in read(tmp_path / "out" / "pairs.jsonl")
    ] == pairs
    assert (counts[prepare.SFT_GATE], [*counts.values()][-1]) == (len(sft), len(pairs))
    left = list(counts.values())
    assert (
        all(after < before for before, after in zip(left, left[1:])) and len(pairs) > 200
    )  # each filter dropped some rows


def defective(row: dict, rng: random.Random) -> dict:
    """The row with random changes, some of which make it malformed."""
    row = copy.deepcopy(row)
    if row["problem"]:
        row["problem"] = f"a={rng.randrange(10 ** rng.randint(1, 5))}"
    if rng.random() < 0.5:
        row["problem_is_valid"] = rng.choice(["Yes", "yes ", "YES", "No", "Incomplete", "", None, "yes, partly"])
    if rng.random() < 0.5:
        row["source"] = rng.choice(["olympiads", "cn_k12", "CN_K12", "amc_aime", None])
    labels = row["correctness"]
    for name in labels or {}:
        if labels[name] and rng.random() < 0.5:
            labels[name] = [rng.choice([True, True, False, None]) for _ in labels[name]]
        if labels[name] and rng.random() < 0.05:
            labels[name] = rng.choice([labels[name][:-1], labels[name] + [True], [], None])
    if row["generations"] and rng.random() < 0.3:
        row["generations"][0] = rng.choice(["", "c=1", "d=12345678"])
    if rng.random() < 0.05:
        row["problem"] = rng.choice(["", None])
    return row


def test_the_seed_changes_only_the_order(tmp_path, tokenizer):
    file = write(tmp_path / "raw.jsonl", ROWS.values())
    prepared([file], tokenizer, tmp_path / "a")
    prepared([file], tokenizer, tmp_path / "b", seed=7)
    a, b = (read(tmp_path / out / "sft.jsonl") for out in "ab")
    assert a != b and sorted(map(json.dumps, a)) == sorted(map(json.dumps, b))


def test_the_paper_s_counts_are_mentioned_only_when_missed():
    gates = ["rows read", "a", prepare.SFT_GATE, "pairs"]
    missed = prepare.table(dict(zip(gates, (516_499, 300_000, 77_629, 53_174))))
    assert "not the paper's counts" in missed and "77,629 SFT traces and 53,175 pairs" in missed
    assert "paper" not in prepare.table(dict(zip(gates, (516_499, 300_000, 77_629, 53_175))))
    assert "paper" not in prepare.table(dict(zip(gates, (100_000, 300, 20, 10))))


@pytest.fixture
def sample(shared, real_tokenizer) -> tuple[Path, Tokenizer]:
    return shared / "openr1_math_raw_sample.jsonl", real_tokenizer


def test_the_real_sample(tmp_path, sample):
    file, tokenizer = sample
    rows = read(file)
    correct = [
        [
            a and b
            for a, b in zip(row["correctness"]["llama_verification"], row["correctness"]["math_verify_reparsed_answer"])
        ]
        for row in rows
    ]
    counts = prepared([file], tokenizer, tmp_path / "out")
    sft, pairs = read(tmp_path / "out" / "sft.jsonl"), read(tmp_path / "out" / "pairs.jsonl")
    assert counts["has both labels of each generation"] == len(rows) == 100
    assert len(sft) == sum(any(verdicts) for verdicts in correct)
    assert len(pairs) == sum(any(verdicts) and not all(verdicts) for verdicts in correct) == 10
    for row in sft:
        i, source = row["original_index"], rows[row["original_index"]]
        assert [m["content"] for m in row["messages"]] == [
            source["problem"],
            source["generations"][correct[i].index(True)],
        ]
    for row in pairs:
        i, source = row["original_index"], rows[row["original_index"]]
        assert row["chosen"][0]["content"] == source["generations"][correct[i].index(True)]
        assert row["rejected"][0]["content"] == source["generations"][correct[i].index(False)]


def test_lengths_are_the_originals(tmp_path, sample):
    """The limits set to the longest pair's own lengths, computed from the written-out template, keep it; one less
    drops it."""
    file, tokenizer = sample
    prepared([file], tokenizer, tmp_path / "all")
    pairs = read(tmp_path / "all" / "pairs.jsonl")

    def length(role: str, message: list[dict]) -> int:
        text = f"{SYSTEM}<|im_start|>{role}\n{message[0]['content']}<|im_end|>\n"
        return len(tokenizer.backend.encode(text, add_special_tokens=False).ids) + 1

    prompts = [length("user", pair["prompt"]) for pair in pairs]
    responses = [max(length("assistant", pair[side]) for side in ("chosen", "rejected")) for pair in pairs]
    for limits in (
        (max(prompts), max(responses)),
        (max(prompts) - 1, max(responses)),
        (max(prompts), max(responses) - 1),
    ):
        kept = [pair for pair, p, r in zip(pairs, prompts, responses) if p <= limits[0] and r <= limits[1]]
        out = tmp_path / f"{limits[0]}-{limits[1]}"
        prepared([file], tokenizer, out, max_prompt_tokens=limits[0], max_response_tokens=limits[1])
        assert read(out / "pairs.jsonl") == kept
        assert (len(kept) == len(pairs)) == (limits == (max(prompts), max(responses)))
