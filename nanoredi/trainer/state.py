"""The training state, for an exact resume: weights, AdamW's moments, and where the run was.

    out/state/step-000200/    one safetensors file a rank, and state.json: the notes, every file's size and digest, and a
                              digest of all that

torch.distributed.checkpoint writes and reads the tensors, so another number of ranks can go on. Its own format keeps a
pickle beside the data; its safetensors one does not. A state is written beside its place while the training goes on, and
gets its name when all of it is on the disk and digested; then the oldest goes, so that two remain. A state that is not as
it was written is told to the user and set aside (step-000200.damaged-1), and the one before it is taken.

No random number is drawn while training: which rows a step has follows from the seed and the step's number (batch.py),
so the step is all that a resume needs to know of the data's order.
"""

import contextlib
import itertools
import json
import threading
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
from nanoredi.trainer.distributed import World
from nanoredi.trainer.guards import Guards
from nanoredi.trainer.optimizer import AdamW

KEEP = 2
_NOTES = "state.json"
_SHAPE = {"step": range(1, 10**9), "notes": dict, "files": {str: [(int, str)]}, "digest": str}


def training_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Every tensor of the state, by name: the weights and AdamW's moments."""
    tensors = {}
    for (name, p), m, v in zip(model.named_parameters(), optimizer.exp_avg, optimizer.exp_avg_sq):
        tensors |= {f"weight.{name}": p.data, f"exp_avg.{name}": m, f"exp_avg_sq.{name}": v}
    return tensors


class States:
    """The states of a run whose folder this job has locked. Every rank has one and calls its methods together."""

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = folder, world
        # A group of its own: the writing goes on beside the training's exchanges.
        self.group = dist.new_group(backend="gloo")
        self.pending: Future | None = None
        self.named = threading.Event()
        self.failure = ""
        self.newest = 0  # the step of the newest whole state

    def save(self, step: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Begin to save the state of a step; tensors may change as soon as this returns.

        Raises:
            UserError: when the state before this one could not be written.
        """
        self.wait()
        if step == self.newest:
            return
        beside = path_beside(self.folder / f"step-{step:06d}")
        beside = self.world.first(lambda: (beside.mkdir(parents=True), beside)[1])
        self.named.clear()
        writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
        # async_save writes from a copy on the host. Copying ahead would ask CUDA for a stream, in a new thread and so on the
        # first device, where every rank would then hold a context.
        writer.per_thread_copy_ahead = 0
        self.pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        if self.world.rank == 0:
            # Rank 0's part is done when every rank's is: it gathers their word.
            self.pending.add_done_callback(lambda future: self._name(beside, step, notes, future))

    def wait(self) -> None:
        """Until the state that is being written is whole.

        Raises:
            UserError: when it could not be written; the ones before it are as they were.
        """
        if self.pending is None:
            return
        error = self.pending.exception()
        self.pending = None
        if self.world.rank == 0:
            self.named.wait()
        elif error:
            self.failure = _cause(error)
        failures: list = [None] * self.world.size
        dist.all_gather_object(failures, self.failure, group=self.group)
        if any(failures):
            last = f"the last whole one is step {self.newest}" if self.newest else "there is none yet"
            raise UserError(f"cannot save the training state in {self.folder}: {next(filter(None, failures))}; {last}")

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fill tensors from the newest whole state.

        Returns:
            Its notes, or None when there is none; then the tensors are as they were.
        """
        found = self.world.first(self._newest_whole)
        if found is None:
            return None
        path, notes = found
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), process_group=self.group)
        except CheckpointException as error:
            raise UserError(f"the training state {path} is not this model's: {_cause(error)}") from None
        self.newest = notes["step"]
        return notes

    def drop(self) -> None:
        """Remove all states: the run has ended and needs none."""
        self.wait()
        self.world.first(lambda: remove(self.folder))

    def _name(self, beside: Path, step: int, notes: dict[str, Any], future: Future) -> None:
        """On rank 0, in the writer's thread: digest what was written, give it its name, and let the oldest go."""
        try:
            future.result()
            kept = {"step": step, "notes": notes, "files": _digests(sorted(beside.iterdir()))}
            text = json.dumps({**kept, "digest": _digest_of(kept)}, indent=1)
            (beside / _NOTES).write_text(text, encoding="utf-8")
            move_into_place(beside, self.folder / f"step-{step:06d}")
            self.newest = step
            for old in self._steps()[:-KEEP]:
                remove(old)
        except BaseException as error:  # dcp's own is no Exception; wait() raises it in the loop
            self.failure = _cause(error)
            with contextlib.suppress(OSError):
                remove(beside)
        finally:
            self.named.set()

    def _steps(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        remove_leftovers(self.folder, locked=True)
        for path in reversed(self._steps()):
            try:
                return path, _notes_of(path)
            except UserError as error:
                # Its name is wanted again; what it holds is kept.
                aside = next(p for i in itertools.count(1) if not (p := path.with_suffix(f".damaged-{i}")).exists())
                path.rename(aside)
                print(f"warning: {error}; it is kept as {aside.name}, the one before it is tried", flush=True)
        return None


def resume(states: States, model: nn.Module, optimizer: AdamW, guards: Guards, began_with: dict[str, str]) -> int:
    """Put the run where its newest state left it: the number of steps that are done.

    Raises:
        UserError: when the digests of what the run began with are not those of now.
    """
    notes = states.load(training_tensors(model, optimizer))
    if notes is None:
        return 0
    guards.restore(notes)
    before = notes["began_with"]
    others = {
        "data": "other data, or another tokenizer",
        "dtype": f"--dtype {before.get('dtype')}, not {began_with.get('dtype')}",
        "reference": "another model as DPO's reference",
    }
    if other := next((other for what, other in others.items() if before.get(what) != began_with.get(what)), None):
        raise UserError(f"the run in {states.folder.parent} began with {other}: give another --out")
    for count in optimizer.num_steps:
        count.fill_(notes["step"] - notes["skipped"])
    states.world.say(f"going on after step {notes['step']}")
    return notes["step"]


def _notes_of(path: Path) -> dict[str, Any]:
    """The notes of a state.

    Raises:
        UserError: when it is not whole: as it was written, and with nothing added.
    """
    kept = check(str(path / _NOTES), read_json(path / _NOTES), _SHAPE)
    if kept["digest"] != _digest_of(kept):
        raise UserError(f"the training state {path} is damaged ({_NOTES})")
    if kept["step"] != int(path.name[5:]):
        raise UserError(f"the training state {path} is that of step {kept['step']}")
    names = {file.name for file in path.iterdir()} - {_NOTES}
    try:
        found = _digests([path / name for name in sorted(names)])
    except OSError as error:
        raise UserError(f"the training state {path} cannot be read ({error.strerror})") from None
    wrong = [name for name in sorted({*names, *kept["files"]}) if found.get(name) != kept["files"].get(name)]
    if wrong:
        raise UserError(f"the training state {path} is damaged ({', '.join(wrong)})")
    return {**kept["notes"], "step": kept["step"]}


def _digests(paths: list[Path]) -> dict[str, list]:
    """Each file's size and blake2b, by its name; several files at a time, since they are as large as the model."""
    with ThreadPoolExecutor() as pool:
        sizes_and_digests = pool.map(lambda path: [path.stat().st_size, file_digest(path, 16).hex()], paths)
        return dict(zip((path.name for path in paths), sizes_and_digests))


def _digest_of(kept: dict[str, Any]) -> str:
    return digest(json.dumps([kept[key] for key in ("step", "notes", "files")], sort_keys=True).encode())


def _cause(error: BaseException) -> str:
    """The first cause's own words: dcp wraps every rank's error in one of its own."""
    for inner in getattr(error, "failures", {}).values():
        return _cause(inner[0] if isinstance(inner, tuple) else inner)
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[-1]
