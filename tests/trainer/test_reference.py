"""DPO's reference log-probs: what they are, that they are computed once, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from same import assert_same_run, steps_of

from nanoredi.common.errors import UserError
from nanoredi.config import RediConfig
from nanoredi.data import sequences
from nanoredi.data.sequences import load_pairs
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer import reference
from nanoredi.trainer.distributed import shard
from nanoredi.trainer.guards import Guards
from nanoredi.trainer.loop import train
from nanoredi.trainer.reference import reference_logps


@pytest.fixture
def config(toy_data, tmp_path):
    shutil.copytree(toy_data / "model", tmp_path / "model")
    return RediConfig(
        model=str(tmp_path / "model"),
        data=str(toy_data / "pairs.jsonl"),
        out=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        objective="dpo",
        beta=0.1,
        lr=1e-3,
        batch_size=6,
        max_tokens_per_micro_batch=300,
        save_every=4,
        log_every=1,
        reshard_after_forward=False,
        dtype="float32",
    )


@pytest.fixture
def logps(config, one_rank):
    """A function that gives the reference's log-probs and their digest, as a run has them."""

    def logps(model_folder=config.model, max_prompt_tokens=800):
        model = shard(Qwen2.from_pretrained(model_folder), one_rank, torch.float32, config)
        data = load_pairs(config.data, Tokenizer(config.model), max_prompt_tokens, 19_000, config.cache)
        return reference_logps(replace(config, model=str(model_folder)), model, data, torch.float32, one_rank)

    return logps


def another_model(folder, toy_data):
    model = Qwen2.from_pretrained(toy_data / "model")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(folder)
    return folder


def test_they_are_the_sums_of_float64_log_probs(config, logps):
    got, _ = logps()
    assert got.shape == (60, 2) and got.dtype == np.float32
    model = Qwen2.from_pretrained(config.model, dtype=torch.float64)
    data = load_pairs(config.data, Tokenizer(config.model), 800, 19_000, config.cache)
    for i in range(0, 120, 7):
        tokens, learned = (torch.from_numpy(np.array(x)) for x in data.row(i // 2)[i % 2][:2])
        n = len(tokens) - 1
        with torch.no_grad():
            hidden = model(tokens[:-1].long(), torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
        lp = (hidden @ model.lm_head_weight.T).log_softmax(-1).gather(1, tokens[1:, None].long()).squeeze(1)
        assert got.reshape(-1)[i] == pytest.approx(lp[learned[1:]].sum().item(), rel=1e-5)


def test_they_are_computed_once_for_a_model_and_its_data(config, logps, toy_data, tmp_path, monkeypatch, capsys):
    first, digest = logps()
    assert "the reference's log-probs of 60 pairs: computed once" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(reference, "trace_sums", None)
        again, same = logps()
        shutil.copytree(config.model, tmp_path / "copy")
        copied, also_same = logps(tmp_path / "copy")  # it is what is in the folder that counts
    assert same == also_same == digest and (again == first).all() and (copied == first).all()
    others = [logps(another_model(tmp_path / "other", toy_data)), logps(max_prompt_tokens=5)]
    assert len({digest, *(d for _, d in others)}) == 3
    assert all(abs(other - first).max() > 0.1 for other, _ in others)
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 3


def spoil_a_byte(file, other_file):
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, other_file: shutil.copyfile(other_file, file),
        lambda file, other_file: file.write_bytes(file.read_bytes()[:100]),
        lambda file, other_file: file.write_bytes(b""),
        lambda file, other_file: reference._write(file, np.full((60, 2), np.nan, np.float32), file.stem[10:]),
        lambda file, other_file: save_file(
            {"logps": np.zeros((60, 2), np.float32)}, file, {"belongs_to": file.stem[10:]}
        ),
        spoil_a_byte,
    ],
)
def test_a_damaged_file_is_said_and_made_again(damage, logps, toy_data, tmp_path, capsys):
    want, digest = logps()
    _, other = logps(another_model(tmp_path / "other", toy_data))
    file, other_file = (tmp_path / "cache" / f"reference-{d}.safetensors" for d in (digest, other))
    damage(file, other_file)
    capsys.readouterr()
    assert (logps()[0] == want).all()
    said = capsys.readouterr().out
    assert f"warning: {file} is damaged" in said and "computed again" in said
    assert (logps()[0] == want).all() and not capsys.readouterr().out


class Broken(Exception):
    pass


def break_off_after(step, monkeypatch):
    observe = Guards.observe

    def observe_and_break(self, steps):
        observe(self, steps)
        if any(s.number == step for s, _ in steps):
            raise Broken

    monkeypatch.setattr(Guards, "observe", observe_and_break)


def test_a_run_that_was_broken_off_goes_on_bit_for_bit(config, one_rank, tmp_path, monkeypatch, toy_data):
    for name in ("run", "whole"):
        (tmp_path / name).mkdir()
    train(replace(config, out=str(tmp_path / "whole")), one_rank)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_off_after(6, patch)
        train(config, one_rank)
    # Another model under the same name is not what the run began with.
    shutil.move(config.model, tmp_path / "away")
    another_model(config.model, toy_data)
    with pytest.raises(UserError, match="the run in .* began with another model as DPO's reference"):
        train(config, one_rank)
    shutil.rmtree(config.model)
    shutil.move(tmp_path / "away", config.model)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(Path(config.data).read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="the run in .* began with other data, another tokenizer or another version"):
        train(replace(config, data=str(other)), one_rank)

    # A version that reads some rows otherwise, but none of these, goes on.
    monkeypatch.setattr(sequences, "_RULES", sequences._RULES + 1)
    train(config, one_rank)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    # It starts from the reference.
    assert steps_of(tmp_path / "run")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
