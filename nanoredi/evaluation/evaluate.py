"""Evaluate a model on benchmarks: sample, grade, and summarise as rows of the results table."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanoredi.common.files import write_json
from nanoredi.common.progress import progress
from nanoredi.config import EvaluateConfig, RediConfig
from nanoredi.data.benchmarks import Benchmark
from nanoredi.data.messages import user_message, with_system
from nanoredi.data.sequences import load_pairs
from nanoredi.data.tokenizer import Tokenizer
from nanoredi.evaluation.queue import Queue
from nanoredi.evaluation.samples import Samples, kept_results
from nanoredi.evaluation.scores import Row, graded, summarise
from nanoredi.model.hf_folder import stop_ids
from nanoredi.model.qwen2 import Qwen2
from nanoredi.sampler.sampler import Sampler, give_back
from nanoredi.sampler.scheduler import Request, requests_for
from nanoredi.trainer.distributed import World
from nanoredi.trainer.dtype import compute_dtype
from nanoredi.trainer.scoring import means_a_token


def evaluate_all(
    models: Mapping[str, str | Path],
    benchmarks: list[Benchmark],
    config: EvaluateConfig,
    out: Path,
    world: World,
    pairs: RediConfig | None = None,
    adds: bool = False,
    notes: str = "",
) -> list[Row]:
    """Evaluate models {name: folder} into one folder, each as evaluate does. Finished models are not loaded again.

    Args:
        adds: whether the folder may hold results of other models, too; their rows are also returned.
        notes: printed if anything is left to evaluate.

    Returns:
        All rows; after each model they are also written to results.json.
    """
    config.dtype = world.first(lambda: Samples(out).claim(models, benchmarks, config, adds))
    num_samples = config.n * sum(len(b.problems) for b in benchmarks)
    rows = world.first(lambda: kept_results(out, num_samples))
    missing = {name: folder for name, folder in models.items() if name not in {row["model"] for row in rows}}
    if missing and notes:
        world.say(notes)
    for name, folder in missing.items():
        rows += evaluate(name, folder, benchmarks, config, out, world, pairs)
        world.first(lambda: write_json(out / "results.json", rows))
    return rows


def evaluate(
    name: str,
    folder: str | Path,
    benchmarks: list[Benchmark],
    config: EvaluateConfig,
    out: Path,
    world: World,
    pairs: RediConfig | None = None,
) -> list[Row]:
    """Evaluate one model, with the problems shared among the ranks. Only samples that are still missing are made.

    Args:
        name: the model's name in the table.
        folder: Hugging Face folder.
        out: the folder of the samples (samples.py), already claimed for this model.
        pairs: if it has a `watch` file, the rows also get the mean log-probs a token of its pairs.

    Returns:
        One row a benchmark (for the keys see summarise), the same on every rank.
    """
    tokenizer = Tokenizer(folder)
    dtype = compute_dtype(config.dtype, world.device)
    give_back()  # the previous model's memory
    model = Qwen2.from_pretrained(folder, dtype=dtype, device=world.device).pack()
    logps = {}
    if pairs is not None and pairs.watch:
        limits = pairs.max_prompt_tokens, pairs.max_response_tokens
        load = partial(load_pairs, pairs.watch, tokenizer, *limits, pairs.cache)
        world.first(lambda: load().notes)  # one rank fills the cache for all
        means, _ = means_a_token(model, load(), pairs.max_tokens_per_micro_batch, world).tolist()
        logps = dict(zip(("chosen_logp", "rejected_logp"), means))
    run = _Evaluation(name, model, tokenizer, benchmarks, config, Samples(out), world)
    _sample(run)
    return [{**row, **logps} for row in world.first(lambda: _summary(run))]


@dataclass
class _Evaluation:
    """One model's evaluation."""

    name: str  # the model's name in the table
    model: Qwen2
    tokenizer: Tokenizer
    benchmarks: list[Benchmark]
    config: EvaluateConfig
    samples: Samples
    world: World


def _sample(run: _Evaluation) -> None:
    """Make and grade the missing samples. Each rank takes a problem whenever it has room for one, beginning with those
    that are expected to take longest, so that all ranks finish together."""
    missing, world = _missing(run), run.world
    if not missing:
        return
    num_missing = sum(len(problem.requests) for problem in missing)
    sampler = Sampler(run.model, stop_ids(run.tokenizer), run.config)
    for problem in missing:
        sampler.check(problem.requests)
    # At most a rank's share at once, so that every rank gets some of a few problems.
    room = min(sampler.batch_size, -(-num_missing // world.size))
    queue, whose, more = Queue(world, len(missing)), {}, True
    total = num_missing if world.size == 1 else None  # a rank does not see the others' progress
    with progress(None, run.name, total, "samples", disable=world.rank > 0) as finished:
        while more or sampler.num_held:
            while more and sampler.num_held < room:
                number = queue.next()
                more = number is not None
                if more:
                    sampler.add(missing[number].requests)
                    whose.update((id(request), missing[number]) for request in missing[number].requests)
            for request in sampler.step():
                problem = whose.pop(id(request))
                text = request.stream.text if request.stream else run.tokenizer.decode(request.tokens)
                figures = request.sample, problem.opened + text, len(request.tokens), request.finish_reason
                run.samples.append(graded(run.name, problem.benchmark, problem.number, *figures))
                finished.update()
    queue.wait()


def _missing(run: _Evaluation) -> list["_Problem"]:
    """The problems with the requests that are still to be made, the longest first. Problems that do not fit into the
    context are recorded as cut off here."""
    problems, context = _problems(run), run.model.config.max_position_embeddings
    too_long = [problem for problem in problems if len(problem.requests[0].prompt) >= context]
    done, length = run.world.first(lambda: _so_far(run))
    for problem in problems:
        key = problem.benchmark.name, problem.number
        problem.requests = [r for r in problem.requests if (*key, r.sample) not in done]
        problem.expected = length.get(key, sum(length.values()) / max(1, len(length)))
    run.world.first(lambda: _cut_off(run, [problem for problem in too_long if problem.requests]))
    missing = [problem for problem in problems if problem.requests and problem not in too_long]
    missing.sort(key=lambda problem: (problem.expected, len(problem.requests[0].prompt)), reverse=True)
    if done:
        num_missing = sum(len(problem.requests) for problem in missing)
        run.world.say(f"{run.name}: {len(done)} samples are there, {num_missing} are missing")
    return missing


@dataclass(eq=False)
class _Problem:
    """A problem of a benchmark, with a request for each of its samples."""

    benchmark: Benchmark
    number: int
    requests: list[Request]
    opened: str  # the beginning of the response that is already in the prompt: <think> or nothing
    expected: float = 0.0  # estimated tokens of a sample


def _cut_off(run: _Evaluation, problems: list[_Problem]) -> None:
    """Record the samples of problems that leave no room for an answer as cut off, and say so."""
    if problems:
        first, length = problems[0], len(problems[0].requests[0].prompt)
        print(
            f"{run.name}: {len(problems)} problem{'s' if len(problems) > 1 else ''} with no room in the context of "
            f"{run.model.config.max_position_embeddings:,} tokens counted as cut off; the first: problem "
            f"{first.number + 1} of {first.benchmark.name}, {length:,} tokens with its template",
            flush=True,
        )
    for problem in problems:
        for request in problem.requests:
            figures = request.sample, problem.opened, 0, "length"
            run.samples.append(graded(run.name, problem.benchmark, problem.number, *figures))


def _problems(run: _Evaluation) -> list[_Problem]:
    problems, config = [], run.config
    for benchmark in run.benchmarks:
        asked = [with_system(user_message(question), config.system) for question in benchmark.questions]
        texts = [run.tokenizer.prompt(messages, think=config.think == "forced") for messages in asked]
        prompts = [encoding.ids for encoding in run.tokenizer.encode_batch(texts)]
        names = [f"{benchmark.name}: problem {number}" for number in range(1, len(prompts) + 1)]
        requests = requests_for(prompts, config.n, config.seed, names)
        for number, text in enumerate(texts):
            # A <think> that the prompt opens is still part of the response.
            opened = "<think>\n" if text.rstrip().endswith("<think>") else ""
            own = requests[number * config.n : (number + 1) * config.n]
            for sample, request in enumerate(own):  # from 0 for each copy of a problem
                request.sample, request.stream = sample, run.tokenizer.stream(shown=False)
            problems.append(_Problem(benchmark, number, own, opened))
    return problems


def _so_far(run: _Evaluation) -> tuple[set[tuple[str, int, int]], dict[tuple[str, int], float]]:
    """The model's finished samples, as (benchmark, problem, sample), and the mean tokens of each problem's samples,
    including those of other models."""
    done, tokens = set(), {}
    for row in run.samples.rows():
        key = row["benchmark"], row["problem"]
        tokens.setdefault(key, []).append(row["tokens"])
        if row["model"] == run.name:
            done.add((*key, row["sample"]))
    return done, {key: sum(counts) / len(counts) for key, counts in tokens.items()}


def _summary(run: _Evaluation) -> list[Row]:
    rows = [row for row in run.samples.rows() if row["model"] == run.name]
    named = [(b.name, [row for row in rows if row["benchmark"] == b.name]) for b in run.benchmarks]
    return [{"model": run.name, "benchmark": name, **summarise(own, run.config.n)} for name, own in named]
