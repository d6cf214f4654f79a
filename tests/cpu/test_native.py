"""Without a compiler, or with one that fails, PyTorch does the work."""

import pytest
import torch

from nanoredi.cpu import native


@pytest.fixture(autouse=True)
def nothing_compiled():
    native.compiled.cache_clear()
    yield
    native.compiled.cache_clear()


def test_a_missing_compiler_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library("pointwise", torch.float32, 16) is None
    assert "pointwise.c was not compiled (there is no C compiler, cc); PyTorch does" in capsys.readouterr().err


def test_unsupported_sizes_and_dtypes_are_not_compiled(monkeypatch):
    monkeypatch.setattr(native, "compiled", lambda *_, **__: pytest.fail("compiled"))
    for name, dtype, size in [
        ("causal", torch.float32, 48),
        ("decode", torch.bfloat16, 30),
        ("rows", torch.float64, 0),
    ]:
        assert native.library(name, dtype, size) is None


@pytest.mark.parametrize(
    "words, why",
    [
        ("echo no -fopenmp >&2; exit 1", "no -fopenmp"),
        ("exit 0", "library.so"),
        ("kill -0 -$$", "library.so"),
        (r"printf 'caf\351\n' >&2; exit 1", "caf"),
        ("exec sleep 60", "cc took over 1 seconds"),
        ('rm -rf "$(dirname "$(echo "$*" | grep -o "[^ ]*part.o")")"', "library.so"),
    ],
)
def test_a_failing_compiler_is_reported(words, why, tmp_path, monkeypatch, capsys):
    """It prints an error, writes no library, is out of Ctrl-C's reach (it leads a process group), prints bytes that are
    no text, hangs, or removes its folder."""
    monkeypatch.setattr(native, "_SECONDS", 1)
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{words}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert native.compiled("decode", SIZE=16, GROUP=1, PAGE=16, IN_BF16=0) is None
    note = capsys.readouterr().err
    assert note.startswith("note: decode.c was not compiled (") and why in note
