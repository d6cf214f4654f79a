"""Hugging Face folders in and out: safetensors and JSON, nothing pickled.

Reading maps the files into memory. Writing goes into a folder beside the final one and is renamed at the end, so a
folder that is there is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_json
from nanoredi.data.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"


def load_weights(
    folder: str | Path, shapes: Mapping[str, torch.Size], tied: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder, one by one, mapped from its files.

    Args:
        folder: holds model.safetensors, or an index and its shards.
        shapes: what must be there.
        tied: {name: other}: name may also be there, where it repeats other.

    Raises:
        UserError: for a missing or broken file, and for missing, unexpected or misshapen weights, by name. All is
            checked before the first weight is given.
    """
    folder = Path(folder)
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            handle = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the weights {path}: {error}") from None
        files.update((name, handle) for name in handle.keys())

    missing = sorted(shapes.keys() - files.keys())
    # Old checkpoints also store the rotary frequencies, which follow from the config.
    unexpected = sorted(
        name for name in files.keys() - shapes.keys() - tied.keys() if not name.endswith("rotary_emb.inv_freq")
    )
    if missing:
        raise UserError(f"{folder} lacks the weights {_some(missing)}")
    if unexpected:
        raise UserError(f"{folder} holds weights that its config.json has no place for: {_some(unexpected)}")
    for name, shape in shapes.items():
        found = files[name].get_slice(name).get_shape()
        if list(found) != list(shape):
            raise UserError(f"{folder}: {name} has the shape {tuple(found)}; its config.json asks for {tuple(shape)}")
    for name, other in tied.items():
        if name in files and not torch.equal(files[name].get_tensor(name), files[other].get_tensor(other)):
            raise UserError(
                f"{folder}: config.json ties {name} to {other}, but the file holds another {name}: "
                "set tie_word_embeddings to false"
            )
    return ((name, files[name].get_tensor(name)) for name in shapes)


def save_folder(
    folder: str | Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer_folder: str | Path | None,
    dtype: torch.dtype | None,
) -> None:
    """Write config, weights, tokenizer files and generation config. Every rank calls it; rank 0 writes.

    Args:
        folder: must not exist, or be empty.
        config: config.json's content, without the dtype.
        weights: by Hugging Face's names; sharded ones (DTensor) are made whole one after the other.
        tokenizer_folder: whose tokenizer files are copied; None writes none.
        dtype: of the saved weights; None keeps theirs.

    Raises:
        UserError: when the folder holds anything.
    """
    folder = Path(folder)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; nothing was overwritten")
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.writing")
    if writes:
        beside.mkdir(parents=True)
    try:
        _write_folder(folder, beside if writes else None, config, weights, tokenizer_folder, dtype)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None


def _write_folder(
    folder: Path,
    beside: Path | None,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer_folder: str | Path | None,
    dtype: torch.dtype | None,
) -> None:
    """save_folder's work; beside is where rank 0 writes, None on the other ranks."""
    dtypes = {name: dtype or w.dtype for name, w in weights.items()}
    shards = _plan_shards({name: w.numel() * dtypes[name].itemsize for name, w in weights.items()})
    for file, names in shards.items():
        whole = {}
        for name in names:
            weight = weights[name].detach()
            if isinstance(weight, DTensor):
                weight = weight.full_tensor()  # a collective: on every rank
            if beside:
                whole[name] = weight.to(device="cpu", dtype=dtypes[name]).contiguous()
        if beside:
            save_file(whole, beside / file, metadata={"format": "pt"})
    if not beside:
        return
    if len(shards) > 1:
        total = sum(w.numel() * dtypes[name].itemsize for name, w in weights.items())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        _write_json(beside / _INDEX, index)
    config = {**config, "torch_dtype": str(next(iter(dtypes.values()))).removeprefix("torch.")}
    if tokenizer_folder is not None:
        tokenizer = Tokenizer(tokenizer_folder)
        for file in tokenizer.files:
            shutil.copyfile(file, beside / file.name)
        config["eos_token_id"] = tokenizer.eos_id
        _write_json(beside / "generation_config.json", _generation_config(tokenizer))
    _write_json(beside / "config.json", config)
    if folder.exists():
        folder.rmdir()
    beside.rename(folder)


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a completion of this folder's model: the tokenizer's, and those its generation config
    names."""
    path = tokenizer.folder / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    return sorted({*tokenizer.stop_ids, *(named if isinstance(named, list) else [] if named is None else [named])})


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The folder's generation config, ending where nanoredi's sampler ends."""
    path = tokenizer.folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    # differs from the original: Qwen2.5's base models end on <|endoftext|> alone, which stage 1 never learns, and at
    # 2,048 tokens.
    generation.pop("max_new_tokens", None)
    return {**generation, "eos_token_id": stop_ids(tokenizer), "pad_token_id": tokenizer.pad_id}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's weights are in."""
    if (folder / _INDEX).exists():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / _INDEX} has no weight_map")
        # Only names inside the folder: an index is data from elsewhere.
        return [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds no model.safetensors and no {_INDEX}")
    return [folder / "model.safetensors"]


def _plan_shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """{file: names}, in order, each file of at most MAX_SHARD_BYTES unless one weight alone is larger."""
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
