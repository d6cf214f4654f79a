"""Completions that another engine wrote, in its own layout (layouts.py), as samples to grade.

A row belongs to the problem that its prompt asks: of all whose text stands in it the last, for what comes before may be
examples. Without a prompt it belongs to the problem that an id names, a benchmark's own or a number; and to the one at
its place in the file, which is then said, where there is neither. Several rows of one problem are its samples in turn.
The gold answers are the benchmark's, or the file's own where no benchmark is named.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanoredi.common.errors import UserError, run_script
from nanoredi.common.files import read_rows
from nanoredi.data.benchmarks import Benchmark, check_golds, golds_of
from nanoredi.evaluation.layouts import LAYOUTS, Answers, Completion, read
from nanoredi.evaluation.scores import Row, graded

Problem = tuple[int, int]  # (which benchmark, which of its problems)
Found = dict[Problem, dict[int, Completion]]  # a problem's completions by the samples' numbers


def grade_file(
    path: str,
    name: str,
    benchmarks: list[Benchmark],
    thinking: bool,
    limit: int = 0,
    say: Callable[[str], None] = print,
) -> list[list[Row]]:
    """Grade a file of completions.

    Args:
        path: rows in one of the layouts.
        name: the model's, in the table; with samples.jsonl it stands before the names that are there.
        benchmarks: whose problems they answer; none: the file's own prompts and gold answers make one.
        thinking: whether the prompts opened <think>, which then is no part of the completions.
        limit: grade only so many problems from each benchmark's start; 0: all.
        say: takes what the reader should know of the file.

    Returns:
        For each model and benchmark that the file answers its samples (graded has the keys), as many for every problem.

    Raises:
        UserError: for an unknown layout, a row of no problem, and a problem that has another number of completions.
    """
    answers = _read(path, say)
    if benchmarks:
        problems = _assigned(path, answers, benchmarks, limit, say)
    else:
        benchmarks, problems = _own_benchmarks(path, answers)
    samples = []
    for model in dict.fromkeys(row.model for row in answers):
        found: Found = {}
        for row, problem in zip(answers, problems):
            if row.model == model:
                own = found.setdefault(problem, {})
                for one in row.completions:
                    if row.sample is None and (thinking or row.opens) and "<think>" not in one.text:
                        one = replace(one, text=f"<think>\n{one.text}")
                    number = len(own) if row.sample is None else row.sample
                    if own.setdefault(number, one) != one:
                        raise UserError(
                            f"{row.where} is sample {number} of its problem, as an earlier row of other words is"
                        )
        shown = name if model is None else f"{name}: {model}"
        samples += _graded(path, shown, benchmarks, _shared(benchmarks, found), limit)
    return samples


def _read(path: str, say: Callable[[str], None]) -> list[Answers]:
    """The rows of the file. A request that failed has as many empty completions as the others have real ones."""
    answers, metrics = [], None
    for where, row in read_rows(path):
        if isinstance(row, dict) and "resps" in row:  # lm-eval writes every row again for each of its filters
            metrics = metrics or row.get("filter")
            if row.get("filter") != metrics:
                continue
        answers.append(read(where, row))
    if not answers:
        raise UserError(f"{path} holds no rows")
    if len({row.model for row in answers} - {None}) < 2 and answers[0].problem is None:
        for row in answers:
            row.model = None
    _take_bare_answers(path, answers, say)
    failed = [row for row in answers if row.error is not None]
    width = max(1, *(len(row.completions) for row in answers))
    for row in failed:
        row.completions = [Completion("", reason="error")] * width
    if failed:
        words = "; ".join(
            f"{count} x {words[:200]!r}" for words, count in Counter(r.error for r in failed).most_common(3)
        )
        say(
            f"{path}: {len(failed)} of {len(answers)} requests failed and count as wrong, the first in {failed[0].where}: {words}"
        )
    return answers


def _take_bare_answers(path: str, answers: list[Answers], say: Callable[[str], None]) -> None:
    """Where nothing has a box: what is called a prediction may be the answer that was found in a response; else the reader
    should know."""
    own = [one for row in answers for one in row.completions]
    if any("box" in one.text for one in own) or not own:
        return
    if all(row.path in (None, "prediction", "predictions", "predict") for row in answers):
        say(f"{path}: no {answers[0].path} has a boxed answer; each is taken for the answer itself")
        for one in own:
            one.text = f"</think>\\boxed{{{one.text}}}"
    else:
        say(f"{path}: no completion has a boxed answer, which is the one that counts")


def _own_benchmarks(path: str, answers: list[Answers]) -> tuple[list[Benchmark], list[Problem]]:
    """The prompts of a file as benchmarks, by the file's own gold answers, and each row's problem."""
    golds: dict[str, dict[str | int, list[str]]] = {}
    keys = []
    for row in answers:
        key = row.prompt or next(iter(row.ids.values()), None) if row.problem is None else row.problem
        benchmark = row.benchmark or Path(path).stem
        if key is None or row.golds is None and key not in golds.get(benchmark, {}):
            raise UserError(f"{row.where} has no gold answer of its own: name the benchmark with --benchmarks")
        if row.golds is not None:
            own = golds_of(row.where, row.golds)
            if golds.setdefault(benchmark, {}).setdefault(key, own) != own:
                raise UserError(f"{row.where} has another gold answer than an earlier row of the same problem")
        keys.append((benchmark, key))
    names = list(golds)
    # The problems of samples.jsonl are numbers, and its rows in the order in which they ended.
    ordered = {b: sorted(own) if all(isinstance(key, int) for key in own) else list(own) for b, own in golds.items()}
    check_golds(path, [gold for own in golds.values() for gold in own.values()])
    places = {(b, key): (names.index(b), i) for b, own in ordered.items() for i, key in enumerate(own)}
    texts = {b: [str(key) for key in own] for b, own in ordered.items()}
    benchmarks = [Benchmark(b, texts[b], texts[b], [golds[b][key] for key in own]) for b, own in ordered.items()]
    return benchmarks, [places[key] for key in keys]


def _assigned(
    path: str, answers: list[Answers], benchmarks: list[Benchmark], limit: int, say: Callable[[str], None]
) -> list[Problem]:
    """For each row the problem that it answers."""
    texts: dict[str, Problem] = {}  # of several problems with the same words the first
    for which, benchmark in enumerate(benchmarks):
        for i, text in enumerate(benchmark.problems):
            texts.setdefault(_words(text), (which, i))
    known: dict[str | None, Problem | None] = {None: None}
    found: list[Problem | None] = []
    for row in answers:
        if row.problem is not None:
            found.append(_numbered(row, benchmarks))
            continue
        if row.prompt not in known:
            known[row.prompt] = _asked(row.prompt, texts)
        found.append(known[row.prompt] or _asked(row.texts, texts))
        if row.prompt and found[-1] is None:
            names = ", ".join(b.name for b in benchmarks)
            raise UserError(f"{row.where}: its prompt holds no problem of {names}")
    left = [row for row, problem in zip(answers, found) if problem is None]
    if not left:
        return found
    named = _by_id(answers, benchmarks, limit)
    if named is None:
        if len(benchmarks) > 1 or len(answers) not in (len(benchmarks[0].problems), limit):
            raise UserError(
                f"{left[0].where} has no prompt, and no id that names its problem; then the file must have a row for each "
                "problem of one benchmark"
            )
        say(f"{path}: rows without a prompt or an id of a problem are taken in the order of {benchmarks[0].name}")
        return [problem or (0, place) for place, problem in enumerate(found)]
    return [problem or by_id for problem, by_id in zip(found, named)]


def _asked(text: str, problems: dict[str, Problem]) -> Problem | None:
    """Of all problems that stand in a text the one that ends last; of those that end there the longest, for a problem may
    stand within another."""
    text = _words(text)
    held = [(at + len(words), len(words), words) for words in problems if (at := text.rfind(words)) >= 0]
    return problems[max(held)[2]] if held else None


def _words(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _numbered(row: Answers, benchmarks: list[Benchmark]) -> Problem:
    """The problem of a row of samples.jsonl."""
    which = next((i for i, b in enumerate(benchmarks) if b.name == row.benchmark), None)
    if which is None or not 0 <= row.problem < len(benchmarks[which].problems):
        raise UserError(f"{row.where} is of problem {row.problem} of {row.benchmark}, which is not among those named")
    return which, row.problem


def _by_id(rows: list[Answers], benchmarks: list[Benchmark], limit: int) -> list[Problem] | None:
    """The problems of rows by the first of their ids that names all of them; None where none does.

    Raises:
        UserError: when they have a custom_id, for engines then promise no order, and it names no problem.
    """
    for name in rows[0].ids:
        ids = [row.ids.get(name, "") for row in rows]
        # With several benchmarks an id begins with one's name.
        whose = [[i for i, b in enumerate(benchmarks) if len(benchmarks) == 1 or id.startswith(b.name)] for id in ids]
        problems = {}
        for which, benchmark in enumerate(benchmarks):
            own = [id for id, those in zip(ids, whose) if those and those[-1] == which]
            problems |= {(id, which): (which, i) for id, i in _numbers(own, benchmark, limit).items()}
        if all(those and (id, those[-1]) in problems for id, those in zip(ids, whose)):
            return [problems[id, those[-1]] for id, those in zip(ids, whose)]
        if name == "custom_id":
            raise UserError(
                f"{rows[0].where}: its custom_id {ids[0]!r} names no problem of {', '.join(b.name for b in benchmarks)}, "
                "neither by an id that stands there nor by its number; give the rows their prompts"
            )
    return None


def _numbers(ids: list[str], benchmark: Benchmark, limit: int) -> dict[str, int]:
    """{id: its problem's place}: the benchmark's own ids, or ids with a number that runs over all problems, from 0 or 1.
    Empty where they are neither, or more than one number does."""
    if len(benchmark.problems) == 1:
        return dict.fromkeys(ids, 0)
    for own in benchmark.ids.values():
        if set(ids) <= set(own):
            return {id: own.index(id) for id in set(ids)}
    numbers = [[int(digits) for digits in re.findall(r"[0-9]{1,9}", id.removeprefix(benchmark.name))] for id in ids]
    found = []
    for column in zip(*numbers) if len(set(map(len, numbers))) == 1 else ():
        start, size = min(column), len(set(column))
        if start in (0, 1) and max(column) == start + size - 1 and size in (len(benchmark.problems), limit):
            found.append({id: number - start for id, number in zip(ids, column)})
    return found[0] if len(found) == 1 else {}


def _shared(benchmarks: list[Benchmark], found: Found) -> Found:
    """The completions of a problem that stands several times, dealt to each in turn; all to each where there are no more
    than for another."""
    same: dict[str, list[Problem]] = {}
    for which, benchmark in enumerate(benchmarks):
        for i, text in enumerate(benchmark.problems):
            same.setdefault(_words(text), []).append((which, i))
    n = max((len(found[one]) for (one, *more) in same.values() if not more and one in found), default=0)
    for one, *more in same.values():
        own = list(found.get(one, {}).values())
        if more and own and not any(other in found for other in more):
            share = len(own) // (1 + len(more)) if len(own) != n else 0
            for k, copy in enumerate([one, *more]):
                found[copy] = dict(enumerate(own[k * share : (k + 1) * share] if share else own))
    return found


def _graded(path: str, name: str, benchmarks: list[Benchmark], found: Found, limit: int) -> list[list[Row]]:
    """A model's completions graded, by benchmark."""
    samples = []
    for which, benchmark in enumerate(benchmarks):
        problems = [found.get((which, i), {}) for i in range(len(benchmark.problems))][: limit or None]
        if not any(problems):
            continue
        n = max(map(len, problems))
        for i, own in enumerate(problems):
            if sorted(own) != list(range(n)):
                raise UserError(
                    f"{path}: {name} has {len(own)} completions for problem {i + 1} of {benchmark.name} and {n} for "
                    "others; every problem needs as many"
                )
        numbered = [(i, number, own[number]) for i, own in enumerate(problems) for number in range(n)]
        samples.append([graded(name, benchmark, i, k, one.text, one.tokens, one.reason) for i, k, one in numbered])
    return samples


if __name__ == "__main__":
    run_script(lambda _: print("\n".join(f"{path:24}{who}" for path, who in LAYOUTS.items()), flush=True))
