"""Qwen2, with Hugging Face's weight names, over packed sequences.

The letters for shapes, here and everywhere:

    N  packed tokens       S  sequences           B  rows being decoded    T  cached tokens
    H  query heads         K  key-value heads     E  head size             D  hidden size        V  vocabulary

A block is attention and a gated MLP, each behind an RMSNorm and added to the residual stream:  x + attn(norm(x)),
x + mlp(norm(x)). The model does not decide how tokens attend: each block calls the `attend` that the forward pass was
given, from attention.py or kv_cache.py.
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


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return rms_norm(x, self.weight, self.eps, added)


class Linear(nn.Linear):
    """A linear layer. Where `Qwen2.pack` has joined several, `parts` are the sizes of their outputs."""

    parts: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def join(self, *others: "Linear") -> None:
        """Take over the weights of other layers with the same input, so that one product serves all."""
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
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.activation_checkpointing = "off"  # or which results are kept for backward: "attention", "products"

    def forward(self, x: Tensor, added: Tensor | None, rope: Rope, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """The residual stream (N, D) comes in as x + added and leaves as two such terms (or one and None), which the
        next norm adds up."""
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
        # Left uninitialised: even on the meta device nn.Embedding's init imports torch._dynamo, which takes a second.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen2(nn.Module):
    """A Qwen2 language model.

    Attributes:
        companions: the tokenizer's files, which save_pretrained writes beside the weights; None if there are none.
        compute_dtype: of activations and matrix products where the weights are fp32 masters; None: the weights' dtype.
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

        The weights are memory-mapped, not copied; asking for another dtype or device makes one copy.

        Args:
            dtype: of the parameters; None keeps the files'.
            device: None is the CPU.
            config_overrides: replace fields of config.json, such as rope_theta.

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
        """Prepare the weights for sampling, in place: layers that share an input are joined, and the device may choose
        a faster memory layout. Afterwards the model can sample and score, but not be trained or saved."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.q_proj.join(module.k_proj, module.v_proj)
            elif isinstance(module, MLP):
                module.gate_proj.join(module.up_proj)
            for name, p in module.named_parameters(recurse=False):
                weight = prepare_for_sampling(p, for_linear=name == "weight" and isinstance(module, Linear))
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return self

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D): the output embedding; with tied embeddings, the input one."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """Final hidden states (N, D) of packed sequences.

        Args:
            input_ids, position_ids: (N,) int64.
            cu_seqlens: (S+1,) int32, where each sequence begins and the last ends.
            max_seqlen: the longest sequence's length; without it the host has to wait for the device to say so.
        """
        return self.hidden_states(input_ids, position_ids, PackedAttention(cu_seqlens, max_seqlen))

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Final hidden states (N, D) of tokens (N,), with any kind of attention."""
        x = embedding(input_ids, self.model.embed_tokens.weight)
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
        """The weighted sum of the targets' log-probabilities, () fp32, and these, (N,) fp32. The arguments are those of
        forward and weighted_cross_entropy. FSDP gathers the head only inside a method of the model: hence this one."""
        hidden = Qwen2.forward(self, input_ids, position_ids, cu_seqlens, max_seqlen)
        return weighted_cross_entropy(hidden, self.lm_head_weight, targets, weights, rows, entropies)

    def logprobs(self, targets: Tensor, rows: Tensor, entropies: Tensor, *packed: Any) -> Tensor:
        """The log-probabilities (N,) fp32 of targets (N,) in rows (R,), 0 elsewhere; differentiable, for losses that
        are not linear in them. entropies as in loss; packed: forward's arguments."""
        return linear_logprob(Qwen2.forward(self, *packed), self.lm_head_weight, targets, rows, entropies)


def rotary_angles(position_ids: Tensor, config: Qwen2Config, dtype: torch.dtype) -> Rope:
    """cos and sin (N, 1, E) of position * theta^(-2i/E), computed in fp32 (RoPE, arXiv 2104.09864, eq. 15).

    Pair i is (x_i, x_{i+E/2}), Hugging Face's pairing. Both halves hold the pair's cos; the sines of the first half are
    negated, as `rotate` expects.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32) / config.head_dim
    angles = (position_ids[:, None].float() / config.rope_theta**exponent)[:, None]  # (N, 1, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
