"""The architecture, as config.json describes it."""

import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError, naming
from nanoredi.common.flags import checked, option
from nanoredi.model.hf_folder import read_config


@dataclass(frozen=True)
class Qwen2Config:
    """The fields of config.json that this Qwen2 uses, by their own names."""

    vocab_size: int = option(MISSING, "rows of the embedding", low=1, high=2**24)
    hidden_size: int = option(MISSING, "width", low=2, high=2**20)
    intermediate_size: int = option(MISSING, "width within an MLP", low=1, high=2**22)
    num_hidden_layers: int = option(MISSING, "blocks", low=1, high=1000)
    num_attention_heads: int = option(MISSING, "query heads", low=1, high=2**14)
    num_key_value_heads: int = option(MISSING, "key-value heads", low=1, high=2**14)
    max_position_embeddings: int = option(MISSING, "context", low=1)
    rope_theta: float = option(10_000.0, "rotary base", above=0)
    rms_norm_eps: float = option(1e-6, "added to a mean square", above=0, high=1)
    tie_word_embeddings: bool = option(False, "one matrix is embedding and head")
    initializer_range: float = option(0.02, "standard deviation of new weights", low=0, high=100)

    def __post_init__(self):
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if width % heads or heads % kv_heads or self.head_dim % 2:
            raise UserError(
                f"hidden_size {width}, num_attention_heads {heads} and num_key_value_heads {kv_heads} "
                "do not divide into heads of even size"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def flops(self, num_tokens: int, num_learned: int) -> float:
        """Floating-point operations of a sequence's forward and backward, recomputation not counted: 6 per weight and
        token (for the head, per learned token), plus causal attention."""
        kv_size = self.num_key_value_heads * self.head_dim
        block = self.hidden_size * (2 * self.hidden_size + 2 * kv_size + 3 * self.intermediate_size)
        linear = num_tokens * self.num_hidden_layers * block + num_learned * self.vocab_size * self.hidden_size
        return 6.0 * (linear + num_tokens**2 * self.num_hidden_layers * self.hidden_size)

    @classmethod
    def from_folder(cls, folder: str | Path, **overrides: Any) -> "Qwen2Config":
        """Read config.json; overrides replace its fields.

        Raises:
            UserError: when it is missing or broken, or describes anything but a plain Qwen2.
        """
        path, config = Path(folder) / "config.json", read_config(folder)
        given = {"num_key_value_heads": config.get("num_attention_heads"), **config}
        with naming(str(path)):
            needed = [f for f in dataclasses.fields(cls) if f.name in given or f.default is MISSING]
            made = cls(**{f.name: checked(f"its {f.name}", f, given.get(f.name)) for f in needed})
        if config.get("head_dim", made.head_dim) != made.head_dim:
            raise UserError(f"{path}: head_dim is {config['head_dim']}; Qwen2's is hidden_size / num_attention_heads")
        return dataclasses.replace(made, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """config.json's content, such as transformers and vLLM read."""
        kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        fixed = {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True, "use_sliding_window": False}
        return {**kind, **dataclasses.asdict(self), **fixed}
