"""Token sequences cached on disk, keyed by the data's content, the tokenizer and the rules: a second start only maps
them into memory."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanoredi.common.disk import digest, remove, remove_leftovers, writing
from nanoredi.common.errors import UserError
from nanoredi.common.files import check, read_json, read_rows
from nanoredi.common.formats import check_is_file, num_rows
from nanoredi.common.progress import progress
from nanoredi.data.tokenizer import Tokenizer

Arrays = tuple[np.ndarray, np.ndarray, float]  # a sequence: tokens (n,) int32, learned (n,) bool, its weight
_ARRAYS = {"tokens": np.int32, "learned": np.bool_, "weights": np.float32, "offsets": np.int64}


def cached(
    path: str, tokenizer: Tokenizer, cache: str, rules: tuple, texts: Callable, arrays: Callable
) -> tuple[Any, ...]:
    """A file's rows as sequences, from the cache if they are in it.

    Args:
        rules: everything else that the sequences depend on.
        texts: a function of (place, row, counts of what was cut or dropped) that returns the texts to encode and
            anything else that `arrays` needs, or None to drop the row.
        arrays: a function of (encodings, the other result of `texts`, counts) that returns the row's sequences.

    Returns:
        tokens (total,), learned (total,), weights (M,), offsets (M+1,), notes for the user, and their digest_in.
    """
    check_is_file(Path(path))
    try:
        folder = Path(cache) / digest(repr(rules).encode(), Path(path), *tokenizer.files)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    if damaged := folder.exists() and not _is_whole(folder):
        remove(folder)
    if not folder.exists():
        remove_leftovers(Path(cache))
        try:
            with writing(folder) as made:
                made.mkdir()
                _fill(made, path, tokenizer, texts, arrays)
        except UserError:  # perhaps because another run has written the same cache meanwhile
            if not _is_whole(folder):
                raise
    notes = [f"{path}: {note}" for note in json.loads((folder / "whole.json").read_text())["notes"]]
    if damaged:
        notes.append(f"{path}: its token cache {folder} was damaged and has been rebuilt")
    return *_arrays(folder), notes, digest_in(folder)


def digest_in(folder: Path) -> str:
    """The digest of the sequences in a cache's folder, the same whatever they were made from. Raises a UserError when
    there is no such folder."""
    if (folder / "offsets.npy").exists():  # a cache of 28 November 2026 or earlier, without weights
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        offsets.tofile(folder / "offsets")
        np.ones(len(offsets) - 1, np.float32).tofile(folder / "weights")
        return digest(json.dumps(_digests(folder), sort_keys=True).encode())
    whole = check(str(folder), read_json(folder / "whole.json"), {"digests": {str: str}})
    return digest(json.dumps(whole["digests"], sort_keys=True).encode())


def _fill(folder: Path, path: str, tokenizer: Tokenizer, texts: Callable, arrays: Callable) -> None:
    """Write the arrays and whole.json. Sequences are written one at a time, so they need not fit in memory."""
    if not (total := num_rows(Path(path))):
        raise UserError(f"{path} holds no rows")
    lengths, weights, counts = [0], [], Counter[str]()
    rows = progress(read_rows(path), f"tokenising {Path(path).name}", total, "rows", delay=1)
    made = ((where, *parts) for where, row in rows if (parts := texts(where, row, counts)))
    with open(folder / "tokens", "wb") as all_tokens, open(folder / "learned", "wb") as all_learned:
        for kept, encodings in tokenizer.encode_rows(made):
            for tokens, learned, weight in arrays(encodings, kept, counts):
                all_tokens.write(tokens)
                all_learned.write(learned)
                lengths.append(len(tokens))
                weights.append(weight)
    notes = [f"{count:,} of {total:,} {what}" for what, count in counts.items() if count]
    if not weights:
        raise UserError(f"no row of {path} is left: {'; '.join(notes)}")
    np.array(weights, dtype=np.float32).tofile(folder / "weights")
    np.cumsum(lengths, dtype=np.int64).tofile(folder / "offsets")
    (folder / "whole.json").write_text(json.dumps({"notes": notes, "digests": _digests(folder)}))


def _digests(folder: Path) -> dict[str, str]:
    return {name: digest(folder / name) for name in _ARRAYS}


def _arrays(folder: Path) -> list[np.ndarray]:
    return [np.asarray(np.memmap(folder / name, dtype, "r")) for name, dtype in _ARRAYS.items()]


def _is_whole(folder: Path) -> bool:
    """Whether a cache is undamaged: the arrays match their digests (about a second per gigabyte) and each other."""
    try:
        whole = check(str(folder), read_json(folder / "whole.json"), {"notes": [str], "digests": {str: str}})
        if whole["digests"] != _digests(folder):
            return False
        tokens, learned, weights, offsets = _arrays(folder)
    except (OSError, ValueError, UserError):  # ValueError: an array that is empty, or ends within an element
        return False
    fits = len(offsets) == len(weights) + 1 and offsets[0] == 0 and offsets[-1] == len(tokens) == len(learned)
    valid = fits and np.diff(offsets).min() >= 2 and tokens.min() >= 0 and np.isfinite(weights).all()
    return bool(valid and np.logical_or.reduceat(learned, offsets[:-1] + 1).all())
