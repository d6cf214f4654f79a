"""A model on benchmarks: sample, grade, and sum up in rows of the table."""

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
    """Evaluate models {name: folder} into one folder, as evaluate does one. Of those that are done nothing is loaded.

    Args:
        adds: whether other models may have been evaluated there; their rows are returned, too.
        notes: said where there is something to do.

    Returns:
        All rows, which results.json holds, too, after each model.
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
    """Evaluate the model of a folder; the ranks share the problems. A second start does what is missing.

    Args:
        name: the model's, in the table.
        folder: Hugging Face folder.
        out: the folder of the samples (samples.py), claimed for this model. What they lack is added, no more.
        pairs: with a `watch` file, whose mean log-probs a token then stand in the rows too.

    Returns:
        A row a benchmark (summarise has its keys), the same on every rank.
    """
    tokenizer = Tokenizer(folder)
    dtype = compute_dtype(config.dtype, world.device)
    give_back()  # what is left of the model before
    model = Qwen2.from_pretrained(folder, dtype=dtype, device=world.device).pack()
    logps = {}
    if pairs is not None and pairs.watch:
        load = partial(
            load_pairs, pairs.watch, tokenizer, pairs.max_prompt_tokens, pairs.max_response_tokens, pairs.cache
        )
        world.first(lambda: load().notes)  # fills the cache
        means, _ = means_a_token(model, load(), pairs.max_tokens_per_micro_batch, world).tolist()
        logps = dict(zip(("chosen_logp", "rejected_logp"), means))
    run = _Evaluation(name, model, tokenizer, benchmarks, config, Samples(out), world)
    _sample(run)
    return [{**row, **logps} for row in world.first(lambda: _summary(run))]


@dataclass
class _Evaluation:
    """All that sampling one model works with."""

    name: str  # the model's, in the table
    model: Qwen2
    tokenizer: Tokenizer
    benchmarks: list[Benchmark]
    config: EvaluateConfig
    samples: Samples
    world: World


def _sample(run: _Evaluation) -> None:
    """Sample and grade what the benchmarks' samples lack. Each rank takes a problem whenever it has room for one, those
    first that are expected to take longest, so that all ranks end together."""
    missing, world = _missing(run), run.world
    if not missing:
        return
    num_missing = sum(len(problem.requests) for problem in missing)
    sampler = Sampler(run.model, stop_ids(run.tokenizer), run.config)
    for problem in missing:
        sampler.check(problem.requests)
    # Not more than a rank's share at once: where there are few problems, every rank gets some.
    room = min(sampler.batch_size, -(-num_missing // world.size))
    queue, whose, more = Queue(world, len(missing)), {}, True
    total = num_missing if world.size == 1 else None  # what the others do is not known here
    finished = progress(None, run.name, total, "samples", disable=world.rank > 0)
    with finished:
        while more or sampler.busy:
            while more and sampler.num_held < room:
                number = queue.next()
                more = number is not None
                if more:
                    sampler.add(missing[number].requests)
                    whose.update((id(request), missing[number]) for request in missing[number].requests)
            for request in sampler.step():
                problem = whose.pop(id(request))
                text = request.stream.text if request.stream else run.tokenizer.decode(request.tokens)
                response = problem.opened + text
                figures = request.sample, response, len(request.tokens), request.finish_reason
                run.samples.append(graded(run.name, problem.benchmark, problem.number, *figures))
                finished.update()
    queue.wait()


def _missing(run: _Evaluation) -> list["_Problem"]:
    """The problems with the requests that are still to be made, the longest first. Those that are too long for the context
    are counted as cut off here."""
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
    """A problem of a benchmark, with its samples; opened is what of the response the prompt holds already."""

    benchmark: Benchmark
    number: int
    requests: list[Request]
    opened: str
    expected: float = 0.0  # mean tokens of its samples, as far as these are known


def _cut_off(run: _Evaluation, problems: list[_Problem]) -> None:
    """Count problems that leave no room for an answer as cut off, and say so."""
    if problems:
        first, length = problems[0], len(problems[0].requests[0].prompt)
        print(
            f"{run.name}: {len(problems)} problem{'s' if len(problems) > 1 else ''} with no room in the context of "
            f"{run.model.config.max_position_embeddings:,} tokens counted as cut off; the first: problem {first.number + 1} of {first.benchmark.name}, {length:,} tokens "
            "with its template",
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
            # Where the prompt opens <think>, that belongs to the response all the same.
            opened = "<think>\n" if text.rstrip().endswith("<think>") else ""
            own = requests[number * config.n : (number + 1) * config.n]
            for sample, request in enumerate(own):  # a problem that stands twice has two rows of n
                request.sample, request.stream = sample, run.tokenizer.stream(shown=False)
            problems.append(_Problem(benchmark, number, own, opened))
    return problems


def _so_far(run: _Evaluation) -> tuple[set[tuple[str, int, int]], dict[tuple[str, int], float]]:
    """Which samples of the model are there, as (benchmark, problem, sample), and the mean tokens of every problem's, any
    model's."""
    done, tokens = set(), {}
    for row in run.samples.rows():
        key = row["benchmark"], row["problem"]
        tokens.setdefault(key, []).append(row["tokens"])
        if row["model"] == run.name:
            done.add((*key, row["sample"]))
    return done, {key: sum(counts) / len(counts) for key, counts in tokens.items()}


def _summary(run: _Evaluation) -> list[Row]:
    of_benchmark: dict[str, list[Row]] = {benchmark.name: [] for benchmark in run.benchmarks}
    for row in run.samples.rows():
        if row["model"] == run.name:
            of_benchmark[row["benchmark"]].append(row)
    named = of_benchmark.items()
    return [{"model": run.name, "benchmark": name, **summarise(rows, run.config.n)} for name, rows in named]
