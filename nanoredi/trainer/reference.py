"""DPO's reference: the log-probabilities of every trace under the model that training starts from.

They are constants, so the model computes them itself, once, before its first step, and no second model is held in
memory. They are cached under a digest of the weights, the model's config, the tokenised data and the compute dtype: any
run with the same four finds them. The digest is also in the file and in the run's state, so that a file under a wrong
name is computed again, and a resume with another model refused.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanoredi.common.disk import digest, remove_leftovers, writing
from nanoredi.common.runs import weight_files
from nanoredi.config import RediConfig
from nanoredi.data.sequences import TokenData
from nanoredi.model.qwen2 import Qwen2
from nanoredi.trainer.distributed import World
from nanoredi.trainer.scoring import trace_sums


def reference_logps(
    config: RediConfig, model: Qwen2, data: TokenData, dtype: torch.dtype, world: World
) -> tuple[np.ndarray, str]:
    """The log-probabilities under the model (sharded, before its first step, computing in dtype), from the cache, or
    computed by all ranks.

    Returns:
        log p_ref(y|x) of each pair's chosen and rejected trace, (rows, 2) fp32; and the digest in the cache.
    """
    model_and_dtype = f"{model.config} {dtype}".encode()
    key = world.first(lambda: digest(model_and_dtype, *weight_files(Path(config.model)), data.digest.encode()))
    path = Path(config.cache) / f"reference-{key}.safetensors"
    logps = world.first(lambda: _read(path, key))
    if logps is None:
        world.say(f"the reference's log-probs of {len(data):,} pairs: computed once, kept in {path}")
        logps = trace_sums(model, data, config.max_tokens_per_micro_batch, world, "reference")[0].cpu().numpy()
        world.first(lambda: _write(path, logps, key))
    return logps, key


def _write(path: Path, logps: np.ndarray, key: str) -> None:
    remove_leftovers(path.parent)
    with writing(path) as temporary:
        save_file({"logps": logps}, temporary, metadata={"belongs_to": key, "digest": digest(logps.tobytes())})


def _read(path: Path, key: str) -> np.ndarray | None:
    """The cached log-probabilities, or None when there are none, or only a damaged file."""
    if not path.exists():
        return None
    with contextlib.suppress(OSError, SafetensorError, ValueError, TypeError):
        with safe_open(path, framework="numpy") as file:
            about, logps = file.metadata(), file.get_tensor("logps")
        if np.isfinite(logps).all() and about == {"belongs_to": key, "digest": digest(logps.tobytes())}:
            return logps
    print(f"warning: {path} is damaged and is computed again", flush=True)
    return None
