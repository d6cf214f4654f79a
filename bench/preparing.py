"""How much memory and time prepare takes on synthetic shards as large as OpenR1-Math-Raw.

    python -m bench.preparing --tokenizer DIR --folder NEW_FOLDER [--rows 516499] [--shards 20] [--correct 0.15]

A row has two traces with a median of 10,000 characters. The share of rows with a correct trace is that of the real data
after its filters; two thirds of these rows also have an incorrect one. Tokenising these traces takes most of the time,
so a smaller share would flatter the result. Every shard is a single row group, the worst case for reading.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).parent.parent
WORDS = (
    "so we have x y the = + - \\frac{1}{2} 12 7 305 \\( \\) \\sqrt{3} therefore let's check that sum is equal to n \n\n"
)
# Run in a separate process, which prints at its end the peak of its memory as counted by Linux.
PREPARE = """
import sys
from nanoredi import prepare
prepare.main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"prepare: at most {int(peak.split()[1]) / 1024**2:.2f} GiB of memory", end=" ")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder")
    parser.add_argument("--folder", required=True, help="a new folder for the shards and the prepared files")
    parser.add_argument("--rows", type=int, default=516_499, help="rows in all [516499]")
    parser.add_argument("--shards", type=int, default=20, help="number of files [20]")
    parser.add_argument("--correct", type=float, default=0.15, help="share of rows with a correct trace [0.15]")
    flags = parser.parse_args()
    folder = Path(flags.folder).resolve()
    (folder / "raw").mkdir(parents=True)
    rng = random.Random(0)
    pool = " ".join(rng.choices(WORDS.split(" "), k=500_000))
    for shard in range(flags.shards):
        mine = range(shard, flags.rows, flags.shards)
        table = pyarrow.Table.from_pylist([row(pool, rng, flags.correct) for _ in mine])
        pyarrow.parquet.write_table(table, folder / "raw" / f"train-{shard:05}.parquet", row_group_size=len(mine))
    shards = list((folder / "raw").iterdir())
    groups = [pyarrow.parquet.read_metadata(shard).row_group(0) for shard in shards]
    sizes = sum(shard.stat().st_size for shard in shards), sum(group.total_byte_size for group in groups)
    print(
        f"{flags.rows:,} rows, {flags.shards} shards, {sizes[0] / 1e9:.1f} GB, {sizes[1] / 1e9:.1f} GB as text",
        flush=True,
    )

    words = [f"--raw={folder / 'raw'}", f"--out={folder / 'out'}", f"--tokenizer={Path(flags.tokenizer).resolve()}"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", PREPARE, *words], cwd=ROOT, check=True)
    print(f"in {time.perf_counter() - start:,.0f} s")


def row(pool: str, rng: random.Random, share: float) -> dict[str, Any]:
    """A row with a correct trace or, mostly, without one; its texts are slices of the pool."""
    draw = rng.random()
    correct = [True, False] if draw < share * 2 / 3 else [True, True] if draw < share else [False, False]
    return {
        "problem": slice_of(pool, rng, 200),
        "source": "olympiads",
        "problem_is_valid": "Yes",
        "solution": slice_of(pool, rng, 500),
        "generations": [slice_of(pool, rng, int(rng.lognormvariate(9.2, 0.6))) for _ in correct],
        "correctness": {"llama_verification": correct, "math_verify_reparsed_answer": correct},
    }


def slice_of(pool: str, rng: random.Random, length: int) -> str:
    start = rng.randrange(len(pool) - length)
    return pool[start : start + length]


if __name__ == "__main__":
    main()
