"""The guards: skipped steps, collapse, and ranks that die."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forks import ended
from same import assert_same_weights

from nanoredi.common.errors import Stopped, UserError
from nanoredi.config import RediConfig
from nanoredi.model import qwen2 as model_file
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.guards import CollapseWatch, Guards, signals
from nanoredi.trainer.heartbeat import Heartbeat
from nanoredi.trainer.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(toy_data, tmp_path):
    (tmp_path / "run").mkdir()
    return RediConfig(
        model=str(toy_data / "model"),
        data=str(toy_data / "pairs.jsonl"),
        out=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        batch_size=6,
        max_steps=8,
        lr=1e-3,
        dtype="float32",
        log_every=3,
        save_every=0,
    )


def spoil_the_loss(monkeypatch, bad_steps, factor):
    """Multiply the weights of some steps' losses (one micro-batch each) by a factor, and with them the gradients."""
    calls = []
    plain = model_file.weighted_cross_entropy

    def spoiled(hidden, lm_head, targets, weights, *rows):
        calls.append(1)
        return plain(hidden, lm_head, targets, weights * (factor if len(calls) in bad_steps else 1.0), *rows)

    monkeypatch.setattr(model_file, "weighted_cross_entropy", spoiled)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("bad_steps", [{1}, {2, 3, 7}])
def test_a_step_that_is_not_finite_is_skipped_and_said(bad_steps, factor, config, one_rank, monkeypatch, capsys):
    spoil_the_loss(monkeypatch, bad_steps, factor)
    train(config, one_rank)
    rows = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows if row.get("skipped")} == bad_steps
    for row in rows:
        bad = row["step"] in bad_steps
        assert (row["grad_norm"] is None) == bad and (row["update_norm"] == 0.0) == bad
    said = capsys.readouterr().out
    order = np.random.default_rng((42, 0)).permutation(60)
    for count, step in enumerate(sorted(bad_steps), 1):
        numbers = ", ".join(str(i + 1) for i in sorted(order[6 * (step - 1) : 6 * step]))
        assert (
            f"step {step} was skipped" in said
            and f"(skipped so far: {count}); it had rows {numbers} of those kept" in said
        )
    assert all(p.isfinite().all() for p in Qwen2.from_pretrained(Path(config.out, "final")).parameters())


def test_an_entropy_that_is_not_finite_skips_nothing(config, one_rank, monkeypatch):
    plain = model_file.weighted_cross_entropy

    def spoiled(*args):
        result = plain(*args)
        args[-1].fill_(math.nan)
        return result

    monkeypatch.setattr(model_file, "weighted_cross_entropy", spoiled)
    train(replace(config, max_steps=1), one_rank)
    (row,) = (json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines())
    assert row["chosen_entropy"] is None and row["update_norm"] > 0 and "skipped" not in row


def test_a_skipped_step_leaves_no_trace(config, one_rank, monkeypatch, tmp_path):
    """Seven good steps and a bad one in between move the weights as the seven do; rates as of the eight."""
    monkeypatch.setattr("nanoredi.trainer.loop.schedule", lambda *_: 1.0)
    steps = iter([0, 1, 2, 2, 3, 4, 5, 6])
    monkeypatch.setattr("nanoredi.trainer.loop.step_rows", lambda *_: np.arange(6) + 6 * next(steps))
    with monkeypatch.context() as here:
        spoil_the_loss(here, {3}, math.nan)
        train(config, one_rank)
    steps = iter([0, 1, 2, 3, 4, 5, 6])
    (tmp_path / "good").mkdir()
    train(replace(config, out=str(tmp_path / "good"), max_steps=7), one_rank)
    assert_same_weights(Path(config.out), tmp_path / "good")


def test_a_run_that_skipped_a_step_goes_on_as_if_undisturbed(config, one_rank, monkeypatch, tmp_path):
    (tmp_path / "stopped").mkdir()
    stopped = replace(config, out=str(tmp_path / "stopped"))
    spoil_the_loss(monkeypatch, {3}, math.nan)
    train(config, one_rank)
    with monkeypatch.context() as here:
        spoil_the_loss(here, {3}, math.nan)
        spoiled, calls = model_file.weighted_cross_entropy, iter(range(1, 9))
        here.setattr(
            model_file,
            "weighted_cross_entropy",
            lambda *args: (next(calls) == 5 and os.kill(os.getpid(), signal.SIGTERM), spoiled(*args))[1],
        )
        with pytest.raises(Stopped, match="step 5 is saved"):
            train(stopped, one_rank)
    train(stopped, one_rank)  # the third step is behind it, and the spoiler is at its ninth call
    assert_same_weights(Path(config.out), Path(stopped.out))


def test_too_many_in_a_row_end_the_run(config, one_rank, monkeypatch):
    spoil_the_loss(monkeypatch, {3, 4, 5, 6}, math.nan)
    with pytest.raises(
        UserError, match="3 steps in a row, the last of them 5, had a loss or gradient that is not finite"
    ):
        train(replace(config, max_bad_steps=3), one_rank)


def watch(chosen, updates, nats=1.0):
    guard = CollapseWatch(nats)
    trips = [step for step, pair in enumerate(zip(chosen, updates), 1) if guard.observe(step, *pair)]
    return trips, guard


def test_collapse_is_seen_once_and_a_slow_decline_is_not():
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.standard_normal(200)
    steps = np.arange(200)
    plunge = -0.2 - np.where(steps > 100, 0.002 * (steps - 100.0) ** 2, 0) + noise
    updates = 0.1 + np.where(steps > 100, 0.01 * (steps - 100), 0)
    trips, guard = watch(plunge, updates)
    assert len(trips) == 1 and 120 < trips[0] < 127 and 100 < guard.last_good < trips[0]
    slow = -0.2 - 0.01 * steps + noise  # 2 nats down in the end, at one pace
    assert not watch(slow, np.linspace(0.1, 0.0, 200))[0]
    assert not watch(plunge, np.linspace(0.1, 0.0, 200))[0]  # the updates are past their peak
    assert not watch(plunge, updates, nats=100.0)[0]


def test_collapse_s_statistics_go_on():
    rng = np.random.default_rng(0)
    series = [(float(c), float(u)) for c, u in zip(-np.cumsum(rng.random(60)) / 10, rng.random(60).cumsum())]
    _, whole = watch(*zip(*series))
    _, first = watch(*zip(*series[:25]))
    stopped, resumed = (Guards(RediConfig(collapse_nats=1.0), None) for _ in range(2))
    stopped.collapse = first
    first.falls += [9.0, 9.0]  # of later steps, as earlier versions saved them
    resumed.restore({"step": 25, "began_with": {}, **json.loads(json.dumps(stopped.state()))})
    for step, pair in enumerate(series[25:], 26):
        resumed.collapse.observe(step, *pair)
    assert vars(resumed.collapse) == vars(whole)


def test_collapse_stops_the_run_where_it_is_told_to(config, one_rank):
    wild = replace(config, max_steps=0, epochs=6, alpha=3.0, lr=0.02, log_every=1, save_every=10)
    with pytest.raises(UserError, match=r"COLLAPSE at step \d+: .* all was well; the last model saved by then is .*"):
        train(replace(wild, on_collapse="stop"), one_rank)


@pytest.mark.parametrize("sent", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_ctrl_c_ends_at_once(sent, one_rank):
    child = os.fork()
    if not child:
        with signals(lambda: "", one_rank):
            for number in sent:
                os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -sent[1]


def test_a_ctrl_c_that_a_launcher_passes_on_is_one(one_rank):
    child = os.fork()
    if not child:
        with signals(lambda: "", one_rank):
            for seconds, number in ((0.1, signal.SIGINT), (0.2, signal.SIGINT), (0.3, signal.SIGTERM)):
                threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
            time.sleep(0.8)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_ctrl_c_that_a_shell_s_background_ignores_stays_ignored(one_rank):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals(lambda: "", one_rank) as asked_to_stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked_to_stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_of_a_stage_is_kept_for_its_status(one_rank):
    """The log holds the ranks' process group, which may wait forever if it is freed only in a fork or at the exit."""

    def status():
        return ""

    kept = weakref.ref(status)
    with signals(status, one_rank):
        pass
    del status
    assert kept() is None


def test_a_stage_s_status_may_be_asked_for_after_it(one_rank):
    child = os.fork()
    if not child:
        with signals(lambda: "status", one_rank):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_terminal_that_is_gone_does_not_end_a_run(one_rank):
    child = os.fork()
    if not child:
        reader, writer = os.pipe()
        os.close(reader)
        for number in (1, 2):
            os.dup2(writer, number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        with signals(lambda: "status", one_rank):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGHUP)
            for _ in range(2):
                one_rank.say("a line")
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_silent_rank_ends_the_job_even_without_a_terminal():
    child = os.fork()
    if not child:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        sys.stderr = open(2, "w")
        heartbeat = Heartbeat.__new__(Heartbeat)
        heartbeat.timeout = 60.0
        try:
            heartbeat._end(1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_ranks_wait_for_rank_0_longer_than_a_collective_may_take(forks, tmp_path):
    done = ended(*forks.start_ranks(2, tmp_path, "tests/trainer/patience.py"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error, code, said", [("oom", 2, "rank 1: error: there is not enough"), ("bug", 1, "a bug")])
def test_a_rank_that_fails_alone_says_why_and_ends(error, code, said, forks, tmp_path):
    ranks = forks.start_ranks(2, tmp_path, "tests/trainer/fails.py", error)
    ended(*ranks, seconds=30)
    assert ranks[1].returncode == code and said in ranks[1].stderr


@pytest.fixture
def endless(toy_data) -> list:
    """A run of two ranks, for hours."""
    words = (
        "train_redi.py --recipe toy --epochs 4000 --batch_size 8 --evaluate false --log_every 5 --dtype float32".split()
    )
    return [*words, "--out", "run", "--model", toy_data / "model", "--data", toy_data / "pairs.jsonl"]


@pytest.mark.parametrize("which", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_ends_the_job_with_its_number(which, endless, forks, tmp_path):
    ranks = forks.start_ranks(2, tmp_path, *endless, "--timeout_minutes", "0.05")
    try:
        ranks[0].wait_for(lambda: "step  " in ranks[0].stdout)
        ranks[which].kill(signal.SIGSTOP)
        other = ended(ranks[1 - which], seconds=30)
        assert other.returncode == 2
        assert f"error: rank {which} has not answered for 0.05 minutes" in other.stderr
    finally:
        for rank in ranks:
            rank.kill()


def test_a_dead_rank_takes_the_job_down_at_once(endless, tmp_path):
    """One of torchrun's two is killed; the other must not wait for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / endless[0]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen([*command, *endless[1:]], env=environment, **pipes)
    try:
        for line in job.stdout:
            if "prints its status" in line:
                first = int(line.split("kill -USR1 ")[1].split()[0])
            if "step  " in line:
                break
        ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        (other,) = (int(pid) for pid in ranks if int(pid) != first)
        os.kill(other, signal.SIGKILL)
        begin = time.monotonic()
        _, err = job.communicate(timeout=60)
        assert job.returncode != 0 and time.monotonic() - begin < 20
        assert "SIGKILL" in err  # torchrun's word on the first rank that failed
    finally:
        job.kill()
