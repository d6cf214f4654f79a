"""A run of stage 2 on a small toy, which each test changes as it likes."""

import pytest

from nanoredi.config import RediConfig


@pytest.fixture
def redi(toy_data, tmp_path):
    return RediConfig(
        model=str(toy_data / "model"),
        data=str(toy_data / "pairs.jsonl"),
        out=str(tmp_path / "run"),
        batch_size=16,
        lr=1e-3,
        dtype="float32",
        cache=str(tmp_path / "cache"),
        activation_checkpointing="off",
        save_every=0,
    )
