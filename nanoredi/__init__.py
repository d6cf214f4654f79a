"""Reinforcement Distillation (REDI, arXiv 2505.24850) from scratch: see README.md for the recipe and where to start
reading."""
