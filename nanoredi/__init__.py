"""Reinforcement Distillation (REDI, arXiv 2505.24850) from scratch: see README.md for the recipe and where to start
reading."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036  whoever has an older one starts it all the same
    sys.exit(f"error: nanoredi runs on Python 3.11 and newer; this is Python {sys.version.split()[0]}")
if sys.platform == "win32":
    sys.exit("error: nanoredi runs on Linux and macOS; on Windows start it inside WSL, which is Linux")

# Micro-batches differ in size, and a GPU's memory cut into pieces for some of them has no room for others: let its pieces
# grow. torch reads this when it first takes memory of a GPU; what the user has set stays.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

# Threads of OpenMP that wait for each other look 300,000 times in a loop before they sleep: beside another busy process, that is
# time which the thread they wait for needs. libgomp reads this when torch loads it, so nanoredi is imported before torch.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "4000"
