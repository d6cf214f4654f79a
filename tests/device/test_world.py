"""Which GPU a rank takes, and the messages for what a GPU cannot do; the GPUs are simulated."""

import contextlib
import importlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import nanoredi
from nanoredi.common.errors import UserError, sentence
from nanoredi.trainer import distributed, dtype
from nanoredi.trainer.distributed import world
from nanoredi.trainer.dtype import compute_dtype

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(visible) gives each rank of one machine the GPUs that it sees, by name; returns which one each of them takes."""
    here = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here.visible))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=here.visible[device.index])
    )

    def taken(visible: list[list[str]]) -> list[str]:
        store = dist.HashStore()

        def choose(rank: int) -> str:
            here.visible = visible[rank]
            return visible[rank][distributed._gpu(store, rank, len(visible), local_rank=rank).index]

        with ThreadPoolExecutor(len(visible)) as ranks:
            return list(ranks.map(choose, range(len(visible))))

    return taken


@pytest.mark.parametrize("visible", [["a"], ["a", "b"], ["a", "b", "c", "d"]])
def test_ranks_that_see_all_gpus_take_one_each(gpus, visible):
    assert gpus([visible] * len(visible)) == visible


def test_ranks_that_see_their_own_gpu_alone_take_it(gpus):
    assert gpus([["a"], ["b"], ["c"]]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "ranks, visible, said", [(2, ["a"], "2 ranks for 1 GPU:"), (3, ["a", "b"], "3 ranks for 2 GPUs:")]
)
def test_more_ranks_than_gpus_are_refused(gpus, ranks, visible, said):
    with pytest.raises(UserError, match=said):
        gpus([visible] * ranks)


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_with_a_gpu_joins_by_nccl_and_by_gloo(size, monkeypatch):
    joined = {}
    store = dist.HashStore()
    store.set("gpu 1", "b")  # the other one has come
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.update(set=device))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=str(device)))
    monkeypatch.setattr(dist, "rendezvous", lambda where: iter([(store, 0, size)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **told: joined.update(told, backend=backend))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "Heartbeat", lambda *_: contextlib.nullcontext())
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(size)), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    with world() as ranks:
        assert ranks.device == joined["set"] == torch.device("cuda", 3)
    assert joined["backend"] == "cpu:gloo,cuda:nccl" and joined["world_size"] == size
    assert joined["device_id"] == (ranks.device if size > 1 else None)


@pytest.fixture
def card(monkeypatch):
    def card(capability: tuple[int, int], triton: bool) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        runtime = SimpleNamespace(driver=SimpleNamespace(active="a driver"))
        monkeypatch.setattr(dtype, "triton", SimpleNamespace(runtime=runtime) if triton else None)

    return card


def test_the_dtype_is_what_the_card_can(card):
    card((7, 5), triton=True)
    assert compute_dtype("auto", GPU) == compute_dtype("float32", GPU) == torch.float32
    with pytest.raises(UserError, match="Tesla T4 does not multiply in bfloat16 .*: give --dtype float32, or auto"):
        compute_dtype("bfloat16", GPU)
    card((8, 0), triton=True)
    assert compute_dtype("auto", GPU) == compute_dtype("bfloat16", GPU) == torch.bfloat16
    assert compute_dtype("float32", GPU) == torch.float32


@pytest.mark.parametrize("name", ["auto", "float32", "bfloat16"])
def test_a_gpu_without_triton_is_refused(card, name):
    card((9, 0), triton=False)
    with pytest.raises(UserError, match="Triton, which is not installed: pip install triton"):
        compute_dtype(name, GPU)


def test_a_gpu_whose_machine_has_no_compiler_is_refused(card):
    """Triton's driver is compiled on first use: images without a compiler are common."""
    card((9, 0), triton=True)

    class Driver:
        @property
        def active(self):
            raise RuntimeError("no C compiler")

    dtype.triton.runtime.driver = Driver()
    with pytest.raises(
        UserError, match=r"Triton, which cannot be set up \(no C compiler\): install a compiler and Python's"
    ):
        compute_dtype("auto", GPU)


@pytest.mark.parametrize("theirs", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_grows_in_place_unless_the_user_says_otherwise(theirs, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if theirs:
        monkeypatch.setenv(theirs, "max_split_size_mb:512")
    importlib.reload(nanoredi)
    ours = (
        "max_split_size_mb:512"
        if theirs == "PYTORCH_CUDA_ALLOC_CONF"
        else None
        if theirs
        else "expandable_segments:True"
    )
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == ours
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is put back


@pytest.mark.parametrize("theirs", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_threads_sleep_soon_unless_the_user_says_otherwise(theirs, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    importlib.reload(nanoredi)
    assert {k: v for k, v in os.environ.items() if k in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} == (
        theirs or {"GOMP_SPINCOUNT": "4000"}
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.99 GiB"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2684354560 bytes."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_said_with_sizes_and_with_what_helps(error):
    said = sentence(error)
    assert said.startswith("there is not enough memory (") and str(error) in said
    for flag in ("max_tokens_per_micro_batch", "activation_checkpointing", "cache_gb", "batch_size"):
        assert f"--{flag}" in said
    assert "more GPUs" in said and "\n" not in said
