"""Qwen2, with Hugging Face's weight names, over packed sequences.

The letters for shapes, here and everywhere:

    N  packed tokens       S  sequences           B  rows being decoded    T  cached tokens
    H  query heads         K  key-value heads     E  head size             D  hidden size        V  vocabulary

A block is attention and a gated MLP, each behind an RMSNorm and added to the stream:  x + attn(norm(x)), x +
mlp(norm(x)). How tokens attend is not the model's business: each block calls an `attend` from attention.py.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanoredi.attention import KEPT, Attend, PackedAttention
from nanoredi.checkpoint import load_weights, save_folder
from nanoredi.errors import UserError, nearest
from nanoredi.files import read_json
from nanoredi.kernels import linear_logprob, weighted_cross_entropy


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


class RMSNorm(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(self.layer, rotate(q, *rope), rotate(k, *rope), v)  # (N, H, E)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        self.activation_checkpointing = False

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            keeping = partial(create_selective_checkpoint_contexts, _keep_attention)
            # No random number is drawn here whose state would have to be kept.
            return checkpoint(
                self._compute, x, rope, attend, use_reentrant=False, preserve_rng_state=False, context_fn=keeping
            )
        return self._compute(x, rope, attend)

    def _compute(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def _keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class Decoder(nn.Module):
    """Embedding, blocks and final norm: Hugging Face's `model.` prefix."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class Qwen2(nn.Module):
    """A Qwen2 language model.

    Attributes:
        config: the architecture.
        tokenizer_folder: where the tokenizer's files lie that save_pretrained puts beside the weights; None if there
            are none.
    """

    def __init__(self, config: Qwen2Config, tokenizer_folder: str | Path | None = None):
        super().__init__()
        self.config = config
        self.tokenizer_folder = tokenizer_folder
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **config_overrides: Any,
    ) -> "Qwen2":
        """Load a Hugging Face folder.

        The weights are mapped from the files into the model, with no copy in between; asking for another dtype or
        device makes the one copy that this takes.

        Args:
            folder: holds config.json and one or more safetensors files.
            dtype: of the parameters; None keeps the files'.
            device: None is the CPU.
            config_overrides: fields of config.json to replace, such as rope_theta.

        Raises:
            UserError: for anything but a Qwen2, and for missing, unexpected or misshapen weights, by name.
        """
        config = Qwen2Config.from_folder(folder, **config_overrides)
        with torch.device("meta"):
            model = cls(config, tokenizer_folder=folder if (Path(folder) / "tokenizer.json").exists() else None)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        weights = load_weights(
            folder, shapes, tied={"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        )
        model.load_state_dict({name: w.to(device=device, dtype=dtype) for name, w in weights}, assign=True)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that transformers and vLLM load as it is. Under FSDP every rank must call it.

        Args:
            folder: must not exist, or be empty.
            dtype: of the saved weights; None keeps the parameters'.

        Raises:
            UserError: when the folder holds anything.
        """
        save_folder(folder, self.config.to_dict(), dict(self.named_parameters()), self.tokenizer_folder, dtype)

    def init_weights(self, seed: int) -> "Qwen2":
        """Random weights: normal with the config's initializer_range, biases 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        return self

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D): the output embedding, which is the input one where they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """Final hidden states (N, D) of packed sequences.

        Args:
            input_ids, position_ids: (N,) int64.
            cu_seqlens: (S+1,) int32, where each sequence begins and the last ends.
            max_seqlen: the longest sequence; spares the device a question.
        """
        return self.hidden_states(input_ids, position_ids, PackedAttention(cu_seqlens, max_seqlen))

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Final hidden states (N, D) of tokens (N,) that attend as `attend` says."""
        x = self.model.embed_tokens(input_ids)
        rope = rotary_angles(position_ids, self.config, x.dtype)
        for block in self.model.layers:
            x = block(x, rope, attend)
        return self.model.norm(x)

    def loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor,
        weights: Tensor,
        rows: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the targets' log-probabilities, and these: loss () fp32, logps (N,) fp32.

        Under FSDP the head is whole only inside a forward, so the loss is computed here and not by the caller.

        Args:
            targets: (N,) int64.
            weights: (N,) fp32, 0 where nothing is learned.
            rows: (R,) int64, where the weights are not 0; spares the device a question, as max_seqlen does.
        """
        hidden = Qwen2.forward(self, input_ids, position_ids, cu_seqlens, max_seqlen)
        return weighted_cross_entropy(hidden, self.lm_head_weight, targets, weights, rows)

    def logprobs(self, targets: Tensor, rows: Tensor, *packed: Any) -> Tensor:
        """The log-probabilities (N,) fp32 of targets (N,) in rows (R,), 0 elsewhere; differentiable, for losses
        that are not linear in them. packed: what forward takes."""
        return linear_logprob(Qwen2.forward(self, *packed), self.lm_head_weight, targets, rows)


def rotary_angles(position_ids: Tensor, config: Qwen2Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, E) of position * theta^(-2i/E), computed in fp32 (RoPE, arXiv 2104.09864, eq. 15).

    Pair i is (x_i, x_{i+E/2}), Hugging Face's pairing; both halves get the pair's cos, and the sines come signed as
    rotate wants.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32) / config.head_dim
    angles = (position_ids[:, None].float() / config.rope_theta**exponent)[:, None]  # (N, 1, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (N, H, E) by its angle: (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
