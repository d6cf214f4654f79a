"""A run's own files by mutation: its state, its caches, its metrics, its recipe, its models. The same command goes on from what
is whole, to the same bytes, or ends in one sentence."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from mutation import break_file, broken, end, limits, mutated, snapshot
from safetensors.numpy import load_file, save_file

import train_redi
from nanoredi.common.disk import digest
from nanoredi.common.errors import UserError
from nanoredi.trainer import state
from nanoredi.trainer.guards import Guards

COMMAND = """--model model --data pairs.jsonl --watch watch.jsonl --watch_every 1 --out out --cache cache --objective dpo
    --epochs 2 --batch_size 2 --save_every 1 --log_every 1 --dtype float32""".split()
COUNTS = {"state": 20, "cache": 20, "others": 12}


@pytest.fixture
def stopped(tmp_path, toy_data, hasty, monkeypatch) -> Path:
    """A folder with a run that broke off after two of its four steps; whole/ has it from beginning to end."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_data / "model", "model")
    for name in ("pairs", "watch"):
        lines = (toy_data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        Path(f"{name}.jsonl").write_text("".join(lines[:4]))
    train_redi.main(COMMAND)
    Path("out").rename("whole")

    def observe(self, steps, observe=Guards.observe):
        observe(self, steps)
        if any(step.number == 3 for step, _ in steps):
            raise UserError("stopped")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped"):
        patch.setattr(Guards, "observe", observe)
        train_redi.main(COMMAND)
    return tmp_path


def break_state(folder: Path, rng: random.Random) -> bool:
    """Mutate one of the states, now and then with a digest that fits. Returns whether that can be seen."""
    step = rng.choice(sorted(folder.glob("out/state/step-*")))
    path = step / "state.json"
    way = rng.random()
    if way < 0.4:
        kept = json.loads(path.read_text())
        kept = {**kept, "notes": mutated(kept["notes"], rng)} if rng.random() < 0.7 else mutated(kept, rng)
        if isinstance(kept, dict) and {"step", "notes", "files"} <= kept.keys():
            kept["digest"] = state._digest_of(kept)
        path.write_text(json.dumps(kept))
        return False
    if way < 0.5:
        (shutil.rmtree if rng.random() < 0.5 else lambda p: p.rename(p.with_name("step-000009")))(step)
        return False
    file = rng.choice(sorted(step.iterdir()))
    if way < 0.6:
        file.unlink()
        file.mkdir() if rng.random() < 0.5 else None
    elif way < 0.7:
        (step / rng.choice(["x", "shard.safetensors", "state.json.more"])).write_bytes(b"{}")
    elif way < 0.8 and file != path:
        weights = load_file(file)
        name = rng.choice(sorted(weights))
        weights[name] = weights[name].astype(np.int64) if rng.random() < 0.5 else weights[name][:1]
        save_file(weights, file)
    else:
        break_file(file, rng)
    return True


def break_cache(folder: Path, rng: random.Random) -> bool:
    """Mutate a file of the token caches or the reference's, now and then with digests that fit."""
    file = rng.choice([path for path in sorted(folder.glob("cache/**/*")) if path.is_file()])
    way = rng.random()
    if file.suffix == ".safetensors":
        about = digest(b"no") if way < 0.3 else file.stem.removeprefix("reference-")
        logps = rng.choice(
            [np.full((4, 2), np.nan, np.float32), np.zeros((3, 2), np.float32), np.zeros((4, 2), np.int32)]
        )
        if way < 0.6:
            save_file({"logps": logps}, file, metadata={"belongs_to": about, "digest": digest(logps.tobytes())})
            return False
        file.write_bytes(broken(file.read_bytes(), rng))
        return True
    if way < 0.1:
        file.unlink()
        return True
    if way < 0.5:
        break_file(file, rng)
        whole = file.parent / "whole.json"
        if file != whole and file.exists():
            about = json.loads(whole.read_text())
            about["digests"][file.name] = digest(file)
            whole.write_text(json.dumps(about))
        return False
    file.write_bytes(broken(file.read_bytes(), rng))
    return True


def break_others(folder: Path, rng: random.Random) -> bool:
    """Mutate metrics.jsonl, config.toml, a model on the way, or put something where the final one will be."""
    way = rng.random()
    if way < 0.3:
        break_file(folder / "out/metrics.jsonl", rng, ("loss", "chosen_logp", "epoch"))
    elif way < 0.5:
        break_file(folder / "out/config.toml", rng)
    elif way < 0.8:
        break_file(rng.choice(sorted(folder.glob("out/step-*/*"))), rng)
    elif way < 0.9:
        (folder / "out/final").write_bytes(b"") if rng.random() < 0.5 else (folder / "out/final").mkdir()
    else:
        shutil.rmtree(folder / "out/state")
        break_file(folder / "out/step-000001/config.json", rng)
    return False


@pytest.mark.parametrize("what", COUNTS)
def test_a_run_goes_on_from_what_is_whole(what, share, stopped, tmp_path, capsys, monkeypatch):
    rng, ends = random.Random(what), []
    given = {
        path: content for path, content in snapshot(stopped).items() if "/out/" not in path and "/cache/" not in path
    }
    final = (stopped / "whole/final/model.safetensors").read_bytes()
    for number in range(share * COUNTS[what]):
        place = stopped / "tried"
        for name in ("out", "cache"):
            shutil.copytree(stopped / name, place / name)
        for name in ("model", "pairs.jsonl", "watch.jsonl"):
            (place / name).symlink_to(stopped / name)
        monkeypatch.chdir(place)
        can_be_seen = globals()[f"break_{what}"](place, rng)
        try:
            with limits():
                ends.append(end(lambda: train_redi.main(COMMAND)))
            if not ends[-1]:
                assert (place / "out/final/model.safetensors").read_bytes() == final or not can_be_seen
                steps = [json.loads(line)["step"] for line in (place / "out/metrics.jsonl").read_text().splitlines()]
                assert steps == sorted(set(steps)) and steps[-2:] == [3, 4]
                assert not (place / "out/state").exists()
        except BaseException as error:
            error.add_note(f"{what} {number}: {capsys.readouterr().out[-2000:]}")
            raise
        assert not can_be_seen or not ends[-1], ends[-1]
        capsys.readouterr()
        shutil.rmtree(place)
        assert given.items() <= snapshot(stopped).items()
    refused = [text for text in ends if text]
    print(f"{what}: {len(ends)} tried, {len(refused)} ended in a sentence")
