"""The dtype that work is done in is a decision, and the rate at which the device multiplies is not a busy moment's."""

import os
import threading

import pytest
import torch

from nanoredi.trainer.dtype import compute_dtype, matrix_rate, settled_dtype


@pytest.mark.parametrize(
    "units, dtype",
    [({}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16")],
)
def test_auto_is_decided_by_the_processor(monkeypatch, units, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **units})
    cpu = torch.device("cpu")
    assert compute_dtype("auto", cpu) == getattr(torch, dtype)
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16 and compute_dtype("float32", cpu) == torch.float32
    # What has begun goes on in its dtype, on whatever machine.
    assert [settled_dtype("auto", before) for before in ("auto", "float32", "bfloat16")] == [
        dtype,
        "float32",
        "bfloat16",
    ]
    assert settled_dtype("float32", "bfloat16") == "float32"


def test_the_rate_is_a_core_s_own_however_busy_it_is(monkeypatch):
    cpu = torch.device("cpu")
    alone = matrix_rate(torch.float32, cpu)
    begin, end = threading.Event(), threading.Event()

    def work():
        a = torch.randn(700, 700)
        while not end.is_set():
            begin.set()
            a @ a

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work) for _ in range(3 * os.cpu_count())]
    for thread in threads:
        thread.start()
    begin.wait()
    try:
        assert matrix_rate(torch.float32, cpu) > 0.35 * alone
        assert torch.get_num_threads() == before
    finally:
        end.set()
        for thread in threads:
            thread.join()
