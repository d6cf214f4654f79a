"""Whole runs: what they write and say, what they refuse, and what they leave as it was."""

import errno
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from same import assert_same_weights
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from nanoredi.common.errors import Stopped, UserError
from nanoredi.config import RediConfig
from nanoredi.data.sequences import load_pairs
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer import loop
from nanoredi.trainer.distributed import World
from nanoredi.trainer.log import Log
from nanoredi.trainer.loop import train
from nanoredi.trainer.step import train_step


def test_pairs_are_watched_along_the_run(redi, one_rank, tmp_path, toy_data, capsys):
    (tmp_path / "run").mkdir()
    train(replace(redi, watch=str(toy_data / "watch.jsonl"), watch_every=2, max_steps=3), one_rank)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [("watch_chosen_logp" in row) for row in rows] == [False, True, True]
    assert [("start_chosen_logp" in row) for row in rows] == [True, False, False]
    data = load_pairs(str(toy_data / "watch.jsonl"), Tokenizer(redi.model), 800, 19_000, redi.cache)
    for folder, when, row in ((redi.model, "start", rows[0]), (tmp_path / "run" / "final", "watch", rows[-1])):
        model = Qwen2.from_pretrained(folder, dtype=torch.float64)
        for place, side in enumerate(("chosen", "rejected")):
            means = []
            for i in range(len(data)):
                tokens, learned = (torch.from_numpy(np.array(x)) for x in data.row(i)[place][:2])
                n = len(tokens) - 1
                hidden = model(tokens[:-1].long(), torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
                lp = (hidden @ model.lm_head_weight.T).log_softmax(-1)[learned[1:]]
                of_targets = lp.gather(1, tokens[1:][learned[1:], None].long())
                means.append((of_targets.mean().item(), torch.special.entr(lp.exp()).sum(1).mean().item()))
            got = row[f"{when}_{side}_logp"], row[f"{when}_{side}_entropy"]
            assert got == pytest.approx(np.mean(means, axis=0), rel=1e-4)
    said = capsys.readouterr().out
    assert "watched pairs before step 1: chosen -" in said and "watched pairs after step 2: chosen -" in said


def test_a_run_s_files(redi, one_rank, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    train(replace(redi, save_every=2, log_every=2), one_rank)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == {
        "step",
        "epoch",
        "loss",
        "chosen_logp",
        "rejected_logp",
        "margin",
        "chosen_entropy",
        "rejected_entropy",
        "grad_norm",
        "update_norm",
        "lr",
        "tokens_per_s",
        "peak_memory_gb",
        "matrix_share",
    }
    for row in rows:
        assert row["loss"] == pytest.approx(-row["chosen_logp"] + 0.8 * row["rejected_logp"])
        assert row["margin"] == pytest.approx(row["chosen_logp"] - row["rejected_logp"])
    assert rows[-1]["epoch"] == 1.0 and rows[0]["lr"] == 1e-3
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["final", "metrics.jsonl", "step-000002"]
    trained, start = Qwen2.from_pretrained(tmp_path / "run" / "final"), Qwen2.from_pretrained(redi.model)
    assert not torch.equal(trained.lm_head_weight, start.lm_head_weight)
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("step"))
    assert lines[head].split() == ["step", "loss", "chosen", "rejected", "grad", "update", "lr", "tok/s", "left"]
    steps = lines[head + 1 : head + 4]
    assert [line.split()[0] for line in steps] == ["1/4", "2/4", "4/4"]
    for line, row in zip(steps, (rows[0], rows[1], rows[3])):
        assert [float(x) for x in line.split()[1:4]] == pytest.approx(
            [row[name] for name in ("loss", "chosen_logp", "rejected_logp")], abs=6e-5
        )
        assert len(line) == len(lines[head])


def test_a_step_fits_a_terminal_of_80_columns(one_rank, tmp_path):
    config = RediConfig(out=str(tmp_path), log_every=1)
    log = Log(config, 0, 99_999, 1e9, one_rank, False)
    row = dict.fromkeys(("loss", "chosen_logp", "rejected_logp"), -9.87654)
    row |= {"step": 99_998, "grad_norm": None, "update_norm": 1e-9, "lr": 1e-6, "tokens_per_s": 999_999.0}
    log.last = log.start + 99 * 3600 * 99_998
    for line in log._lines(row):
        assert len(line) <= 80 and len(line.split()) == 9


def test_how_to_ask_for_the_status_is_said_once_that_is_heard(redi, one_rank, monkeypatch):
    Path(redi.out).mkdir()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    heard = []

    def say(self, text):
        if "kill -USR1" in text:
            heard.append(signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL)

    monkeypatch.setattr(World, "say", say)
    train(replace(redi, max_steps=1), one_rank)
    assert heard == [True]


def test_a_disk_that_fills_up_under_the_log_loses_no_state(redi, one_rank, monkeypatch):
    """The state that was being written when a row of metrics.jsonl found no room is finished."""
    Path(redi.out).mkdir()
    write, save_state = HuggingFaceStorageWriter.write_data, loop._Run.save_state
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", lambda *args: (time.sleep(0.5), write(*args))[1])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_and_fill(self, step):
        save_state(self, step)
        monkeypatch.setattr("nanoredi.trainer.log.write_row", full)

    monkeypatch.setattr(loop._Run, "save_state", save_and_fill)
    with pytest.raises(UserError, match="No space left"):
        train(replace(redi, save_every=1, log_every=1), one_rank)
    assert [path.name for path in Path(redi.out, "state").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("name, max_steps", [("final", 2), ("step-000002", 3)])
def test_a_save_that_fails_loses_nothing(name, max_steps, redi, one_rank, tmp_path, monkeypatch):
    """What was trained is in the state, from which the same command saves it."""
    config = replace(redi, max_steps=max_steps, save_every=2)
    (tmp_path / "run").mkdir()

    def full(self, folder, dtype):
        raise UserError(f"cannot write {folder}: No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Qwen2, "save_pretrained", full)
        with pytest.raises(
            UserError, match=f"cannot write .*{name}: No space .*; the state of step 2 is saved, the same"
        ):
            train(config, one_rank)
    assert not (tmp_path / "run" / name).exists()
    steps = iter(range(max_steps - 2))  # the first two are not trained again
    monkeypatch.setattr("nanoredi.trainer.loop.train_step", lambda *args: (next(steps), train_step(*args))[1])
    train(config, one_rank)
    again = replace(config, out=str(tmp_path / "again"))
    (tmp_path / "again").mkdir()
    monkeypatch.undo()
    train(again, one_rank)
    assert_same_weights(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "run" / name / "model.safetensors").exists()


def test_weights_that_were_removed_to_save_space_are_not_missed(redi, one_rank, tmp_path, monkeypatch):
    config = replace(redi, max_steps=3, save_every=2)
    (tmp_path / "run").mkdir()
    steps = iter((train_step, train_step))
    with monkeypatch.context() as killed:
        killed.setattr(loop, "train_step", lambda *args: next(steps)(*args))
        with pytest.raises(StopIteration):
            train(config, one_rank)
    (tmp_path / "run" / "step-000002" / "model.safetensors").unlink()
    train(config, one_rank)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_stop_during_the_last_save_comes_after_it(redi, one_rank, tmp_path, monkeypatch):
    save = Qwen2.save_pretrained
    monkeypatch.setattr(Qwen2, "save_pretrained", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), save(*args))[1])
    (tmp_path / "run").mkdir()
    with pytest.raises(Stopped, match="stage 2 was asked to stop, and is finished"):
        train(replace(redi, max_steps=1), one_rank)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["final", "metrics.jsonl"]


@pytest.mark.parametrize("objective, alpha", [("redi", 0.0), ("sft", None)])
def test_what_would_learn_nothing_is_refused(objective, alpha, redi, one_rank, toy_data, tmp_path):
    rows = [json.loads(line) | {"chosen_weight": 0} for line in (toy_data / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "zeros.jsonl").write_text("\n".join(map(json.dumps, rows)))
    weight = 1.0 if objective == "redi" else None
    more = {"objective": objective, "alpha": alpha, "chosen_weight": weight, "neg_weight_gamma": weight and 0.0}
    config = replace(redi, data=str(tmp_path / "zeros.jsonl"), **more)
    with pytest.raises(UserError, match="zeros.jsonl: every row's weight is 0, so nothing would be learned"):
        train(config, one_rank)
    if objective == "redi":
        loop._Run(replace(config, alpha=0.8), one_rank)
        with pytest.raises(UserError, match="alpha and chosen_weight are both 0, so nothing would be learned"):
            replace(config, chosen_weight=0.0)


def test_data_that_does_not_fit_the_model_is_refused(redi, one_rank, toy_data, tmp_path):
    with pytest.raises(
        UserError, match="the longest sequence has .* tokens, the model's context 16; raise max_position_embeddings"
    ):
        train(replace(redi, max_position_embeddings=16), one_rank)
    with pytest.raises(UserError, match="--data"):
        train(replace(redi, data=""), one_rank)
    # What is wrong with the watched pairs is said before the first step, though they may be wanted at the end alone.
    with pytest.raises(UserError, match="sft.jsonl, line 1 has no field 'chosen'"):
        loop._Run(replace(redi, watch=str(toy_data / "sft.jsonl")), one_rank)
    (tmp_path / "other" / "final").mkdir(parents=True)
    for name in ("config.toml", "final/config.json"):
        (tmp_path / "other" / name).touch()
    with pytest.raises(UserError, match="other is not a model's folder: give .*other/final"):
        loop._Run(replace(redi, model=str(tmp_path / "other")), one_rank)


def test_no_share_is_above_one(redi, one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr("nanoredi.trainer.loop.matrix_rate", lambda dtype, device: 1.0)
    (tmp_path / "run").mkdir()
    train(replace(redi, log_every=1), one_rank)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["matrix_share"] == 1.0 and all(0 < row["matrix_share"] <= 1 for row in rows)


def test_the_start_s_files_are_not_touched_by_training(redi, one_rank, toy_data, tmp_path):
    # With one rank and fp32 files the masters begin as the mapped file itself.
    path, before = toy_data / "model" / "model.safetensors", (toy_data / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run").mkdir()
    train(replace(redi, max_steps=2), one_rank)
    assert path.read_bytes() == before
