"""Sample completions from a model.

    python sample.py     # the newest run's model on its benchmark's problems
    python sample.py "What is 7 * 8?" --model DIR --n 4
    python sample.py --model DIR --chat  # /reset: start over; Ctrl-C: end it
    python sample.py --model DIR --prompts prompts.jsonl --n 16 --out out.jsonl

Prompts are rows of JSONL with a text in "prompt", "problem", "question" or "instruction", or a conversation in
"messages" (docs/data.md has more names); or the lines of a plain text. "-" reads them from standard input. Each
completion is written to --out as soon as it is finished: the prompt's row with completion, finish_reason, tokens and
sample added. After an interruption the same command resumes. A flag that is not given is taken from the recipe or the
model's run ([evaluate]), else from the defaults.
"""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from nanoredi.chat import chat, ending
from nanoredi.common.disk import digest, regular, try_lock
from nanoredi.common.errors import UserError, naming, run_script
from nanoredi.common.files import check, parse_json, read_json, read_rows, write_row
from nanoredi.common.flags import Tables, option, read_flags, read_recipe, resolve
from nanoredi.common.formats import SUFFIXES
from nanoredi.common.progress import progress
from nanoredi.common.runs import check_model, newest_model, recipe_of
from nanoredi.config import EvaluateConfig, SamplingConfig
from nanoredi.data import benchmarks
from nanoredi.data.messages import (
    PROMPTS,
    asked_in,
    behind_system,
    check_messages,
    given_fields,
    last_role,
    with_system,
)
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.evaluation.samples import claim, digest_of_files
from nanoredi.model.hf_folder import stop_ids
from nanoredi.model.qwen2 import Qwen2
from nanoredi.sampler.sampler import Sampler
from nanoredi.sampler.scheduler import Request, requests_for
from nanoredi.trainer.dtype import compute_dtype, device_alone

_PROBLEMS_TO_SHOW = 3
_ADDED = ("completion", "finish_reason", "tokens", "sample")  # the fields added to a prompt's row


@dataclass
class SampleFlags(SamplingConfig):
    """sample.py's own flags."""

    n: int = option(1, "samples per prompt", low=1, high=2**16)
    model: str = option("", "Hugging Face folder; empty: the newest model under runs/")
    prompt: str = option("", "text of the user's message; the flag's name may be left out")
    prompts: str = option("", "file of prompts, JSONL or a plain text with one prompt a line; -: standard input")
    chat: bool = option(False, "have a conversation in the terminal")
    stop: list[str] = option([], "texts that end a completion and are cut off from it")
    out: str = option("", "JSONL file for the completions, a new one or one to resume")


@dataclass
class _Sample:
    """A sample to be made."""

    request: Request
    row: dict[str, Any]  # the prompt's row, as it was given
    question: str  # the last message, for the terminal


def main(argv: list[str]) -> None:
    recipe, flags = read_flags(__doc__, argv, "evaluate", SampleFlags, positional="prompt")
    given = flags.get("evaluate", {})
    for one, other in [("prompt", "prompts"), *(("chat", other) for other in ("prompt", "prompts", "n", "out"))]:
        if given.get(one) and given.get(other):
            raise UserError(f"give --{one} or --{other}, not both")
    folder = check_model(given.get("model") or newest_model())
    tables = read_recipe(recipe) if recipe else recipe_of(folder)
    config = resolve(SampleFlags, "evaluate", _sampling_only(tables), flags)
    tokenizer = Tokenizer(folder)
    if config.chat:
        sampler = _sampler(folder, tokenizer, dataclasses.replace(config, batch_size=1))
        print(f"{folder}: one line a turn; /reset starts a new conversation, Ctrl-C ends an answer, Ctrl-D exits")
        return chat(sampler, tokenizer, config.stop, config.template, config.system)

    samples = _samples(_rows(config, tables), tokenizer, config)
    if config.out:
        return _write(samples, folder, tokenizer, config)
    sampler = _sampler(folder, tokenizer, config)
    sampler.add(sample.request for sample in samples)
    what = f"{len(samples)} sample{'s' if len(samples) > 1 else ''}"
    print(f"{folder}: {what} at temperature {config.temperature}, top-p {config.top_p}", flush=True)
    _show(sampler, samples)


def _sampling_only(tables: Tables) -> Tables:
    """The part of a recipe's [evaluate] that is about sampling, except n, which has a default of its own here."""
    names = {f.name for f in dataclasses.fields(SamplingConfig)} - {"n"}
    return {"evaluate": {k: v for k, v in tables.get("evaluate", {}).items() if k in names}}


def _sampler(folder: str, tokenizer: Tokenizer, config: SampleFlags) -> Sampler:
    device = device_alone()
    model = Qwen2.from_pretrained(folder, dtype=compute_dtype(config.dtype, device), device=device).pack()
    return Sampler(model, stop_ids(tokenizer), config)


def _rows(config: SampleFlags, tables: Tables) -> list[tuple[str, Any]]:
    """The prompts as rows, each with where it is from, for messages."""
    if config.prompt:
        return [("--prompt", {"prompt": config.prompt})]
    if config.prompts:
        rows = _read_prompts(config.prompts)
        if not rows:
            raise UserError(f"{'standard input' if config.prompts == '-' else config.prompts} holds no rows")
        return rows
    known = resolve(EvaluateConfig, "evaluate", tables).benchmarks[0]
    if known in benchmarks.PAPER:
        raise UserError("give a prompt, --prompts FILE or --chat")
    return [(known, {"prompt": problem}) for problem in benchmarks.load(known, "", _PROBLEMS_TO_SHOW).problems]


def _read_prompts(path: str) -> list[tuple[str, Any]]:
    """The rows of a file. From standard input and files without a known suffix, lines that are not JSON are prompts."""
    suffix = Path(path).suffix.lower()
    if suffix in SUFFIXES:
        return [(where, {"prompt": row} if isinstance(row, str) else row) for where, row in read_rows(path)]
    name = "standard input" if path == "-" else path
    if path != "-" and Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is no file; give one, or --prompts - for standard input")
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error}") from None
    if suffix != ".txt" and re.match(r'\s*\[\s*[{"]', text):
        rows = ({"prompt": row} if isinstance(row, str) else row for row in parse_json(name, text))
        return [(f"{name}, row {n}", row) for n, row in enumerate(rows, 1)]
    lines = [(f"{name}, line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".txt" or lines and not lines[0][1].startswith("{"):
        return [(where, {"prompt": line}) for where, line in lines]
    return [(where, parse_json(where, line)) for where, line in lines]


def _samples(rows: list[tuple[str, Any]], tokenizer: Tokenizer, config: SampleFlags) -> list[_Sample]:
    conversations = [_messages(where, row, config) for where, row in rows]
    prompts = []
    for (where, _), messages in progress(zip(rows, conversations), "reading prompts", len(rows), "prompts", delay=1):
        with naming(where):
            if messages[-1]["role"] == "assistant":
                raise UserError("the last message is the assistant's; a prompt must end with the user's")
            prompts.append(tokenizer.encode(tokenizer.prompt(messages)))
    requests = requests_for(prompts, config.n, config.seed, [where for where, _ in rows])
    samples = []
    for i, request in enumerate(requests):
        request.stream = tokenizer.stream(config.stop, shown=not config.out)
        samples.append(_Sample(request, rows[i // config.n][1], conversations[i // config.n][-1]["content"]))
    return samples


def _messages(where: str, row: Any, config: SampleFlags) -> list[dict[str, str]]:
    """The messages of a row: its conversation as it is, or its text in the template."""
    fields = benchmarks.in_one_case(where, row, str.lower) if isinstance(row, dict) else {}
    for name in sorted(PROMPTS, key=lambda name: last_role(fields.get(name)) == "assistant"):
        value = fields.get(name)
        if value and isinstance(value, list):
            messages = check_messages(f"{where}: {name!r}", value)
        elif isinstance(value, str) and value.strip() and name not in ("messages", "conversations"):
            given_fields(where, {name: value})  # refuses messages that are written as text
            messages = benchmarks.frame(asked_in(where, fields, name), config.template, "")
        else:
            continue
        return with_system(behind_system(where, fields, messages), config.system)
    raise UserError(
        f"{where} must hold 'prompt', 'problem', 'question' or 'instruction', a text, or 'messages', a list; "
        f"it holds {', '.join(map(repr, fields)) or 'no fields'}"
    )


def _show(sampler: Sampler, samples: list[_Sample]) -> None:
    """Stream the completions one after the other; the later ones are computed at the same time."""
    for sample in samples:
        request, shown = sample.request, 0
        print(f"\n--- {sample.question}{f'  [sample {request.sample}]' if request.sample else ''}\n", flush=True)
        while True:
            print(request.stream.text[shown:], end="", flush=True)
            shown = len(request.stream.text)
            if request.finish_reason:
                break
            sampler.step()
        print(f"\n\n{ending(request)}", flush=True)


def _write(samples: list[_Sample], folder: str, tokenizer: Tokenizer, config: SampleFlags) -> None:
    """Write each completion as a whole line when it is finished. Those that the file already has are not made again."""
    path = Path(config.out)
    if path.suffix.lower() in {*SUFFIXES} - {".json", ".jsonl"}:
        raise UserError(f"completions are written as JSONL: give --out a name that ends in .jsonl, not {path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(regular(path), "ab", buffering=0) as file:
        if not try_lock(file.fileno(), path):
            raise UserError(f"another process writes to {path}: wait for it, or give another --out")
        config.dtype = _claim(path, folder, config)
        with open(path, "rb+") as whole:  # without the partial line that a killed job leaves at the end
            whole.truncate(sum(len(line) for line in whole if line.endswith(b"\n")))
        missing = {_key({**sample.row, "sample": sample.request.sample}): sample for sample in samples}
        for where, row in read_rows(str(path)):
            if missing.pop(_key(row), None) is None:
                raise UserError(f"{where} is no completion of these prompts: give another --out")
        if len(missing) < len(samples):
            print(
                f"{path}: {len(samples) - len(missing)} completions are there, {len(missing)} are missing", flush=True
            )
        if missing:
            _complete(missing, _sampler(folder, tokenizer, config), tokenizer, file)
    print(f"{path}: {len(samples)} completions")


def _claim(path: Path, folder: str, config: SampleFlags) -> str:
    """Claim --out for completions with these settings, new or resumed. Returns their dtype."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(SamplingConfig) if not f.metadata["free"]}
    beside, files = Path(f"{path}.settings.json"), digest_of_files(Path(folder))
    if path.stat().st_size and beside.exists():  # the same files are the same model, however their path was written
        known = check(str(beside), read_json(beside), {"model": {str: str}})["model"]
        folder = next((other for other in known if known[other] == files), folder)
    return claim(path, beside, {"setting": {**settings, "stop": config.stop}, "model": {folder: files}})


def _key(row: Any) -> str:
    """What identifies a sample's row: the prompt's own fields and its number, as a digest, since a row may be long."""
    fields = row if isinstance(row, dict) else {}
    given = {name: value for name, value in fields.items() if name not in _ADDED}
    text = json.dumps([given, fields.get("sample")], sort_keys=True, ensure_ascii=False)
    return digest(text.encode(errors="replace"))  # like write_row


def _complete(missing: dict[str, _Sample], sampler: Sampler, tokenizer: Tokenizer, file: FileIO) -> None:
    rows = {id(sample.request): sample.row for sample in missing.values()}
    sampler.add(sample.request for sample in missing.values())
    done, start = progress(None, "sampling", len(rows), "samples"), file.seek(0, 2)
    with done:
        try:
            while sampler.num_held:
                for request in sampler.step():
                    text = request.stream.text if request.stream else tokenizer.decode(request.tokens)
                    added = (text, request.finish_reason, len(request.tokens), request.sample)
                    write_row(file, {**rows[id(request)], **dict(zip(_ADDED, added))})
                    done.update()
        except KeyboardInterrupt:
            done.close()
            with open(file.name, "rb") as again:  # done may lag behind by a row
                again.seek(start)
                num_written = sum(line.endswith(b"\n") for line in again)
            print(
                f"{file.name}: {num_written} of {len(rows)} completions, then interrupted; the same command resumes",
                flush=True,
            )
            raise


if __name__ == "__main__":
    run_script(main)
