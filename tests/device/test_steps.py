"""What whole steps do to a GPU, and what Triton makes of the kernels for it: counted without one (watched.py).

The tables hold what was counted on this code with torch 2.13 and Triton 3.7. A step may do less, and then the smaller
number belongs here; it must not do more unnoticed.
"""

import dataclasses
import json
from collections import Counter

import pytest
import torch

from bench import step_costs

pytest.importorskip("triton", reason="Triton is not installed")
if torch.version.cuda or torch.version.hip:
    pytest.skip("it stands in for CUDA in a PyTorch that was built without", allow_module_level=True)

NO_COMPILER = 3  # watched.py's exit code where the device cannot be built

# Kernels that a case starts, at two layers where nothing else is said.
STEPS = {
    "8 ranks, REDI, tied": 1032,
    "8 ranks, DPO, untied": 1185,
    "1 rank, REDI, tied": 1215,
    "2 groups of 4 ranks, REDI, tied": 1035,
    "decode": 78,
    "decode, top-k": 80,
    "decode, short rows": 76,
    "decode, all layers": 338,
    "prefill": 46,
}
# With --offload: kernels, and the parameters.
OFFLOADED = {"1 rank, offloaded, four layers": (1771, 50), "8 ranks, offloaded": (926, 26)}
# A block forward and backward, by what activation checkpointing keeps: its kernels, and the kB a token that those beside
# products and attention read and write.
BLOCKS = {"off": (35, 233), "attention": (44, 263), "products": (38, 263)}
# Registers a thread and bytes of shared memory, at most, over A100, H100 and B200.
KERNELS = {
    "norm_kernel bfloat16 BLOCK=2048": (32, 32),
    "norm_backward_kernel bfloat16 BLOCK=2048": (64, 8192),
    "sum_kernel float32 TILE=32": (32, 512),
    "swiglu_kernel bfloat16 BLOCK=2048": (32, 0),
    "swiglu_backward_kernel bfloat16 BLOCK=2048": (56, 0),
    "rotate_kernel bfloat16 TOKENS=32": (96, 1024),
    # Three programs of 256 threads share a multiprocessor's 65,536 registers.
    "logprobs_kernel bfloat16 WRITE_GRADIENT=True BLOCK=4096": (80, 32),
    "logprobs_kernel bfloat16 WRITE_GRADIENT=False BLOCK=4096": (80, 32),
    "write_kernel bfloat16": (24, 0),
    "decode_kernel bfloat16 GROUP=6 PAGE=256 BLOCK=64 ALONE=False SIZE=128 SPAN=1024": (117, 39_424),
    "decode_kernel bfloat16 GROUP=6 PAGE=256 BLOCK=64 ALONE=True SIZE=128 SPAN=1024": (117, 39_424),
    "combine_kernel bfloat16 SIZE=128 SPAN=1024": (50, 0),
    "keep_kernel float32 BY_MASS=True BLOCK=2048": (92, 128),
    "keep_kernel float32 BY_MASS=False BLOCK=2048": (94, 128),
}


@pytest.fixture(scope="module")
def found(watched) -> dict:
    said, errors = watched.communicate()
    if watched.returncode == NO_COMPILER:
        pytest.skip(f"the CUDA device without contents could not be built: {errors[-500:]}")
    assert watched.returncode == 0, errors[-5000:]
    return json.loads(said)


@pytest.mark.parametrize("case", STEPS)
def test_a_step_waits_for_nothing_and_starts_as_few_kernels(found, case):
    step = found["steps"][case]
    assert not step.get("wrong")
    kernels = step["kernels"]
    total = kernels if isinstance(kernels, int) else sum(kernels.values())
    assert 0.9 * STEPS[case] < total <= STEPS[case], kernels


@pytest.mark.parametrize("kept", BLOCKS)
def test_what_a_block_starts_and_moves_beside_its_products(found, kept):
    step = found["steps"][f"block, {kept}"]
    assert not step["wrong"]
    for counted, most in zip((sum(step["kernels"].values()), step["kB a token"]), BLOCKS[kept]):
        assert 0.9 * most < counted <= most, step["kernels"]


def test_gradients_are_summed_in_fp32_and_figures_stay_on_the_device(found):
    steps = [step for case, step in found["steps"].items() if "gradients" in step and case not in OFFLOADED]
    assert len(steps) == 4
    for step in steps:
        assert step["gradients"] == [["cuda:0", "torch.float32"]] and step["result"] == ["cuda:0", [7]]
        assert step["state"] == ["cuda:0"]


@pytest.mark.parametrize("case", OFFLOADED)
def test_an_offloaded_step_ends_on_the_host(found, case):
    step, (kernels, parameters) = found["steps"][case], OFFLOADED[case]
    assert step["gradients"] == [["cpu", "torch.float32"]] and step["result"] == ["cpu", [7]]
    assert step["state"] == ["cpu"]
    # What comes back, each gradient and the log's sums, are copies, and no gradient is read before its own has come.
    assert Counter(what.split("(")[0] for what in step["wrong"]) == {
        "aten::_to_copy": parameters + 1,
        "Event.synchronize": parameters,
    }
    assert step["waits before the gradient is read"] == [parameters]
    assert 0.9 * kernels < sum(step["kernels"].values()) <= kernels, step["kernels"]
    # Ranks make a weight whole by way of their GPUs.
    whole = step["saving"].get("_c10d_functional::all_gather_into_tensor", 0)
    assert whole == (0 if case.startswith("1 rank") else parameters)


def test_an_offloaded_step_takes_the_memory_that_is_reckoned(found):
    config = dataclasses.replace(step_costs.MODELS["1.5B"], num_hidden_layers=4)
    reckoned = sum(step_costs.memory(config, step_costs.Layout(1, 1, offload=True)).values())
    assert 0.96 < found["steps"]["1 rank, offloaded, four layers"]["peak"] / reckoned < 1.01


def test_ranks_exchange_once_a_step(found):
    """Beside the sums of the log and the update's size: a reduce-scatter a unit, two blocks and what is around them, and
    where there are copies of the weights as many sums over the copies."""
    for case, expected in (("8 ranks, REDI, tied", (3, 2)), ("2 groups of 4 ranks, REDI, tied", (3, 5))):
        kernels = found["steps"][case]["kernels"]
        assert (kernels["c10d::_reduce_scatter_base_"], kernels["c10d::allreduce_"]) == expected


def test_the_watch_notices_what_it_is_for(found):
    assert found["steps"]["mistakes"]["wrong"] == [
        "a number from the device",
        "a size that the device knows",
        "a tensor from the device",
        "a copy from memory that is not pinned",
        "a copy that is waited for",
        "a CPU tensor beside a CUDA one",
        "synchronize",
    ]


def test_every_kernel_compiles_where_there_is_one_of_a_thing(found):
    """An argument of 1 becomes a constant, which not every expression takes; the interpreter takes all."""
    once = {name.split()[0] for name in KERNELS} - {"combine_kernel"}  # one span is not combined
    assert {name.split()[0] for name in found["of one"]} == once


def test_every_kernel_compiles_for_every_gpu_without_spilling(found):
    assert found["compiled"].keys() == KERNELS.keys()
    for name, targets in found["compiled"].items():
        assert targets.keys() == {"sm_80", "sm_90", "sm_100"}
        for target, uses in targets.items():
            assert not uses["stack"], f"{name} spills registers on {target}"
            assert uses["registers"] <= KERNELS[name][0] and uses["shared"] <= KERNELS[name][1], f"{name} on {target}"
