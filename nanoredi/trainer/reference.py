"""DPO's reference: the log-probabilities of every trace under the model that training starts from.

They are constants, so they are computed once, before the first step, by the model itself and the code that trains it;
then no second model is held in memory. They are kept in the cache, under a digest of the weights, the model's config,
the tokenised data and the compute dtype: any run on the same four finds them there. The digest also stands in the file
and in the run's state, so that a file under a wrong name is made again, and a resume from another model refused.
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
    """The log-probabilities under the config's model, which comes sharded, before its first step, and with the dtype of
    its compute: from the cache, or worked out by all ranks.

    Returns:
        log p_ref(y|x) of each pair's chosen and rejected trace, (rows, 2) fp32; and the digest of what they belong to.
    """
    model_and_dtype = f"{model.config} {dtype}".encode()
    belongs_to = world.first(lambda: digest(model_and_dtype, *weight_files(Path(config.model)), data.digest.encode()))
    path = Path(config.cache) / f"reference-{belongs_to}.safetensors"
    logps = world.first(lambda: _read(path, belongs_to, len(data)))
    if logps is None:
        world.say(f"the reference's log-probs of {len(data):,} pairs: computed once, kept in {path}")
        logps = trace_sums(model, data, config.max_tokens_per_micro_batch, world, "reference")[0].cpu().numpy()
        world.first(lambda: _write(path, logps, belongs_to))
    return logps, belongs_to


def _write(path: Path, logps: np.ndarray, belongs_to: str) -> None:
    remove_leftovers(path.parent)
    with writing(path) as beside:
        save_file({"logps": logps}, beside, metadata={"belongs_to": belongs_to, "digest": digest(logps.tobytes())})


def _read(path: Path, belongs_to: str, num_pairs: int) -> np.ndarray | None:
    """What was kept, or None when there is nothing, or nothing whole."""
    if not path.exists():
        return None
    with contextlib.suppress(OSError, SafetensorError, ValueError, TypeError):
        with safe_open(path, framework="numpy") as file:
            about, logps = file.metadata(), file.get_tensor("logps")
        whole = logps.shape == (num_pairs, 2) and logps.dtype == np.float32 and np.isfinite(logps).all()
        if whole and about == {"belongs_to": belongs_to, "digest": digest(logps.tobytes())}:
            return logps
    print(f"warning: {path} is damaged and is made again", flush=True)
    return None
