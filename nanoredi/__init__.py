"""Reinforcement Distillation (REDI, arXiv 2505.24850) from scratch: README.md says where to start."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036  it may be started with an older one all the same
    sys.exit(f"error: nanoredi runs on Python 3.11 and newer; this is Python {sys.version.split()[0]}")
if sys.platform == "win32":
    sys.exit("error: nanoredi runs on Linux and macOS; on Windows start it inside WSL, which is Linux")

# Micro-batches differ in size, so a GPU's memory becomes fragmented unless its segments can grow. torch reads this when
# it first allocates GPU memory. The user's own setting is kept.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

# Waiting OpenMP threads spin 300,000 times before they sleep. If another process is busy, that takes time from the
# thread that they wait for. libgomp reads this when torch loads it, so nanoredi is imported before torch.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "4000"
