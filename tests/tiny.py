"""A tiny Qwen2 whose every weight comes from numpy's seeded generator, and the log-probs that transformers gives for
it.

    PYTHONPATH=. python tests/tiny.py     writes tests/golden_logps.json anew; needs transformers

The golden file stands in for transformers where that is not installed.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoredi.model.config import Qwen2Config
from nanoredi.model.qwen2 import Qwen2

GOLDEN = Path(__file__).parent / "golden_logps.json"
LENGTHS = (5, 17, 2, 30)


def tiny_config(**others: Any) -> Qwen2Config:
    """Two grouped-query layers; `others` replace sizes."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return Qwen2Config(**{**sizes, **others})


def tiny_model(tied: bool) -> Qwen2:
    """With biases and norms away from their initial values."""
    model = Qwen2(tiny_config(rope_theta=300_000.0, tie_word_embeddings=tied))
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            p.copy_(torch.from_numpy(centre + 0.2 * rng.standard_normal(tuple(p.shape))))
    return model


def sequences() -> list[torch.Tensor]:
    """Token ids (n,) of a few lengths."""
    rng = np.random.default_rng(8)
    return [torch.from_numpy(rng.integers(0, 97, n)) for n in LENGTHS]


def packed(ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, position_ids, cu_seqlens of sequences one after the other."""
    lengths = torch.tensor([len(x) for x in ids])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    return torch.cat(ids), torch.cat([torch.arange(len(x)) for x in ids]), cu_seqlens


def transformers_logps(folder: str | Path) -> list[torch.Tensor]:
    """Log-probs (n, V) of each of the sequences alone, by transformers in float64, for the model of a folder."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float64
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return [model(ids[None]).logits[0].log_softmax(-1).float() for ids in sequences()]


def main() -> None:
    golden = {}
    for tied in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(tied).save_pretrained(Path(folder, "model"))
            logps = transformers_logps(Path(folder, "model"))
        # The next token's log-prob at each position of each sequence.
        golden["tied" if tied else "untied"] = [
            [round(x, 7) for x in lp[:-1].gather(1, ids[1:, None]).squeeze(1).tolist()]
            for lp, ids in zip(logps, sequences())
        ]
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
