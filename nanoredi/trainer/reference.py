"""DPO's reference: the log-probabilities of every trace under the model that training starts from.

They are constants, so they are computed once, before the first step, by the model itself and the code that trains it;
then no second model is held in memory. They are kept in the cache, under a digest of the weights, the model's config,
the tokenised data and the compute dtype: any run on the same four finds them there. The digest also stands in the file
and in the run's state, so that a file under a wrong name, and a resume from another model, are refused.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanoredi.common.errors import UserError
from nanoredi.config import RediConfig
from nanoredi.data.sequences import TokenData
from nanoredi.model.hf_folder import weight_files
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.distributed import World
from nanoredi.trainer.scoring import trace_logps


def reference_logps(
    config: RediConfig, model: Qwen2, data: TokenData, dtype: torch.dtype, world: World
) -> tuple[np.ndarray, str]:
    """The reference's log-probabilities, from the cache or computed by all ranks.

    Args:
        config: of the run; its model is the reference.
        model: that model, sharded, before its first step.
        data: the pairs.
        dtype: of the model's compute.
        world: the ranks.

    Returns:
        log p_ref(y|x) of each pair's chosen and rejected trace, (rows, 2) fp32; and the digest of what they belong to.

    Raises:
        UserError: when the file in the cache belongs to another model or other data.
    """
    digest = world.first(lambda: _digest(config.model, model, data, dtype))
    path = Path(config.cache) / f"reference-{digest}.safetensors"
    if not world.first(path.exists):
        world.say(f"the reference's log-probs of {len(data):,} pairs: computed once, kept in {path}")
        logps = trace_logps(model, data, config.max_tokens_per_micro_batch, world, "reference").cpu().numpy()
        world.first(lambda: _write(path, logps, digest))
    return world.first(lambda: _read(path, digest, len(data))), digest


def _digest(folder: str, model: Qwen2, data: TokenData, dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(f"{model.config} {dtype}".encode(), digest_size=16)
    for path in weight_files(Path(folder)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    digest.update(data.digest.encode())
    return digest.hexdigest()


def _write(path: Path, logps: np.ndarray, digest: str) -> None:
    # Written beside and renamed: a file that is there is whole.
    beside = path.with_suffix(f".{os.getpid()}")
    save_file({"logps": logps}, beside, metadata={"belongs_to": digest})
    beside.rename(path)


def _read(path: Path, digest: str, num_pairs: int) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as file:
            belongs_to, logps = (file.metadata() or {}).get("belongs_to"), file.get_tensor("logps")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the reference's log-probs {path}: {error}; remove it to compute them anew"
        ) from None
    if belongs_to != digest or logps.shape != (num_pairs, 2):
        raise UserError(
            f"{path} holds the reference's log-probs for another model or other data; remove it to compute them anew"
        )
    return logps
