"""The training state, for an exact resume: weights, AdamW's moments, and the guards' counters.

    out/state/step-000200/    safetensors files of each rank, and state.json: the step, the notes (the guards' counters and
                              what the run began with), every file's size and digest, and a digest of all that

torch.distributed.checkpoint writes and reads the tensors, so a run can resume on another number of ranks. Its own
format keeps a pickle beside the data; its safetensors format does not. A state is written to a temporary folder while
the training continues, and is renamed when all of it is on the disk and digested; then the oldest is removed, so that
two remain. A damaged state is reported and set aside (step-000200.damaged-1), and the one before it is loaded, if any.

No random number is drawn while training: the rows of a step follow from the seed and the step's number (batch.py), so
that number is all that a resume needs to know of the data's order.
"""

import contextlib
import copy
import itertools
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from nanoredi.common.disk import digest, file_digest, move_into_place, path_beside, remove, remove_leftovers
from nanoredi.common.errors import UserError
from nanoredi.common.files import check, read_json
from nanoredi.common.runs import saved_steps
from nanoredi.data.cache import digest_in
from nanoredi.trainer.distributed import PATIENCE, World
from nanoredi.trainer.guards import Guards
from nanoredi.trainer.optimizer import AdamW

KEEP = 2
_NOTES = "state.json"
_SHAPE = {"step": range(1, 10**9), "notes": dict, "files": {str: [(int, str)]}, "digest?": str}


def training_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Every tensor of the state, by name: the weights and AdamW's moments."""
    tensors = {}
    for (name, p), m, v in zip(model.named_parameters(), optimizer.exp_avg, optimizer.exp_avg_sq):
        tensors |= {f"weight.{name}": p.detach(), f"exp_avg.{name}": m, f"exp_avg_sq.{name}": v}
    return tensors


class States(contextlib.AbstractContextManager):
    """The states of a run whose folder this job has locked. All ranks have one and call its methods together.

    In a `with` block, an exception that ends the run first waits for the state that is being written.
    """

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = folder, world
        # A process group of its own, because a state is written while the training uses the other one.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future[int] | None = None  # the step whose state is being written
        self.newest = 0  # the step of the newest whole state

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, UserError):  # every rank raises it
            try:
                self.wait()
            except UserError as unsaved:
                raise UserError(f"{error}; {unsaved}") from None
        elif self.pending:
            self.pending.exception()  # without the other ranks, which may not come

    def save(self, step: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Begin to save the state of a step; tensors and notes may change as soon as this returns.

        Raises:
            UserError: when the state before this one could not be written.
        """
        self.wait()
        if step == self.newest:
            return
        temporary = self.world.first(lambda: path_beside(self.folder / f"step-{step:06d}"))
        self.world.first(lambda: temporary.mkdir(parents=True))
        # A file is put together in memory before it is written, so one of all tensors would take the state's size again.
        files = {name: 1 + i % 16 for i, name in enumerate(tensors)}
        storage = HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
        # async_save writes from a copy on the host. Copying ahead would ask CUDA for a stream, in a new thread and so
        # on the first device, where every rank would then hold a context.
        storage.per_thread_copy_ahead = 0
        written = dcp.async_save(tensors, storage_writer=storage, process_group=self.group)
        self.pending = self.writer.submit(self._finish, written, temporary, step, copy.deepcopy(notes))

    def wait(self) -> None:
        """Wait until the state that is being written is whole.

        Raises:
            UserError: when it could not be written; the earlier ones are as they were.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        error = pending.exception()
        failures: list = [None] * self.world.size
        dist.all_gather_object(failures, error and _cause(error), group=self.group)
        if any(failures):
            last = f"the last whole one is step {self.newest}" if self.newest else "there is none yet"
            raise UserError(f"cannot save the training state in {self.folder}: {next(filter(None, failures))}; {last}")
        self.newest = pending.result()

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fill tensors from the newest whole state.

        Returns:
            Its notes, or None when there is no state; then the tensors are unchanged.
        """
        if (found := self.world.first(self._newest_whole)) is None:
            return None
        path, notes = found
        storage = HuggingFaceStorageReader(str(path))
        try:
            if more := storage.read_metadata().state_dict_metadata.keys() - tensors.keys():
                raise UserError(f"the training state {path} is not this model's: it also has {min(more)}")
            dcp.load(tensors, storage_reader=storage, process_group=self.group)
        except CheckpointException as error:
            raise UserError(f"the training state {path} is not this model's: {_cause(error)}") from None
        self.newest = notes["step"]
        return notes

    def drop(self) -> None:
        """Remove all states, when the run has ended."""
        with contextlib.suppress(UserError):  # a state that could not be written is not needed any more
            self.wait()
        self.world.first(lambda: remove(self.folder))

    def _finish(self, written: Future, temporary: Path, step: int, notes: dict[str, Any]) -> int:
        """Wait for the tensors; then, on rank 0, add state.json, rename the folder, and remove the oldest state."""
        try:
            written.result()
            if self.world.rank == 0:  # whose part is done when every rank's is
                kept = {"step": step, "notes": notes, "files": _digests(sorted(temporary.iterdir()))}
                text = json.dumps({**kept, "digest": _digest_of(kept)}, indent=1)
                (temporary / _NOTES).write_text(text, encoding="utf-8")
                move_into_place(temporary, self.folder / f"step-{step:06d}")
                with contextlib.suppress(OSError):  # NFS keeps a file that somebody reads
                    for old in [*saved_steps(self.folder).values()][:-KEEP]:
                        remove(old)
        except BaseException:
            with contextlib.suppress(OSError):
                if self.world.rank == 0:
                    remove(temporary)
            raise
        return step

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        remove_leftovers(self.folder, locked=True)
        damaged: dict[Path, UserError] = {}
        for step, path in reversed(saved_steps(self.folder).items()):
            try:
                found = path, _notes_of(path, step)
            except UserError as error:
                damaged[path] = error
                continue
            for newer, error in damaged.items():
                # Kept for the user, under another name: the run will save this step again.
                asides = (newer.with_suffix(f".damaged-{i}") for i in itertools.count(1))
                aside = next(path for path in asides if not path.exists())
                newer.rename(aside)
                self.world.say(f"warning: {error}; it is kept as {aside.name}, the one before it is taken")
            return found
        if damaged:
            raise UserError(f"{damaged.popitem()[1]}; no state is whole: move {self.folder} away to begin again")
        return None


def resume(
    states: States, model: nn.Module, optimizer: AdamW, guards: Guards, began_with: dict[str, str], cache: str
) -> int:
    """Load the newest state. Returns the number of steps that are done.

    Raises:
        UserError: when the run began with other data, another dtype or another reference than it has now.
    """
    notes = states.load(training_tensors(model, optimizer))
    if notes is None:
        if (states.folder.parent / "metrics.jsonl").exists():
            states.world.say(f"no state in {states.folder}: beginning again at step 1; saved models stay as they are")
        return 0
    guards.restore(notes)
    before = notes["began_with"]
    if "sequences" not in before:
        before |= states.world.first(lambda: _began_with_before(before, began_with, cache))
    others = {
        "sequences": "other data, another tokenizer or another version of nanoredi",
        "dtype": f"--dtype {before.get('dtype')}, not {began_with.get('dtype')}",
        "reference": "another model as DPO's reference, or another version of nanoredi",
    }
    for what, other in others.items():
        if before.get(what) != began_with.get(what):
            raise UserError(f"the run in {states.folder.parent} began with {other}: give another --out")
    for count in optimizer.num_steps:
        count.fill_(notes["step"] - notes["skipped"])
    states.world.say(f"resuming after step {notes['step']}")
    return notes["step"]


def _began_with_before(before: dict[str, str], now: dict[str, str], cache: str) -> dict[str, str]:
    """What a run of a former version began with. Its state names the cache's folder with its sequences; nothing is known
    if that is gone or damaged. The first versions kept no dtype, but config.toml does, unless it was auto."""
    with contextlib.suppress(UserError, OSError, ValueError, EOFError):
        return {"sequences": digest_in(Path(cache, before["data"])), "dtype": before.get("dtype", now["dtype"])}
    return {}


def _notes_of(path: Path, step: int) -> dict[str, Any]:
    """The notes of the state of a step.

    Raises:
        UserError: when the folder is not exactly what was written.
    """
    kept = check(str(path / _NOTES), read_json(path / _NOTES), _SHAPE)
    if kept.get("digest") not in (None, _digest_of(kept)):  # the first versions' states have none
        raise UserError(f"the training state {path} is damaged ({_NOTES})")
    if kept["step"] != step:
        raise UserError(f"the training state {path} is that of step {kept['step']}")
    try:
        found = _digests([file for file in path.iterdir() if file.name != _NOTES])
    except OSError as error:
        raise UserError(f"the training state {path} cannot be read ({error.strerror})") from None
    wrong = [name for name in sorted({*found, *kept["files"]}) if found.get(name) != kept["files"].get(name)]
    if wrong:
        raise UserError(f"the training state {path} is damaged ({', '.join(wrong)})")
    return {**kept["notes"], "step": step}


def _digests(paths: list[Path]) -> dict[str, list]:
    """Each file's size and blake2b digest, by name; in several threads, since the files are as large as the model."""
    with ThreadPoolExecutor() as pool:
        sizes_and_digests = pool.map(lambda path: [path.stat().st_size, file_digest(path, 16).hex()], paths)
        return dict(zip((path.name for path in paths), sizes_and_digests))


def _digest_of(kept: dict[str, Any]) -> str:
    return digest(json.dumps([kept[key] for key in ("step", "notes", "files")], sort_keys=True).encode())


def _cause(error: BaseException) -> str:
    """The message of the first cause: dcp wraps every rank's error in one of its own."""
    for inner in getattr(error, "failures", {}).values():
        return _cause(inner[0] if isinstance(inner, tuple) else inner)
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[-1]
