"""Writing files so that a file under its final name is always complete, and only one process writes at a time.

A file or folder is written under a temporary name next to its final one, synced to the disk, and renamed (writing).
What a killed process leaves behind is recognised by its temporary name and removed by the next process
(remove_leftovers). A folder that only one process may write into is locked until that process ends.
"""

import contextlib
import errno
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
_UMASK = os.umask(0o077)  # the only way to read it is to set it
os.umask(_UMASK)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields a temporary path at which to make a file or folder; on exit it is renamed to `path`.

    A file replaces an existing one. A folder may only replace an empty folder.

    Raises:
        UserError: when the disk refuses any step; then nothing new is left behind, and what was there is unchanged.
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
    """Yields a temporary folder in which to make files; on exit all of them move into the folder `out`, or none does.

    Raises:
        UserError: when the disk refuses any step, or a file of such a name exists: nothing is replaced.
    """
    beside = path_beside(out / "files")
    try:
        beside.mkdir(parents=True)
        yield beside
        for path in sorted(beside.iterdir()):
            may_crash()
            _sync(path)
            may_crash()
            try:
                os.link(path, out / path.name)
            except OSError:
                if (out / path.name).exists():
                    raise
                path.rename(out / path.name)  # the file system has no hard links
        _sync_entry(out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    finally:
        if beside.is_dir():
            _take_back(beside, out)
            remove(beside)


def _take_back(beside: Path, out: Path) -> None:
    """Undo a move of several files that was interrupted: unless all have reached `out`, those that have are removed."""
    files = [path for path in beside.iterdir() if path.is_file()] if beside.is_dir() else []
    named = [out / path.name for path in files if (out / path.name).exists() and path.samefile(out / path.name)]
    for path in named if len(named) < len(files) else ():
        remove(path)


def path_beside(path: Path) -> Path:
    """The temporary path at which this process writes what will be `path`."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.writing")


def move_into_place(beside: Path, path: Path) -> None:
    """Sync a finished file or folder to the disk, with the user's usual permissions, and rename it to `path`.

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
        with contextlib.suppress(OSError):  # exFAT, for one, has no permissions
            path.chmod(0o666 & ~_UMASK)  # safetensors creates files that only their owner can read
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some network disks sync no folders
            raise
    finally:
        os.close(entry)


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one. A folder is renamed first: half of one must not look complete."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".writing":
            path = path.rename(path_beside(path))
        may_crash()
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, locked: bool = False) -> None:
    """Remove what killed processes left half-written in a folder. If this process has locked it, that is everything
    with a temporary name; otherwise only what processes of this machine that have ended have left."""
    for path in folder.glob("*.*.[0-9]*.writing"):  # as path_beside names them
        own = re.fullmatch(rf".*\.{re.escape(_HOST)}\.([0-9]+)\.writing", path.name)
        if locked or own and not _is_alive(int(own[1])):
            _take_back(path, folder)
            remove(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is another user's
    return True


def lock(folder: Path) -> None:
    """Make this process the only one that may write into a folder, until it ends, and remove what killed ones left.

    The kernel's lock on the file .lock is used, so a killed process leaves none. On a network disk it works only if the
    disk supports locks.

    Raises:
        UserError: naming the process that holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = f"process {os.getpid()} on {_HOST}, started {_STARTED}"
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # stays open until the process ends
    if try_lock(file, folder):
        os.ftruncate(file, 0)
        os.pwrite(file, me.encode(), 0)
    elif os.pread(file, 200, 0) != me.encode():
        time.sleep(0.2)  # a process that has just taken the lock is still writing its name
        owner = os.pread(file, 200, 0).decode(errors="replace")
        raise UserError(f"{folder} is in use by {owner or 'another process'}: give another --out")
    remove_leftovers(folder, locked=True)


def try_lock(file: int, name: Path) -> bool:
    """Lock an open file until it is closed; False if another process has. A disk without locks gives only a warning."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"warning: {name} cannot be locked ({error.strerror}): do not start a second process on it", flush=True)
    return True


def regular(path: Path) -> Path:
    """The path itself. Raises a UserError for a pipe or a device, since input is read more than once, and for a pointer
    file that git-lfs leaves in place of a large file."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device; give a file, since it is read more than once")
    if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to a file that git-lfs has not fetched: git lfs pull")
    return path


def digest(*parts: bytes | Path) -> str:
    """A hash, 32 hex digits, of bytes and of the contents of files."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(file_digest(part) if isinstance(part, Path) else part)
    return whole.hexdigest()


def file_digest(path: Path, size: int = 64) -> bytes:
    with open(regular(path), "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=size)).digest()


_places = itertools.count(1)


def may_crash() -> None:
    """Called at every write and rename: tests kill the process (SIGKILL) at call number NANOREDI_CRASH_AT."""
    if (place := os.environ.get("NANOREDI_CRASH_AT")) and next(_places) == int(place):
        os.kill(os.getpid(), signal.SIGKILL)
