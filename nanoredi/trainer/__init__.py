"""The training loop of both stages and what it needs: ranks, optimiser, state, log, guards."""
