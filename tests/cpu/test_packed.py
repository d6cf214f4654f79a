"""A model whose weights have been packed for sampling on a CPU."""

from pathlib import Path

import pytest
import tiny
import torch

from nanoredi.model.qwen2 import Qwen2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_a_packed_model_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="self_attn.q_proj.weight"):
        tiny.tiny_model(True).pack().save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_a_packed_model_unmaps_its_file(tmp_path):
    folder = tmp_path / "model"
    tiny.tiny_model(tied=False).save_pretrained(folder)
    model = Qwen2.from_pretrained(folder)
    assert str(folder) in Path("/proc/self/maps").read_text()
    model.pack()
    assert str(folder) not in Path("/proc/self/maps").read_text()
