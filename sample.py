"""Prompt to text: sample completions from a model.

    python sample.py                                      the newest model under runs/, on problems of its own benchmark
    python sample.py --model DIR --prompt "What is 7 * 8?" --n 4
    python sample.py --model DIR --prompts prompts.jsonl --n 16 --out samples.jsonl

Rows of prompts are {"prompt": TEXT} or {"messages": [...]}; rows of out repeat them and add completion,
finish_reason, tokens, sample, each when it is done; Ctrl-C leaves those that are. Where a flag is not given, the
model's run or the recipe decides ([evaluate]), then the default.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanoredi.common.errors import UserError, run_script
from nanoredi.common.files import read_rows, write_row
from nanoredi.common.flags import Tables, option, read_flags, read_recipe, resolve
from nanoredi.common.progress import progress
from nanoredi.common.runs import newest_model, recipe_of
from nanoredi.config import EvaluateConfig, SamplingConfig
from nanoredi.data import benchmarks
from nanoredi.data.messages import check_messages
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.model.hf_folder import stop_ids
from nanoredi.model.qwen2 import Qwen2
from nanoredi.sampler.sampler import Sampler
from nanoredi.sampler.scheduler import Request, requests_for
from nanoredi.trainer.distributed import compute_dtype

_PROBLEMS_TO_SHOW = 3


@dataclass
class SampleFlags(SamplingConfig):
    """sample.py's own flags."""

    n: int = option(1, "samples a prompt", low=1)
    model: str = option("", "Hugging Face folder; empty: the newest model under runs/")
    prompt: str = option("", "text of the user's message")
    prompts: str = option("", "JSONL file of prompts")
    out: str = option("", "JSONL file to write the completions to; it must not exist")


def main(argv: list[str]) -> None:
    recipe, flags = read_flags(__doc__, argv, "evaluate", SampleFlags)
    folder = flags.get("evaluate", {}).get("model") or newest_model()
    tables = read_recipe(recipe) if recipe else recipe_of(folder)
    config = resolve(SampleFlags, "evaluate", _sampling_only(tables), flags)
    if config.prompt and config.prompts:
        raise UserError("give --prompt or --prompts, not both")
    if config.out and Path(config.out).exists():
        raise UserError(f"{config.out} exists; give another --out")
    rows = _rows(config, tables)

    tokenizer = Tokenizer(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Qwen2.from_pretrained(folder, dtype=compute_dtype(config.dtype, device), device=device).pack()
    prompts = [tokenizer.encode(tokenizer.prompt(_messages(where, row))) for where, row in rows]
    requests = requests_for(prompts, config.n, config.seed, [where for where, _ in rows])
    owners = {id(request): rows[i // config.n][1] for i, request in enumerate(requests)}
    sampler = Sampler(model, stop_ids(tokenizer), config)
    sampler.add(requests)
    if config.out:
        _write(sampler, owners, tokenizer, Path(config.out))
    else:
        plural = "s" if len(requests) > 1 else ""
        print(
            f"{folder}: {len(requests)} sample{plural} at temperature {config.temperature}, top-p {config.top_p}",
            flush=True,
        )
        _show(sampler, requests, owners, tokenizer)


def _sampling_only(tables: Tables) -> Tables:
    """The part of a recipe's [evaluate] that sampling shares with it; how many samples is this script's own affair."""
    names = {f.name for f in dataclasses.fields(SamplingConfig)} - {"n"}
    return {"evaluate": {k: v for k, v in tables.get("evaluate", {}).items() if k in names}}


def _rows(config: SampleFlags, tables: Tables) -> list[tuple[str, Any]]:
    """The prompts as rows, each with where it stands."""
    if config.prompt:
        return [("--prompt", {"prompt": config.prompt})]
    if config.prompts:
        rows = list(read_rows(config.prompts))
        if not rows:
            raise UserError(f"{config.prompts} holds no rows")
        return rows
    known = resolve(EvaluateConfig, "evaluate", tables).benchmarks[0]
    if known in benchmarks.PAPER:
        raise UserError('give --prompt "TEXT" or --prompts FILE.jsonl')
    return [(known, {"prompt": question}) for question in benchmarks.load(known, "", _PROBLEMS_TO_SHOW).questions]


def _messages(where: str, row: Any) -> list[dict[str, str]]:
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return check_messages(f"{where}: 'prompt'", row["prompt"])
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return check_messages(f"{where}: 'messages'", row["messages"])
    raise UserError(f"{where} must hold 'prompt', a text, or 'messages', a list")


def _show(sampler: Sampler, requests: list[Request], owners: dict[int, Any], tokenizer: Tokenizer) -> None:
    """Print completions as they come: one at a time, the others are made meanwhile and shown in their turn."""
    for request in requests:
        row = owners[id(request)]
        question = row["prompt"] if "prompt" in row else row["messages"][-1]["content"]
        print(f"\n--- {question}{f'  [sample {request.sample}]' if request.sample else ''}\n", flush=True)
        text, shown = tokenizer.stream(), 0
        while True:
            tokens = sampler.so_far(request)
            for token in tokens[shown:]:
                print(text.push(token), end="", flush=True)
            shown = len(tokens)
            if request.finish_reason:
                break
            sampler.step()
        cut = ", cut off" if request.finish_reason == "length" else ""
        print(f"\n\n({len(request.tokens):,} tokens{cut})", flush=True)


def _write(sampler: Sampler, owners: dict[int, Any], tokenizer: Tokenizer, path: Path) -> None:
    """Write each completion when it ends, as a whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = progress(None, "sampling", len(owners), "samples")
    with open(path, "xb", buffering=0) as file, done:
        try:
            while sampler.busy:
                for request in sampler.step():
                    row = {
                        "completion": tokenizer.decode(request.tokens),
                        "finish_reason": request.finish_reason,
                        "tokens": len(request.tokens),
                        "sample": request.sample,
                    }
                    write_row(file, {**owners[id(request)], **row})
                    done.update()
        except KeyboardInterrupt:
            done.close()
            print(f"{path}: {done.n} of {len(owners)} completions, then stopped", flush=True)
            raise
    print(f"{path}: {len(owners)} completions")


if __name__ == "__main__":
    run_script(main)
