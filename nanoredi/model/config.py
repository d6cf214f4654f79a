"""What config.json says of a Qwen2, and what it may say that this Qwen2 would compute wrongly."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError, nearest
from nanoredi.common.files import read_json


@dataclass(frozen=True)
class Qwen2Config:
    """What config.json says of the architecture, by its own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        if (
            self.hidden_size % self.num_attention_heads
            or self.num_attention_heads % self.num_key_value_heads
            or self.head_dim % 2
        ):
            raise UserError(
                f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads} and "
                f"num_key_value_heads {self.num_key_value_heads} do not divide into heads of even size"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def flops(self, num_tokens: int, num_learned: int) -> float:
        """Floating-point operations of a sequence's forward and backward, nothing counted twice: 6 for every weight
        and token that meet (the head's with the learned tokens alone), and causal attention's."""
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
        path = Path(folder) / "config.json"
        config = read_json(path)
        _refuse_other_models(path, config)
        names = [f.name for f in dataclasses.fields(cls)]
        for name in overrides:
            if name not in names:
                raise UserError(f"Qwen2 has no setting {name!r} to override{nearest(name, names)}")
        # transformers 5 writes rope_theta into rope_parameters, earlier ones beside the other fields.
        rope = {"rope_theta": (config.get("rope_parameters") or {}).get("rope_theta")}
        given = {
            k: v
            for k, v in {**config, **{k: v for k, v in rope.items() if v is not None}, **overrides}.items()
            if k in names
        }
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        missing = [
            f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and given.get(f.name) is None
        ]
        if missing:
            raise UserError(f"{path} says nothing of {', '.join(missing)}")
        try:
            return cls(**given)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """config.json's content, such as transformers and vLLM read."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **dataclasses.asdict(self),
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            "use_sliding_window": False,
        }


def _refuse_other_models(path: Path, config: dict[str, Any]) -> None:
    """Name what this Qwen2 would compute wrongly."""
    layers = config.get("num_hidden_layers", 0)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    slides = config.get("max_window_layers", layers) < layers
    if "layer_types" in config:
        slides = "sliding_attention" in config["layer_types"]
    if config.get("model_type") != "qwen2":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}; nanoredi knows qwen2")
    if config.get("use_sliding_window") and config.get("sliding_window") and slides:
        raise UserError(
            f"{path}: some layers use a sliding window of {config['sliding_window']} tokens; nanoredi knows full attention"
        )
    if kind != "default":
        raise UserError(f"{path}: rope scaling of the kind {kind!r}; nanoredi knows the default one, with rope_theta")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}; Qwen2's is silu")
    if config.get("attention_dropout"):
        raise UserError(f"{path}: attention_dropout is {config['attention_dropout']}; nanoredi has none")
    if config.get("head_dim") not in (
        None,
        config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1)),
    ):
        raise UserError(f"{path}: head_dim is {config['head_dim']}; Qwen2's is hidden_size / num_attention_heads")
    if "quantization_config" in config:
        raise UserError(f"{path}: the weights are quantized; nanoredi reads float32, float16 and bfloat16")
