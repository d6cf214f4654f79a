"""Reading and writing Hugging Face folders: safetensors and JSON, nothing pickled.

Weights are memory-mapped. A folder is written under a temporary name beside the final one and renamed at the end, so a
folder that exists is complete.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanoredi.common.disk import writing
from nanoredi.common.errors import UserError
from nanoredi.common.files import check, read_json
from nanoredi.common.runs import INDEX, check_model, open_weights
from nanoredi.data.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
_PLAIN_ROPE = {"rope_type?": "default", "type?": "default", "factor?": 1.0, "partial_rotary_factor?": 1.0}
_CONFIG_SHAPE = {  # of config.json, beside Qwen2Config's fields
    "model_type": "qwen2",
    "hidden_act?": "silu",
    "attention_dropout?": 0.0,
    "is_causal?": True,  # False in models that embed texts
    "use_sliding_window?": False,
    "rope_scaling?": _PLAIN_ROPE,
    "rope_parameters?": _PLAIN_ROPE,
}


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json's content without nulls, and with the rotary embedding's settings among the others.

    Raises:
        UserError: when it is missing or broken, or asks for something that this Qwen2 does not compute.
    """
    path = Path(check_model(str(folder)), "config.json")
    config = {name: value for name, value in read_json(path).items() if value is not None}
    check(f"{path} must describe a plain Qwen2", config, _CONFIG_SHAPE)
    if "quantization_config" in config:
        raise UserError(f"{path}: the weights are quantized; nanoredi reads float32, float16 and bfloat16")
    # transformers 5 writes rope_theta into rope_parameters, earlier ones beside the other fields.
    return config | config.get("rope_parameters", {}) | config.get("rope_scaling", {})


def load_weights(
    folder: str | Path, shapes: Mapping[str, torch.Size], tied: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder, one by one, memory-mapped.

    Args:
        folder: holds model.safetensors, or an index and its shards.
        shapes: of the weights that the model needs, by name.
        tied: {name: other}: the folder may also hold `name`, if it equals `other`.

    Raises:
        UserError: for a missing or broken file, and for missing, unexpected or misshapen weights, by name, before the
            first weight is yielded.
    """
    folder = Path(folder)
    files = open_weights(folder)
    missing = sorted(shapes.keys() - files.keys())
    # Old checkpoints also store the rotary frequencies, which the config determines.
    unexpected = sorted(name for name in files.keys() - {*shapes, *tied} if not name.endswith("rotary_emb.inv_freq"))
    if missing:
        instead = f"; it holds {_some(unexpected)}" if unexpected else ""
        raise UserError(f"{folder} lacks the weights {_some(missing)}{instead}")
    if unexpected:
        raise UserError(f"{folder} holds weights that its config.json has no place for: {_some(unexpected)}")
    for name, shape in shapes.items():
        found = files[name].get_slice(name)
        if found.get_dtype() not in _DTYPES:
            raise UserError(f"{folder}: {name} is of dtype {found.get_dtype()}; nanoredi reads {', '.join(_DTYPES)}")
        if found.get_shape() != list(shape):
            shapes_are = f"{tuple(found.get_shape())}; its config.json asks for {tuple(shape)}"
            raise UserError(f"{folder}: {name} has the shape {shapes_are}")
    for name, other in tied.items():
        if name in files and not torch.equal(files[name].get_tensor(name), files[other].get_tensor(other)):
            raise UserError(f"{folder}: {name} differs from {other}: set tie_word_embeddings in config.json to false")
    return ((name, _finite(folder, name, files[name].get_tensor(name))) for name in shapes)


def _finite(folder: Path, name: str, weight: Tensor) -> Tensor:
    # The sum is cheap and finite for nearly all finite weights; only if it is not, look at each number.
    if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
        raise UserError(f"{folder}: {name} holds numbers that are not finite")
    return weight


class Companions:
    """The files beside the weights of a saved model: the tokenizer's, and a generation config. They are read and
    checked when the model is loaded, so that a fault shows before hours of training, not after.

    Attributes:
        files: {name: content}.
        eos_id: the tokenizer's.
    """

    def __init__(self, folder: str | Path):
        tokenizer = Tokenizer(folder)
        self.eos_id = tokenizer.eos_id
        self.files = {path.name: path.read_bytes() for path in tokenizer.files}
        generation = _read(tokenizer, "generation_config.json")
        # differs from the original: the generation config of Qwen2.5's base models stops only at <|endoftext|>, which
        # stage 1 never teaches, and after 2,048 tokens.
        generation.pop("max_new_tokens", None)
        generation |= {"eos_token_id": stop_ids(tokenizer), "pad_token_id": tokenizer.pad_id}
        self.files["generation_config.json"] = _json(generation)


def save_folder(
    folder: str | Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    companions: Companions | None,
    dtype: torch.dtype | None,
) -> None:
    """Write config, weights, tokenizer files and generation config. Every rank calls it; rank 0 writes.

    Args:
        config: config.json's content, without the dtype.
        weights: by Hugging Face's names; sharded ones (DTensor) are gathered one at a time into rank 0's host memory.
        companions: None writes none.
        dtype: of the saved weights; None keeps theirs.

    Raises:
        UserError: on rank 0, when the folder exists and is not empty, or writing fails.
    """
    folder = Path(folder)
    place = "meta" if dist.is_initialized() and dist.get_rank() > 0 else "cpu"
    # All are gathered before anything is written: a collective that waits for rank 0's disk would time out.
    whole = {name: _whole(w).to(place, dtype or w.dtype).contiguous() for name, w in weights.items()}
    if place == "meta":
        return
    shards = _plan_shards({name: w.nbytes for name, w in whole.items()})
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; nothing was overwritten")
    with writing(folder) as beside:
        beside.mkdir()
        for file, names in shards.items():
            save_file({name: whole[name] for name in names}, beside / file, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(w.nbytes for w in whole.values())}, "weight_map": weight_map}
            (beside / INDEX).write_bytes(_json(index))
        config = {**config, "torch_dtype": str(next(iter(whole.values())).dtype).removeprefix("torch.")}
        if companions:
            config["eos_token_id"] = companions.eos_id
            for name, content in companions.files.items():
                (beside / name).write_bytes(content)
        (beside / "config.json").write_bytes(_json(config))


def _whole(weight: Tensor) -> Tensor:
    """The weight, gathered if it is sharded."""
    weight = weight.detach()
    if isinstance(weight, DTensor):
        # Offloaded shards are on the host, but collectives run on the mesh's device.
        weight = cast(DTensor, weight.to(weight.device_mesh.device_type)).full_tensor()
    return weight


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a completion: the tokenizer's stop tokens, and those in the folder's generation config or, as
    in transformers, in config.json if there is none."""
    named = (_read(tokenizer, "generation_config.json") or _read(tokenizer, "config.json")).get("eos_token_id")
    return sorted({*tokenizer.stop_ids, *(named if isinstance(named, list) else [] if named is None else [named])})


def _read(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """The content of a file that may name end tokens; empty if there is no such file."""
    path = tokenizer.folder / name
    ids = range(tokenizer.backend.get_vocab_size() + 2**16)  # embeddings are often padded beyond the vocabulary
    return check(str(path), read_json(path), {"eos_token_id?": (ids, [ids], None)}) if path.exists() else {}


def _plan_shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """{file: names}, in order; a file is at most MAX_SHARD_BYTES, unless a single weight is larger."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = MAX_SHARD_BYTES
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")
