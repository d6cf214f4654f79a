"""Runs the repository's scripts as a user would, each in a separate process, but without the seconds that importing
torch takes: every process is a fork of a server that has imported everything.

    PYTHONPATH=. python tests/forks.py        the server: reads jobs as JSON lines from stdin, prints their process ids

For several ranks, forks with torchrun's environment variables replace torchrun.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
IMPORTED = ("train_sft", "train_redi", "sample", "evaluate", "nanoredi.prepare", "nanoredi.report.figures")


class Server:
    """The client's side of the server. Its jobs run on the CPU: CUDA cannot be used in forks of a process that has
    queried it, and importing does."""

    def __init__(self, folder: Path):
        self._folder, self._started = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)  # meant for the tests' process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # In its own session, so that Ctrl-C reaches the tests only, which then stop the server.
        self._process = subprocess.Popen([sys.executable, __file__], env=environment, start_new_session=True, **pipes)

    def start(self, folder: Path, script: str | Path, *flags: str | Path, **environment: str) -> "Job":
        """Start a script of the repository in the folder."""
        self._started += 1
        job = Job([str(ROOT / script), *map(str, flags)], self._folder / str(self._started))
        job_line = {"words": job.words, "said": str(job.said), "folder": str(folder), "environment": environment}
        print(json.dumps(job_line), file=self._process.stdin, flush=True)
        job.pid = int(self._process.stdout.readline())
        return job

    def start_ranks(self, count: int, *words: str | Path, **environment: str) -> list["Job"]:
        """Start ranks as torchrun would on one machine, with one thread each."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.start(*words, **world, **rank, **environment) for rank in ranks]

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Job:
    """A started process, and its output so far."""

    pid: int

    def __init__(self, words: list[str], said: Path):
        self.words, self.said = words, said
        for kind in (".out", ".err"):
            said.with_suffix(kind).touch()

    @property
    def returncode(self) -> int | None:
        """None while it runs; a signal's number is negative."""
        path = self.said.with_suffix(".code")
        return int(path.read_text()) if path.exists() else None

    @property
    def stdout(self) -> str:
        return self.said.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.said.with_suffix(".err").read_text()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until the condition holds; fail if the process ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.returncode is None and time.monotonic() < deadline, self.stdout + self.stderr
            time.sleep(0.005)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def ended(*jobs: Job, seconds: float = 280.0) -> subprocess.CompletedProcess:
    """Wait for jobs and join their results. As under torchrun, if one fails the others are killed; so on a timeout."""
    deadline = time.monotonic() + seconds
    while None in (codes := [job.returncode for job in jobs]):
        if any(codes) or time.monotonic() > deadline:
            for job in jobs:
                job.kill()
        time.sleep(0.005)
    code = next(filter(None, codes), 0)
    return subprocess.CompletedProcess(
        jobs[0].words, code, "".join(job.stdout for job in jobs), "".join(job.stderr for job in jobs)
    )


def serve() -> dict:
    """Serve jobs. Returns only in the fork that is to run one, with that job."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that wait for a job are not reaped
    for line in sys.stdin:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            return job
        os.write(1, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        Path(f"{job['said']}.writing").write_text(str(code))
        os.rename(f"{job['said']}.writing", f"{job['said']}.code")
        os._exit(0)
    sys.exit()


def become(job: dict) -> int:
    """Run the job's script in this process, set up as Python would. Returns its exit code."""
    files = (os.devnull, os.O_RDONLY), (f"{job['said']}.out", os.O_WRONLY), (f"{job['said']}.err", os.O_WRONLY)
    for number, (name, flags) in enumerate(files):
        os.dup2(os.open(name, flags | os.O_APPEND), number)
    sys.stdin = open(0)  # the old one's buffer may hold a later job
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    if "OMP_NUM_THREADS" in job["environment"]:
        torch.set_num_threads(int(job["environment"]["OMP_NUM_THREADS"]))
    sys.argv = job["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - whatever it is, this fork must not continue as the server
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = become(serve())
    # Finalising the interpreter would touch, and so copy, all memory that is shared with the server.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
