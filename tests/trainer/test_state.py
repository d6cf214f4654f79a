"""Going on: after a kill, a signal, a full disk, with damaged states, and on another number of ranks."""

import errno
import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from forks import Job, ended
from safetensors.torch import load_file
from same import assert_same_run, steps_of
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from nanoredi.common.disk import path_beside
from nanoredi.common.errors import Stopped, UserError
from nanoredi.config import SftConfig
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.distributed import local, shard
from nanoredi.trainer.guards import Guards
from nanoredi.trainer.log import drop_steps_after
from nanoredi.trainer.optimizer import AdamW
from nanoredi.trainer.state import States, resume, training_tensors


@pytest.fixture
def flags(toy_data) -> list[str]:
    """Stage 2 at a small size, 24 steps."""
    words = (
        "--recipe toy --epochs 3 --batch_size 8 --evaluate false --save_every 5 --log_every 3 --lr 1e-3 --dtype float32"
    )
    return [*words.split(), "--model", str(toy_data / "model"), "--data", str(toy_data / "pairs.jsonl")]


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_weights(kills, flags, forks, tmp_path):
    """One run undisturbed, and others that are killed and started again, until so many kills have struck."""
    rng = random.Random(0)

    def start(number: int) -> Job:
        return forks.start(tmp_path, "train_redi.py", *flags, "--out", f"run/{number}", OMP_NUM_THREADS="1")

    def end(job: Job) -> None:
        assert ended(job).returncode == 0, job.stderr

    begin = time.monotonic()
    end(start(0))
    whole = time.monotonic() - begin
    struck, number = 0, 1
    while struck < kills:
        job = start(number)
        time.sleep(rng.uniform(0.0, 0.8 * whole))
        job.kill()
        assert ended(job).returncode in (0, -signal.SIGKILL), job.stderr
        struck += job.returncode != 0
        if (tmp_path / "run" / str(number) / "final").exists():
            end(start(number))  # it may have been struck after that, with its states still there
            number += 1
    end(start(number))
    first, *others = sorted((tmp_path / "run").iterdir(), key=lambda path: int(path.name))
    assert [row["step"] for row in steps_of(first)] == list(range(1, 25))
    assert others
    for other in others:
        assert_same_run(first, other, tolerance=0.0)  # wherever the tests run, these ran on the CPU
    names = sorted(path.name for path in first.iterdir())
    assert names == [".lock", "config.toml", "final", "metrics.jsonl", *(f"step-{i:06d}" for i in (5, 10, 15, 20))]
    assert all(sorted(path.name for path in other.iterdir()) == names for other in others)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_signals_to_stop_save_and_sigusr1_prints_the_status(number, code, flags, forks, tmp_path):
    """In the middle of a run; what it says names the step that is saved."""
    job = forks.start(tmp_path, "train_redi.py", *flags, "--epochs", "40", "--out", "run", OMP_NUM_THREADS="1")
    job.wait_for(lambda: "\n  9/" in job.stdout)
    job.kill(signal.SIGUSR1)
    job.wait_for(lambda: "left\n" in job.stderr)
    job.kill(number)
    run = ended(job)
    assert run.returncode == code
    assert ("Ctrl-C again ends at once" in run.stderr) == (number == signal.SIGINT)
    assert "stage 2, 0:0" in run.stderr
    last = steps_of(tmp_path / "run")[-1]["step"]
    assert f"stage 2 was asked to stop: step {last} is saved, the same command resumes" in run.stdout
    assert sorted(p.name for p in (tmp_path / "run" / "state").iterdir())[-1] == f"step-{last:06d}"


@pytest.mark.parametrize("ranks, shard_size", [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on(ranks, shard_size, flags, run, tmp_path):
    """Nine steps on one rank, the rest on several, with two copies of the weights; against all of it on one."""
    whole = run("train_redi.py", *flags, "--out", "whole", gpus=ranks)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("final", "step-000010", "step-000015", "step-000020"):
        shutil.rmtree(tmp_path / "part" / name)
    # What the run looked like after step 9: its state is a run's that was stopped there.
    stopped = run("tests/stop_at.py", "9", *flags, "--out", "stopped", gpus=ranks)
    assert stopped.returncode == 0, stopped.stderr
    shutil.copytree(tmp_path / "stopped" / "state", tmp_path / "part" / "state")
    done = run("train_redi.py", *flags, "--out", "part", "--shard_size", shard_size, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 9" in done.stdout
    want, got = steps_of(tmp_path / "whole"), steps_of(tmp_path / "part")
    assert [row["step"] for row in got] == list(range(1, 25))
    for a, b in zip(want, got):
        for key in ("loss", "chosen_logp", "rejected_logp", "grad_norm", "update_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4)
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "part"))
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], rtol=1e-3, atol=1e-4)


def of_today(folder):
    """As it is."""


def of_28_november(folder):
    (folder / "notes.json").write_text("[]")
    (folder / "whole.json").unlink()
    (folder / "weights").unlink()
    np.save(folder / "offsets.npy", np.fromfile(folder / "offsets", np.int64))
    (folder / "offsets").unlink()


@pytest.mark.parametrize("cache", [of_today, of_28_november])
def test_a_run_of_a_former_version_is_resumed(cache, flags, run, tmp_path):
    """Such a state named the folder of its sequences, and had no digest and no dtype at first."""
    for script, out in ((("train_redi.py",), "whole"), (("tests/stop_at.py", "9"), "stopped")):
        done = run(*script, *flags, "--out", out)
        assert done.returncode == 0, done.stderr
    state = tmp_path / "stopped" / "state"
    shutil.rmtree(state / "step-000005")
    path = state / "step-000009" / "state.json"
    kept = json.loads(path.read_text())
    del kept["digest"]
    kept["notes"]["began_with"] = {"data": "of-then"}
    path.write_text(json.dumps(kept))
    (folder,) = (tmp_path / "runs" / "cache").glob("*")
    then = folder.with_name("of-then")
    for damage in (lambda: None, lambda: (then.mkdir(), (then / "offsets.npy").touch())):  # as a full disk leaves it
        damage()
        refused = run("train_redi.py", *flags, "--out", "stopped")
        assert refused.returncode == 2 and "began with other data, another tokenizer or another" in refused.stderr
    shutil.rmtree(then)
    cache(shutil.copytree(folder, then))
    done = run("train_redi.py", *flags, "--out", "stopped")
    assert done.returncode == 0 and "resuming after step 9" in done.stdout, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", tolerance=0.0)


@pytest.fixture
def states(toy_data, one_rank, tmp_path):
    """A model's tensors, and its states at steps 5, 10 and 15."""
    model = shard(Qwen2.from_pretrained(toy_data / "model"), one_rank, torch.float32, SftConfig())
    tensors = training_tensors(model, AdamW(model, 1e-3, 0.0))
    states = States(tmp_path / "state", one_rank)
    for step in (5, 10, 15):
        for t in tensors.values():
            local(t).fill_(float(step))
        states.save(step, tensors, {"skipped": 0, "said": f"at {step}"})
        for t in tensors.values():
            local(t).fill_(-1.0)  # the training goes on at once
    states.wait()
    return tensors, tmp_path / "state", one_rank


def test_two_states_are_kept_and_the_newest_is_loaded(states):
    tensors, folder, world = states
    assert sorted(path.name for path in folder.iterdir()) == ["step-000010", "step-000015"]
    assert States(folder, world).load(tensors) == {"step": 15, "skipped": 0, "said": "at 15"}
    assert all((local(t) == 15).all() for t in tensors.values())
    assert not list(folder.rglob("*.pkl")) and not list(folder.rglob(".metadata"))


def test_a_state_has_the_notes_of_its_step(states):
    tensors, folder, world = states
    later, notes = States(folder, world), {"falls": [0.1]}
    later.save(20, tensors, notes)
    notes["falls"].append(0.2)  # the guards go on, too
    later.wait()
    assert States(folder, world).load(tensors) == {"step": 20, "falls": [0.1]}


def test_the_millionth_state_is_the_newest(states):
    tensors, folder, world = states
    (folder / "step-²").mkdir()  # not a number, though a digit
    later = States(folder, world)
    for step in (999_999, 1_000_000):
        later.save(step, tensors, {})
    later.wait()
    assert States(folder, world).load(tensors) == {"step": 1_000_000}


def test_a_state_is_put_together_a_part_at_a_time(states):
    """A file is in memory as a whole before it is written."""
    sizes = [path.stat().st_size for path in (states[1] / "step-000015").glob("*.safetensors")]
    assert max(sizes) < sum(sizes) / 4


def spoil_a_byte(folder):
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def cut(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        spoil_a_byte,
        cut,
        lambda folder: next(folder.glob("*.safetensors")).unlink(),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: folder.rename(path_beside(folder)),
        lambda folder: edit_notes(folder, step=99),
        lambda folder: edit_notes(folder, notes={"skipped": "many"}),
        lambda folder: edit_notes(folder, files=[]),
        lambda folder: edit_notes(folder, digest=None),
        lambda folder: shutil.copy(next(folder.glob("*.safetensors")), folder / "shard-9.safetensors"),
        lambda folder: (folder / "state.json").write_text("[" * 10**5),
    ],
)
def test_a_damaged_state_is_said_and_the_one_before_it_used(states, damage, capsys):
    tensors, folder, world = states
    damage(folder / "step-000015")
    assert States(folder, world).load(tensors)["step"] == 10
    assert all((local(t) == 10).all() for t in tensors.values())
    said = capsys.readouterr().out
    assert "step-000015 is damaged" in said or not (folder / "step-000015").exists()
    # The run comes to step 15 again, and saves it.
    again = States(folder, world)
    again.save(15, tensors, {"skipped": 0})
    again.wait()
    assert States(folder, world).load(tensors)["step"] == 15
    if said:
        assert "it is kept as step-000015.damaged-1" in said and (folder / "step-000015.damaged-1").exists()
    damage(folder / "step-000010")
    damage(folder / "step-000015")
    for _ in range(2):  # given again, the same command does not begin again either
        if said:
            with pytest.raises(UserError, match=f"no state is whole: move {folder} away to begin again"):
                States(folder, world).load(tensors)
        else:
            assert States(folder, world).load(tensors) is None


def edit_notes(folder, **changes):
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_state_of_another_model_is_refused(states):
    tensors, folder, world = states
    with pytest.raises(UserError, match="the training state .*step-000015 is not this model's"):
        States(folder, world).load({**tensors, "weight.other": next(iter(tensors.values()))})
    name, *others = tensors
    with pytest.raises(UserError, match=f"step-000015 is not this model's: it also has {name}"):
        States(folder, world).load({other: tensors[other] for other in others})


def test_a_full_disk_ends_with_a_word_and_the_last_state_whole(states):
    """A limit on the size of files stands in for the disk."""
    tensors, folder, world = states
    states = States(folder, world)
    states.load(tensors)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        states.save(20, tensors, {"skipped": 0})
        with pytest.raises(
            UserError, match="cannot save the training state in .*: File too large; the last whole one is step 15"
        ):
            states.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000010", "step-000015"]
    assert States(folder, world).load(tensors)["step"] == 15


def test_an_old_state_that_cannot_be_removed_ends_no_run(states, monkeypatch):
    tensors, folder, world = states

    def busy(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")  # as on NFS while somebody reads a file of it

    monkeypatch.setattr("nanoredi.trainer.state.remove", busy)
    states = States(folder, world)
    states.save(20, tensors, {"skipped": 0})
    states.wait()
    assert States(folder, world).load(tensors)["step"] == 20


@pytest.mark.parametrize("end", [UserError, Stopped, RuntimeError])
def test_a_run_that_ends_early_waits_for_the_state_being_written(end, states, monkeypatch):
    tensors, folder, world = states
    write = HuggingFaceStorageWriter.write_data
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", lambda *args: (time.sleep(0.5), write(*args))[1])
    states = States(folder, world)
    with pytest.raises(end), states:
        states.save(20, tensors, {"skipped": 0})
        raise end("now")
    assert sorted(path.name for path in folder.iterdir()) == ["step-000015", "step-000020"]


@pytest.fixture
def full_disk(monkeypatch):
    def write_data(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)


def test_why_a_run_ends_is_said_even_if_its_state_cannot_be_saved(states, full_disk):
    tensors, folder, world = states
    states = States(folder, world)
    with pytest.raises(UserError, match="^COLLAPSE; cannot save the training state in .*: No space left on device"):
        with states:
            states.save(20, tensors, {"skipped": 0})
            raise UserError("COLLAPSE")


def test_a_state_that_cannot_be_saved_fails_no_finished_run(states, full_disk):
    tensors, folder, world = states
    states = States(folder, world)
    states.save(20, tensors, {"skipped": 0})
    states.drop()
    assert not folder.exists()


def test_metrics_lose_the_steps_that_come_again(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    drop_steps_after(path, 3)
    assert not path.exists()
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 6)) + '{"ste')
    drop_steps_after(path, 5)
    assert [row["step"] for row in steps_of(tmp_path)] == [1, 2, 3, 4, 5]
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n{"step": "4"}\n{"step": 5}\n')
    drop_steps_after(path, 3)
    assert [row["step"] for row in steps_of(tmp_path)] == [1, 3]
    said = capsys.readouterr().out
    assert "line 2 is not JSON" in said and "line 4: step is '4'" in said and said.count("this row is left out") == 2


def test_a_run_without_its_states_says_that_it_begins_again(one_rank, tmp_path, capsys):
    model = Qwen2(tiny.tiny_model(tied=True).config)
    rest = model, AdamW(model, 1e-3, 0.0), Guards(SftConfig(), one_rank), {}, "cache"
    for text in ("", f"no state in {tmp_path / 'state'}: beginning again at step 1; saved models stay as they are\n"):
        assert resume(States(tmp_path / "state", one_rank), *rest) == 0
        assert capsys.readouterr().out == text
        (tmp_path / "metrics.jsonl").touch()


def test_a_resume_in_another_dtype_is_refused(one_rank):
    class Kept:
        folder, world = Path("run/state"), one_rank
        began_with = {"sequences": "s", "dtype": "float32"}

        def load(self, tensors):
            return {"step": 2, "skipped": 0, "began_with": self.began_with, **Guards(SftConfig(), one_rank).state()}

    model = Qwen2(tiny.tiny_model(tied=True).config)
    rest = Kept(), model, AdamW(model, 1e-3, 0.0), Guards(SftConfig(), one_rank)
    with pytest.raises(UserError, match="the run in run began with --dtype float32, not bfloat16: give another --out"):
        resume(*rest, {"sequences": "s", "dtype": "bfloat16"}, "cache")
    assert resume(*rest, {"sequences": "s", "dtype": "float32"}, "cache") == 2
