"""Shared by the attacks: mutated values, texts and bytes, and the only two outcomes that are allowed."""

import contextlib
import copy
import gzip
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanoredi.common.errors import sentence

VALUES: list[Any] = [
    *(None, True, False, "", " ", "96", "a\0b", "\x1b[2J", "\ud800", "{problem}", "x" * 10_000, "\\boxed{" * 50),
    *(0, -1, 1, 3, 2**31, 10**9, 10**30, 0.5, -1e-9, 1e300, [], [1], ["a"], [[]], [None], {}, {"a": 1}, {"": {}}),
]
_HARD = ["9^{9^{9^{9}}}", "(" * 3000 + "1" + ")" * 3000, "\\frac{" * 500, "10^{10^{10}}!", "\\sqrt" * 999, "1," * 9999]
_PIECES = ["", "\0", "\x1b]0;x\a", "\u202e", "\ud800", "<think>", "\\boxed{", "}", "{", "<|im_end|>", "\n", "9" * 5000]
_PIECES += [
    f"\\boxed{{{answer}}}" for answer in [*_HARD, "1/" * 999, "1e999999999", "[0," * 300, "\\begin{matrix}" * 99]
]
SECONDS, BYTES = 60, 2 << 30  # limits of an attempt


class TooLong(BaseException):
    """An attempt took more than SECONDS."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Inside, this process may allocate at most BYTES of memory beyond what it has."""

    def stop(*_: object) -> None:
        raise TooLong

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # runs' locks stay open until this process ends
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, hard))
    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def end(attempt: Callable[[], object]) -> str:
    """How an attempt ends: empty for a success, otherwise its one-sentence error.

    Raises:
        AssertionError: for any other end.
    """
    signal.alarm(SECONDS)
    try:
        attempt()
        return ""
    except SystemExit as exit:
        assert not exit.code, f"it ended with {exit.code}"
        return ""
    except MemoryError:
        raise AssertionError("it asked for too much memory") from None
    except Exception as error:
        text = sentence(error)
        if text is None:
            raise
        assert text.strip() and "\n" not in text.strip(), f"more than a sentence: {text}"
        return text
    finally:
        signal.alarm(0)


def mutated(value: Any, rng: random.Random, names: tuple[str, ...] = ("x",)) -> Any:
    """A JSON value with one of its parts dropped, duplicated, added or replaced.

    Args:
        names: that a new field of an object may have.
    """
    value = copy.deepcopy(value)
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return _changed_text(value, rng) if isinstance(value, str) and rng.random() < 0.4 else rng.choice(VALUES)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    way = rng.random()
    if way < 0.15:
        del value[key]
    elif way < 0.25 and isinstance(value, dict):
        value[rng.choice(names)] = rng.choice([*VALUES, value[key]])
    elif way < 0.25:
        value.insert(key, value[rng.randrange(len(value))])
    elif way < 0.3:
        value[key] = [value[key]]
    else:
        value[key] = mutated(value[key], rng, names)
    return value


def _changed_text(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    piece = rng.choice(_PIECES)
    return text[:place] + piece + text[place + rng.randrange(4) :] * rng.choice([0, 1, 1, 1, 50])


def text_of(value: Any, rng: random.Random) -> str:
    """A value as JSON text, sometimes in a form that no program would write."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7, allow_nan=True)
    way = rng.random()
    if way < 0.02:
        return f"{text[:-1]}, {text[1:]}" if isinstance(value, dict) and value else text * 2  # every key twice
    if way < 0.08:
        bad = rng.choice(
            ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 200_000, '{"a":' * 5000, '"\\ud800"', "[" * 90 + "]" * 90]
        )
        old = rng.choice(["0", "1", "true", '"'])
        return text.replace(old, bad, 1)
    return text


def broken(data: bytes, rng: random.Random) -> bytes:
    """Bytes truncated, overwritten, or with others inserted."""
    place = rng.randrange(len(data) + 1)
    way = rng.random()
    if way < 0.4:
        return data[:place]
    if way < 0.6:
        return data[:place] + rng.randbytes(3) + data[place + 3 :]
    piece = rng.choice([b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n\n", b"\xed\xa0\x80", b"\0" * 5000, data[:200]])
    return data[:place] + piece + data[place:] if way < 0.9 else piece + data


def break_file(path: Path, rng: random.Random, names: tuple[str, ...] = ("x",)) -> None:
    """Mutate a file: JSON and JSONL by their values, sometimes by their bytes, as all others are."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        data = text_of(mutated(json.loads(data), rng, names), rng).encode(errors="surrogatepass")
    elif path.suffix == ".jsonl" and rng.random() < 0.8:
        lines = data.decode().splitlines()
        place = rng.randrange(len(lines))
        way = rng.random()
        if way < 0.1:
            del lines[place]
        elif way < 0.2:
            lines.insert(place, lines[rng.randrange(len(lines))])
        else:
            lines[place] = text_of(mutated(json.loads(lines[place]), rng, names), rng)
        data = "".join(line + "\n" for line in lines).encode(errors="surrogatepass")
    else:
        data = broken(data, rng)
    path.write_bytes(gzip.compress(data) if rng.random() < 0.03 else data)


def snapshot(folder: Path) -> dict[str, bytes]:
    """{file: content} of a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


_OWN = (".lock", "config.toml", "drawn.jsonl.settings.json")
_CLOCK = ("tokens_per_s", "peak_memory_gb", "matrix_share")


def contents(folder: Path) -> dict[str, object]:
    """{file: content} of a run, without what depends on the time, the process or the folder's name."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _OWN):
        name = str(path.relative_to(folder))
        if path.name in ("metrics.jsonl", "samples.jsonl", "drawn.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = sorted(json.dumps({k: v for k, v in row.items() if k not in _CLOCK}) for row in rows)
        else:
            found[name] = path.read_bytes()
    return found
