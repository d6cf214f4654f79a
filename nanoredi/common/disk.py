"""How files get onto the disk: whole, and by one process at a time.

A file or folder is written beside its place, brought onto the disk, and then takes its name in one step (writing). So
whatever has its name is whole, whoever was killed; what a killed process left beside is recognised and removed by the next
one (remove_leftovers). A folder that only one process may write into is locked until that process ends.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from nanoredi.common.errors import UserError

_HOST = os.uname().nodename
_STARTED = time.strftime("%Y-%m-%d %H:%M:%S")
_UMASK = os.umask(0o077)  # it can only be asked for by setting it
os.umask(_UMASK)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Inside, a file or a folder is made at the path that this yields; then it takes its name.

    A file replaces the one that is there. A folder wants nothing there, or an empty folder.

    Raises:
        UserError: when the disk refuses any of it; then nothing is left of it, and what was there is as it was.
    """
    beside = path_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(beside)
        yield beside
        move_into_place(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(beside)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        raise


@contextlib.contextmanager
def writing_together(out: Path) -> Iterator[Path]:
    """Inside, files are made in the folder that this yields; then all of them get their names in the folder out, or none does.
    They replace nothing.

    Raises:
        OSError: when the disk refuses any of it, or there is such a file.
    """
    beside = path_beside(out / "files")
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in sorted(beside.iterdir()):
            may_crash()
            _sync(path)
            may_crash()
            try:
                os.link(path, out / path.name)
            except FileExistsError:
                raise
            except OSError:  # a disk without links
                path.rename(out / path.name)
        _sync_entry(out)
    finally:
        _take_back(beside, out)
        remove(beside)


def _take_back(beside: Path, out: Path) -> None:
    """Of files that get their names together, those that have them lose them again, when some have none."""
    files = [path for path in beside.iterdir() if path.is_file()] if beside.is_dir() else []
    named = [out / path.name for path in files if (out / path.name).exists() and path.samefile(out / path.name)]
    for path in named if len(named) < len(files) else ():
        remove(path)


def path_beside(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.writing")


def move_into_place(beside: Path, path: Path) -> None:
    """Bring what was written beside onto the disk, with the permissions that this user's files have, and rename it.

    Raises:
        OSError: when the disk refuses it.
    """
    may_crash()
    _sync(beside)
    may_crash()
    beside.replace(path)
    _sync_entry(path.parent)
    may_crash()


def _sync(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
    elif path.stat().st_mode & 0o777 != 0o666 & ~_UMASK:
        path.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. A folder loses its name first: no part of one is taken for whole."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".writing":
            path = path.rename(path_beside(path))
        may_crash()
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, locked: bool = False) -> None:
    """Remove what killed processes were writing in a folder. One that this process has locked holds nobody else's work;
    elsewhere only this machine's processes are known to have ended."""
    for path in folder.glob("*.writing"):
        own = re.fullmatch(rf".*\.{re.escape(_HOST)}\.([0-9]+)\.writing", path.name)
        if locked or own and not _is_alive(int(own[1])):
            _take_back(path, folder)
            remove(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def lock(folder: Path) -> None:
    """Make this process the only one that may write into a folder, until it ends, in whichever way.

    The lock is the kernel's, on the file .lock, so a killed process leaves none; on a shared disk it holds as far as that
    disk passes locks on.

    Raises:
        UserError: naming the process that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = f"process {os.getpid()} on {_HOST}, started {_STARTED}"
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # open until the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if os.pread(file, 200, 0) != me.encode():
            time.sleep(0.2)  # whoever has just taken it writes its name now
            owner = os.pread(file, 200, 0).decode(errors="replace")
            raise UserError(f"{folder} is in use by {owner or 'another process'}: give another --out") from None
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error.strerror}): start nothing else on it", flush=True)
    else:
        os.ftruncate(file, 0)
        os.pwrite(file, me.encode(), 0)


def regular(path: Path) -> Path:
    """The path. Raises a UserError for a pipe or a device, since files are read again and must end, and for the pointer that
    git-lfs leaves in place of a large file."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device; give a file, which can be read again")
    if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to a file that git-lfs has not fetched: git lfs pull")
    return path


def digest(*parts: bytes | Path) -> str:
    """32 hex digits that stand for bytes and for the contents of files."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(file_digest(part) if isinstance(part, Path) else part)
    return whole.hexdigest()


def file_digest(path: Path, size: int = 64) -> bytes:
    with open(regular(path), "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=size)).digest()


_places = itertools.count(1)


def may_crash() -> None:
    """Called at every write and rename: the tests end the process (SIGKILL) at the NANOREDI_CRASH_AT-th of them."""
    if (place := os.environ.get("NANOREDI_CRASH_AT")) and next(_places) == int(place):
        os.kill(os.getpid(), signal.SIGKILL)
