"""Reinforcement Distillation (REDI, arXiv 2505.24850) from scratch: see README.md for the recipe and where to start
reading."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  whoever has an older one starts it all the same
    sys.exit(f"error: nanoredi runs on Python 3.11 and newer; this is Python {sys.version.split()[0]}")
