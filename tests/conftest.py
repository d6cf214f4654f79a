"""Fixtures that many tests share: the real data beside the repository, a small toy, a world of one process, and runs of
the scripts."""

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import nanoredi  # noqa: F401  before torch, which reads the variables that it sets

# isort: split
import torch
from forks import Server, ended
from templates import CHATML, small_folder

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: the tests run them on the CPU

from nanoredi import toy  # noqa: E402
from nanoredi.common import disk  # noqa: E402
from nanoredi.config import ToyConfig  # noqa: E402
from nanoredi.data.tokenizer import Tokenizer  # noqa: E402
from nanoredi.kernels import dispatch  # noqa: E402
from nanoredi.model.qwen2 import Qwen2  # noqa: E402
from nanoredi.trainer import distributed, loop  # noqa: E402
from nanoredi.trainer.distributed import World, world  # noqa: E402

# isort: split
from tiny import tiny_config  # noqa: E402

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --slow"))


_COMPILE_ONCE = """#!/bin/sh
[ "$1" = --version ] && exec COMPILER "$@"
for made; do :; done
key=$(for word; do case $word in
    "$made") ;;
    *.c) cat "$word" "$(dirname "$word")"/*.h ;;
    *.o) cat "$word" ;;
    *) echo "$word" ;;
esac; done | sha1sum | cut -c1-40)
if [ ! -e "KEPT/$key" ]; then
    COMPILER "$@" || exit
    cp "$made" "KEPT/$key.$$" && mv "KEPT/$key.$$" "KEPT/$key"
fi
cp "KEPT/$key" "$made"
"""


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """The tests start many processes, so the C compiler's output for an input is cached for the next one."""
    compiler = shutil.which("cc")
    if compiler is None or not shutil.which("sha1sum"):
        return
    folder = tmp_path_factory.mktemp("cc")
    (folder / "kept").mkdir()
    (folder / "cc").write_text(_COMPILE_ONCE.replace("COMPILER", compiler).replace("KEPT", str(folder / "kept")))
    (folder / "cc").chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def skip_without_gcc(source: str) -> None:
    """Skip a test of C that could not be compiled; with gcc on Linux it must compile, so fail there."""
    if sys.platform == "linux" and shutil.which("cc"):
        about = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout
        assert "Free Software Foundation" not in about, f"gcc cannot compile {source}, or torch not run it"
    pytest.skip("no gcc (as cc)")


@pytest.fixture
def plain(monkeypatch) -> None:
    """Run every operation in its plain version."""
    monkeypatch.setattr(dispatch.operation, "__call__", lambda self, *args, **kwargs: self.plain(*args, **kwargs))


@pytest.fixture(params=["plain", "fastest"])
def version(request) -> str:
    """Run the test with the plain version of every operation, then with the device's version where there is one."""
    if request.param == "plain":
        request.getfixturevalue("plain")
    return request.param


def use_triton(monkeypatch: pytest.MonkeyPatch, *operations: dispatch.operation) -> None:
    """Run operations in Triton; on the CPU in its interpreter."""
    if dispatch.triton is None:
        pytest.skip("Triton is not installed")
    if DEVICE.type == "cpu":
        import interpreter  # noqa: F401  teaches it to multiply and to round bf16
    for device_type in (DEVICE.type, "cuda"):
        dispatch._import_package(device_type)  # each registers its versions once
    for operation in operations:
        monkeypatch.setitem(operation.faster, DEVICE.type, operation.faster["cuda"])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that need it skip where it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip("the real data is not beside the repository (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def real_tokenizer(shared) -> Tokenizer:
    return Tokenizer(shared / "qwen2.5-tokenizer")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """The embedded task at a small size: data and a random model."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    toy.make(folder, ToyConfig(sft_rows=120, pairs=60, watch_pairs=8, heldout=6, num_layers=2, hidden_size=32), seed=1)
    return folder


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A tiny random model whose tokenizer's tokens are bytes: it can write anything."""
    tokenizer = small_folder(tmp_path_factory.mktemp("bytes") / "tokenizer", CHATML)
    sizes = {"vocab_size": 280, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    config = tiny_config(**sizes, num_hidden_layers=1, max_position_embeddings=2048)
    folder = tokenizer.with_name("model")
    Qwen2(config, tokenizer_folder=tokenizer).init_weights(0).save_pretrained(folder)
    return folder


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Leave out what takes time in every run and changes no file: syncing the disk and measuring the matrix rate."""
    monkeypatch.setattr(loop, "matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr(disk, "_sync_entry", lambda path: None)


@pytest.fixture
def share(request) -> int:
    """Factor on the number of attempts of an attack."""
    return 10 if request.config.getoption("--slow") else 1


@pytest.fixture(scope="session", autouse=True)
def runs_in_one_process() -> Iterator[None]:
    """Runs inside the tests' process skip the pause at their end, and measure the matrix rate once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
        patch.setattr(loop, "matrix_rate", functools.cache(loop.matrix_rate))
        yield


@pytest.fixture(scope="module")  # the next module may create another world
def one_rank() -> Iterator[World]:
    with world() as ranks:
        yield ranks


@pytest.fixture(scope="session", autouse=True)
def server(request, tmp_path_factory, compile_once) -> Iterator[Server | None]:
    """The fork server, if a test uses one. It imports everything while the first tests run."""
    if not any({"forks", "run"} & {*item.fixturenames} for item in request.session.items):
        yield None
        return
    server = Server(tmp_path_factory.mktemp("said"))
    yield server
    server.stop()


@pytest.fixture(scope="session", autouse=True)
def watched(request) -> Iterator[subprocess.Popen | None]:
    """The process that records what whole steps do on a GPU, if device/test_steps.py is to run: it takes a quarter of a
    minute, so it starts with the first test."""
    if not any("found" in item.fixturenames for item in request.session.items):
        yield None
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command, pipe = [sys.executable, str(ROOT / "tests/device/watched.py")], subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def forks(server) -> Server:
    """Starts scripts on the CPU."""
    return server


@pytest.fixture
def run(server, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the repository in an empty folder, as a user would, and wait for it: on `ranks` processes if that
    is > 0, by torchrun if its flags are given. With fewer GPUs than ranks, or than the test needs, it runs on the
    CPU."""

    def run(
        *words: str | Path, ranks: int = 0, torchrun: list[str] | None = None, gpus: int = 1
    ) -> subprocess.CompletedProcess:
        on_gpu = torch.cuda.device_count() >= max(gpus, ranks) and (not torchrun or gpus > 1)
        if not torchrun and not on_gpu:
            return ended(*(server.start_ranks(ranks, tmp_path, *words) if ranks else [server.start(tmp_path, *words)]))
        torchrun = torchrun or (["--standalone", f"--nproc_per_node={ranks}"] if ranks else [])
        launcher = ["-m", "torch.distributed.run", *torchrun, "--"] if torchrun else []  # --n is not --nnodes
        script, *flags = map(str, words)
        command = [sys.executable, *launcher, str(ROOT / script), *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if not on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)

    return run
