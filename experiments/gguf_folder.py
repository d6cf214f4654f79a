"""Convert a Llama in a GGUF file to a Qwen2 in a Hugging Face folder, for experiments/real.py: `pip install gguf`.

A Qwen2 block is a Llama block with biases on queries, keys and values; with biases of 0 it computes the same. GGUF
names the weights otherwise, orders the rows of queries and keys otherwise, and is quantised; the folder is in fp32.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from nanoredi.common.errors import UserError
from nanoredi.model.config import Qwen2Config
from nanoredi.model.hf_folder import save_folder

# GGUF's names of a block's weights, and Qwen2's.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the type of special tokens such as <|im_end|>


def convert(file: Path, folder: Path, pad_token: str, chat_template: str) -> None:
    """Write a Hugging Face folder.

    Args:
        file: GGUF of a Llama with a byte-level tokenizer and tied embeddings.
        folder: must not exist, or be empty.
        pad_token: one of the vocabulary's control tokens.
        chat_template: Jinja.

    Raises:
        UserError: when the package gguf is missing, the file is of another kind, or the folder holds anything.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError("reading a GGUF file takes the package gguf: pip install gguf") from None
    reader = GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if (facts["general.architecture"], facts["tokenizer.ggml.model"]) != ("llama", "gpt2"):
        raise UserError(f"{file} is not a Llama with a byte-level tokenizer")
    config = _config(facts)
    raw = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32)) for t in reader.tensors}
    if "output.weight" in raw:
        raise UserError(f"{file} has an untied head; this converter takes a model with tied embeddings")
    save_folder(folder, config.to_dict(), _weights(raw, config), None, torch.float32)
    write_tokenizer(facts, folder, pad_token, chat_template)


def _config(facts: dict[str, Any]) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rope_theta=facts["llama.rope.freq_base"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
    )


def _weights(raw: dict[str, Tensor], config: Qwen2Config) -> dict[str, Tensor]:
    weights = {"model.embed_tokens.weight": raw["token_embd.weight"], "model.norm.weight": raw["output_norm.weight"]}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for block in range(config.num_hidden_layers):
        for theirs, ours in BLOCK.items():
            weight = raw[f"blk.{block}.{theirs}.weight"]
            name = f"model.layers.{block}.{ours}"
            if theirs in heads:
                # A rotary pair is two neighbouring rows of a head in GGUF, one row of each half in Qwen2.
                weight = weight.view(heads[theirs], -1, 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            weights[f"{name}.weight"] = weight
            if theirs in ("attn_q", "attn_k", "attn_v"):
                weights[f"{name}.bias"] = torch.zeros(len(weight))
    return weights


def write_tokenizer(facts: dict[str, Any], folder: Path, pad_token: str, chat_template: str) -> None:
    """Write the file's byte-level BPE, with one token per digit as in SmolLM, as Hugging Face's tokenizer files."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"]) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    named = {"eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]], "pad_token": pad_token}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": chat_template}, indent=1))
