"""Files are written completely or not at all, and by one process at a time."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoredi.common import disk
from nanoredi.common.disk import (
    digest,
    lock,
    move_into_place,
    path_beside,
    remove,
    remove_leftovers,
    writing,
    writing_together,
)
from nanoredi.common.errors import UserError

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "f"
    for text in ("one", "two"):
        with writing(path) as beside:
            beside.write_text(text)
            assert not path.exists() or path.read_text() == "one"
    with pytest.raises(ZeroDivisionError), writing(path) as beside:
        beside.write_text("three")
        raise ZeroDivisionError
    assert path.read_text() == "two" and os.listdir(path.parent) == ["f"]


def test_a_folder_replaces_only_an_empty_one(tmp_path):
    path = tmp_path / "f"
    for _ in range(2):
        with writing(path) as beside:
            (beside / "deeper").mkdir(parents=True)
            (beside / "deeper" / "file").write_text("x")
        assert (path / "deeper" / "file").read_text() == "x"
        remove(path)
        path.mkdir()
    (path / "mine").write_text("dear")
    with pytest.raises(UserError, match=r"cannot write .*/f: Directory not empty"), writing(path) as beside:
        beside.mkdir()
    assert os.listdir(tmp_path) == ["f"] and os.listdir(path) == ["mine"]
    with pytest.raises(UserError, match=r"cannot write .*/mine/f: File exists"), writing(path / "mine" / "f"):
        pass


def test_new_files_have_the_user_s_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("x")
    with writing(tmp_path / "f") as beside:
        beside.touch(0o600)
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("place, is_whole", [(1, False), (2, False), (3, True)])
def test_killed_at_any_write(place, is_whole, tmp_path):
    code = f"import nanoredi.common.disk as d, pathlib\nwith d.writing(pathlib.Path({str(tmp_path)!r}, 'f')) as b: b.mkdir()"
    process = python(code, NANOREDI_CRASH_AT=str(place))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "f").exists() == is_whole and len(os.listdir(tmp_path)) == 1
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == (["f"] if is_whole else [])


def test_only_leftovers_are_removed(tmp_path):
    mine = path_beside(tmp_path / "f")
    elsewhere = tmp_path / "f.another-host.1.writing"
    for path in (mine, elsewhere, tmp_path / "f"):
        path.touch()
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 3
    (tmp_path / "novel.writing").touch()
    remove_leftovers(tmp_path, locked=True)
    assert names(tmp_path) == ["f", "novel.writing"]
    (tmp_path / "novel.writing").unlink()
    mine.touch()
    move_into_place(mine, tmp_path / "g")
    assert sorted(os.listdir(tmp_path)) == ["f", "g"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def together(out, linked=("a", "b")):
    """The leftovers of a process that was killed while writing a and b together."""
    beside = out / f"files.{os.uname().nodename}.999999.writing"
    beside.mkdir(parents=True)
    for name in ("a", "b"):
        (beside / name).write_text("killed")
    for name in linked:
        os.link(beside / name, out / name)


def test_several_files_appear_together_and_replace_nothing(tmp_path):
    out = tmp_path / "new" / "out"
    with writing_together(out) as beside:
        (beside / "a").write_text("1")
        (beside / "b").write_text("2")
    assert names(out) == ["a", "b"] and (out / "b").read_text() == "2"
    for name in ("b", "c"):
        with pytest.raises(UserError, match=f"cannot write to .*{name}: "), writing_together(tmp_path / name) as beside:
            for file in ("a", "b", "c"):
                (beside / file).write_text("mine")
            (tmp_path / name / name).write_text("yours")
        assert names(tmp_path / name) == [name] and (tmp_path / name / name).read_text() == "yours"


def test_a_full_disk_names_their_folder(tmp_path):
    with pytest.raises(UserError, match="cannot write to .*/out: No space left"), writing_together(tmp_path / "out"):
        with open("/dev/full", "w") as file:
            file.write("x")
    assert names(tmp_path / "out") == []


def test_a_disk_without_hard_links_permissions_locks_and_synced_folders_will_do(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    def sync(entry):
        if stat.S_ISDIR(os.fstat(entry).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(disk.os, "fsync", sync)
    for module, name in ((disk.os, "link"), (Path, "chmod"), (disk.fcntl, "flock")):
        monkeypatch.setattr(module, name, refuse)
    lock(tmp_path / "run")
    lock(tmp_path / "run")
    assert capsys.readouterr().out.count("run cannot be locked (Operation not supported): do not start a second") == 2
    with writing_together(tmp_path / "run") as beside:
        (beside / "a").touch(0o600)
    with writing(tmp_path / "run" / "b") as beside:
        beside.mkdir()
    assert names(tmp_path / "run") == [".lock", "a", "b"]


def test_a_killed_process_leaves_all_of_its_files_or_none(tmp_path):
    together(tmp_path / "all")
    together(tmp_path / "one", ["a"])
    together(tmp_path / "theirs", ["a"])
    (tmp_path / "theirs" / "b").write_text("yours")
    together(tmp_path / "moved", [])
    (tmp_path / "moved" / "a").write_text("yours")
    for folder in tmp_path.iterdir():
        remove_leftovers(folder)
    found = {folder.name: names(folder) for folder in tmp_path.iterdir()}
    assert found == {"all": ["a", "b"], "one": [], "theirs": ["b"], "moved": ["a"]}


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    folder = tmp_path / "run"
    code = f"import nanoredi.common.disk as d, pathlib, time\nd.lock(pathlib.Path({str(folder)!r})); print('has it', flush=True); time.sleep(60)"
    owner = python(code)
    assert owner.stdout.readline() == "has it\n"
    with pytest.raises(UserError, match=f"run is in use by process {owner.pid} on {os.uname().nodename}, started 2"):
        lock(folder)
    owner.kill()
    owner.communicate()
    lock(folder)
    lock(folder)  # a process may lock again what it has locked
    second = python(code)
    assert f"process {os.getpid()} on" in second.communicate()[1]


def test_digests(tmp_path):
    (tmp_path / "f").write_text("text")
    assert digest(b"a", tmp_path / "f") == digest(b"a", tmp_path / "f") != digest(b"b", tmp_path / "f")
    before = digest(tmp_path / "f")
    time.sleep(0)
    (tmp_path / "f").write_text("test")
    assert digest(tmp_path / "f") != before
