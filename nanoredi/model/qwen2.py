"""Qwen2, with Hugging Face's weight names, over packed sequences.

The letters for shapes, here and everywhere:

    N  packed tokens       S  sequences           B  rows being decoded    T  cached tokens
    H  query heads         K  key-value heads     E  head size             D  hidden size        V  vocabulary

A block is attention and a gated MLP, each behind an RMSNorm and added to the stream:  x + attn(norm(x)), x +
mlp(norm(x)). How tokens attend is not the model's business: each block calls an `attend`, from attention.py or
kv_cache.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoredi.kernels import embedding, linear, linear_logprob, mlp, qkv, rms_norm, swiglu, weighted_cross_entropy
from nanoredi.kernels.dispatch import prepare_for_sampling
from nanoredi.kernels.layers import PRODUCTS
from nanoredi.model.attention import ATTENTION, Attend, PackedAttention, Rope
from nanoredi.model.config import Qwen2Config
from nanoredi.model.hf_folder import Companions, load_weights, save_folder
from nanoredi.model.recompute import recomputed


class RMSNorm(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, self.eps, added)


class Embedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


class Linear(nn.Linear):
    """A linear layer. `parts` are the sizes of all whose outputs it has, where `pack` has joined some."""

    parts: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def join(self, *others: "Linear") -> None:
        """Take over the weights of layers that have the same input."""
        layers = self, *others
        self.parts = [len(layer.weight) for layer in layers]
        for name in [name for name, _ in self.named_parameters()]:
            setattr(self, name, nn.Parameter(torch.cat([getattr(layer, name) for layer in layers]), False))
            for layer in others:
                setattr(layer, name, None)


class Attention(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        if self.q_proj.parts:
            q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in self.q_proj(x).split(self.q_proj.parts, dim=1))
            out = attend(self.layer, q, k, v, rope)  # (N, H, E)
        else:
            layers = self.q_proj, self.k_proj, self.v_proj
            q, k, v = qkv(x, [layer.weight for layer in layers], [layer.bias for layer in layers], *rope)
            out = attend(self.layer, q, k, v)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj.parts:
            return self.down_proj(swiglu(*self.gate_proj(x).split(self.gate_proj.parts, dim=1)))
        return mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Block(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        self.activation_checkpointing = "off"  # or what is kept for backward: "attention" or "products"

    def forward(self, x: Tensor, added: Tensor | None, rope: Rope, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """The stream x + added (N, D) goes on in two terms, too, which the next norm adds up, or in one and None."""
        if self.activation_checkpointing == "off" or not torch.is_grad_enabled():
            return self._compute(x, added, rope, attend)
        kept = ATTENTION | PRODUCTS if self.activation_checkpointing == "products" else ATTENTION
        return recomputed(lambda *inputs: torch.add(*self._compute(*inputs)), kept, x, added, rope, attend), None

    def _compute(self, x: Tensor, added: Tensor | None, rope: Rope, attend: Attend) -> tuple[Tensor, Tensor]:
        x, normed = self.input_layernorm(x, added)
        x, normed = self.post_attention_layernorm(x, self.self_attn(normed, rope, attend))
        return x, self.mlp(normed)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: Hugging Face's `model.` prefix."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        # Drawn by init_weights alone: on the meta device, too, drawing would import torch._dynamo, a second's work.
        self.embed_tokens = Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class Qwen2(nn.Module):
    """A Qwen2 language model.

    Attributes:
        companions: what save_pretrained puts beside the weights: the files of the folder that holds the tokenizer; None if
            there are none.
        compute_dtype: of activations and products where the weights are fp32 masters; None is the weights' own.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: Qwen2Config, tokenizer_folder: str | Path | None = None):
        super().__init__()
        self.config = config
        self.companions = Companions(tokenizer_folder) if tokenizer_folder else None
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
        """Load a Hugging Face folder, of config.json and one or more safetensors files.

        The weights are mapped from the files into the model, with no copy in between; asking for another dtype or
        device makes the one copy that this takes.

        Args:
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
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        weights = load_weights(folder, shapes, tied)
        model.load_state_dict({name: w.to(device=device, dtype=dtype) for name, w in weights}, assign=True)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that transformers and vLLM load as it is. Under FSDP every rank must call it.

        Args:
            dtype: of the saved weights; None keeps the parameters'.

        Raises:
            UserError: when the folder exists and is not empty.
        """
        save_folder(folder, self.config.to_dict(), dict(self.named_parameters()), self.companions, dtype)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Qwen2":
        """Random weights: normal with the config's initializer_range, biases 0, norms 1."""
        generator = torch.Generator(self.lm_head_weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def pack(self) -> "Qwen2":
        """Lay the weights out as the device multiplies by them fastest, in place of what they were. From then on the
        model can sample and score, but not be trained or saved. Layers with one input become one."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.q_proj.join(module.k_proj, module.v_proj)
            elif isinstance(module, MLP):
                module.gate_proj.join(module.up_proj)
            for name, p in module.named_parameters(recurse=False):
                weight = prepare_for_sampling(p, name == "weight" and isinstance(module, Linear))
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
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
        x = x.to(self.compute_dtype or x.dtype)
        rope = rotary_angles(position_ids, self.config, x.dtype)
        added = None
        for block in self.model.layers:
            x, added = block(x, added, rope, attend)
        return self.model.norm(x, added)[1]

    def loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor,
        weights: Tensor,
        rows: Tensor | None = None,
        max_seqlen: int | None = None,
        entropies: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the targets' log-probabilities, and these: loss () fp32, logps (N,) fp32. What forward does not
        take is weighted_cross_entropy's. Under FSDP the head is whole only inside a forward: hence this is a method."""
        hidden = Qwen2.forward(self, input_ids, position_ids, cu_seqlens, max_seqlen)
        return weighted_cross_entropy(hidden, self.lm_head_weight, targets, weights, rows, entropies)

    def logprobs(self, targets: Tensor, rows: Tensor, *packed: Any, entropies: Tensor | None = None) -> Tensor:
        """The log-probabilities (N,) fp32 of targets (N,) in rows (R,), 0 elsewhere; differentiable, for losses
        that are not linear in them. packed: what forward takes; entropies as in loss."""
        return linear_logprob(Qwen2.forward(self, *packed), self.lm_head_weight, targets, rows, entropies)


def rotary_angles(position_ids: Tensor, config: Qwen2Config, dtype: torch.dtype) -> Rope:
    """cos and sin (N, 1, E) of position * theta^(-2i/E), computed in fp32 (RoPE, arXiv 2104.09864, eq. 15).

    Pair i is (x_i, x_{i+E/2}), Hugging Face's pairing; both halves get the pair's cos, and the sines come signed as
    rotate wants.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32) / config.head_dim
    angles = (position_ids[:, None].float() / config.rope_theta**exponent)[:, None]  # (N, 1, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
