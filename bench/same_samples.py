"""How many samples stay the same, bit for bit, when their batch changes.

    python bench/same_samples.py                         runs/toy/final on the toy's problems
    python bench/same_samples.py --model DIR --problems FILE.jsonl --num 50 --n 4 --max_tokens 500

Samples of a batch of 64, in fp32 and in bf16, are compared with those of batches of 1 and of 8, of several runs (as if
the first was interrupted), of two processes (as if of two ranks), and of a cache so small that rows are preempted.
"""

import argparse
import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanoredi.config import SamplingConfig  # noqa: E402
from nanoredi.data.benchmarks import load  # noqa: E402
from nanoredi.data.messages import user_message  # noqa: E402
from nanoredi.data.tokenizer import Tokenizer  # noqa: E402
from nanoredi.model.hf_folder import stop_ids  # noqa: E402
from nanoredi.model.qwen2 import Qwen2  # noqa: E402
from nanoredi.sampler.sampler import Sampler  # noqa: E402
from nanoredi.sampler.scheduler import requests_for  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Tokens = dict[tuple[tuple[int, ...], int], list[int]]  # by prompt and sample number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/toy/final")
    parser.add_argument("--problems", default="runs/toy/data/toy.jsonl")
    parser.add_argument("--num", type=int, default=50)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=500)
    parser.add_argument("--batch_invariant", default="true")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        torch.set_num_threads(1)
        print(sampled(args, args.dtypes[0], every=slice(args.rank, None, 2)))
        return
    print("| dtype | samples | tokens | alone | 8 at once | several runs | two processes | small cache |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in args.dtypes:
        whole = sampled(args, dtype)
        longest = max(len(prompt) for prompt, _ in whole) + args.max_tokens
        pages = 3 * -(-longest // 32)
        others = [
            sampled(args, dtype, batch_size=1),
            sampled(args, dtype, batch_size=8),
            {k: v for start in range(3) for k, v in sampled(args, dtype, every=slice(start, None, 3)).items()},
            ranks(args, dtype),
            sampled(args, dtype, pages=pages),
        ]
        shares = [f"{sum(whole[key] == other[key] for key in whole) / len(whole):.1%}" for other in others]
        tokens = sum(map(len, whole.values()))
        print(f"| {dtype} | {len(whole)} | {tokens:,} | {' | '.join(shares)} |", flush=True)


def sampled(
    args: argparse.Namespace, dtype: str, batch_size: int = 64, every: slice = slice(None), pages: int = 0
) -> Tokens:
    tokenizer = Tokenizer(args.model)
    model = Qwen2.from_pretrained(args.model, dtype=getattr(torch, dtype), device=DEVICE).pack()
    config = SamplingConfig(max_tokens=args.max_tokens, batch_size=batch_size, page_size=32, dtype=dtype)
    config.batch_invariant = args.batch_invariant == "true"
    c = model.config
    sizes = c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    a_page = 2 * sizes * config.page_size * getattr(torch, dtype).itemsize
    config = dataclasses.replace(config, cache_gb=pages * a_page / 1e9)
    prompts = [
        tokenizer.encode(tokenizer.prompt(user_message(question)))
        for question in load(args.problems, "", args.num).questions
    ]
    requests = requests_for(prompts, args.n, config.seed)[every]
    done = Sampler(model, stop_ids(tokenizer), config).run(requests)
    return {(tuple(request.prompt), request.sample): request.tokens for request in done}


def ranks(args: argparse.Namespace, dtype: str) -> Tokens:
    words = [f"--{name}={value}" for name, value in vars(args).items() if name not in ("dtypes", "rank")]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *words, f"--rank={rank}", "--dtypes", dtype], stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    together: Tokens = {}
    for process in processes:
        together |= ast.literal_eval(process.communicate()[0].decode())
    return together


if __name__ == "__main__":
    main()
