"""How fast rows become tokens on disk, against `encode_batch` of the same texts, in the same run.

    python -m bench.tokenising --tokenizer DIR --data sft.jsonl [--rows 500] [--rounds 7]

The methods take turns, so that other load on the machine affects all of them alike; CPU time, summed over all threads,
depends on it less than wall time:

    encode_batch     `tokenizers` alone: the templated texts are in memory, the encodings are discarded
    ... and ids      the same, and the ids are read, as training needs them
    load_sft         nanoredi: read the file, check and template the rows, encode, mark learned tokens, write the cache
    digest           only the digest of the file, which names the cache
    again            a second start, from the cache: the digests of file and cache
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from nanoredi.common.disk import digest
from nanoredi.common.files import read_rows
from nanoredi.data.sequences import load_sft
from nanoredi.data.tokenizer import Tokenizer

LONGEST = 10**9  # nothing is truncated: all methods encode the same tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="JSONL file of rows with messages, as prepare writes them")
    parser.add_argument("--rows", type=int, default=500, help="rows to take from its start [500]")
    parser.add_argument("--rounds", type=int, default=7, help="times that each method is measured [7]")
    flags = parser.parse_args()
    tokenizer = Tokenizer(flags.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        rows = [row for _, row in islice(read_rows(flags.data), flags.rows)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(data, (0, 0))  # as if the file were old
        texts = ["".join(tokenizer.split(row["messages"])) for row in rows]
        total = sum(len(encoding) for encoding in tokenizer.encode_batch(texts))
        print(f"{len(rows):,} rows, {total / len(rows):,.0f} tokens each, {os.cpu_count()} cores", flush=True)

        seconds: dict[str, list[tuple[float, float]]] = {}
        for turn in range(flags.rounds):
            cache = str(Path(folder, f"cache-{turn}"))
            for name, work in {
                "encode_batch": lambda: encode(tokenizer, texts, take_ids=False),
                "... and ids": lambda: encode(tokenizer, texts, take_ids=True),
                "load_sft": lambda: load_sft(str(data), tokenizer, LONGEST, cache),
                "digest": lambda: digest(data),
                "again": lambda: load_sft(str(data), tokenizer, LONGEST, cache),
            }.items():
                seconds.setdefault(name, []).append(timed(work))
    print("                   wall, s  (least, most)           CPU, s  M tokens/s  encode_batch's time / this one's")
    plain = medians(seconds["encode_batch"])
    for name, times in seconds.items():
        clock, processor = medians(times)
        spread = f"({min(times)[0]:.3f}, {max(times)[0]:.3f})"
        ratios = f"{plain[0] / clock:.2f} by wall time, {plain[1] / processor:.2f} by CPU time"
        print(f"{name:14}  {clock:10.3f}  {spread:18} {processor:10.3f}  {total / clock / 1e6:10.2f}  {ratios}")


def encode(tokenizer: Tokenizer, texts: list[str], take_ids: bool) -> None:
    for start in range(0, len(texts), 256):
        encodings = tokenizer.backend.encode_batch(texts[start : start + 256], add_special_tokens=False)
        if take_ids:
            for encoding in encodings:
                _ = encoding.ids


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time and of CPU time."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    clock, processor = zip(*times)
    return statistics.median(clock), statistics.median(processor)


if __name__ == "__main__":
    main()
