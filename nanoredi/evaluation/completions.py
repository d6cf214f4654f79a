"""Grade completions that another engine wrote, in any of the layouts of layouts.py.

A row's prompt says which problem it answers: of all problems whose text it contains, the last one, since those before
may be few-shot examples. A row without a prompt is matched by an id, a benchmark's own or a number; without either, by
its position in the file, with a note. Several rows of one problem are several samples of it. The gold answers are the
benchmark's, or the file's own if no benchmark is named.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

from nanoredi.common.errors import UserError, run_script
from nanoredi.common.files import read_rows
from nanoredi.data.benchmarks import Benchmark, check_golds, golds_of
from nanoredi.evaluation.layouts import LAYOUTS, Completion, EngineRow, read
from nanoredi.evaluation.scores import Row, graded
from nanoredi.grader import extract_answer

Problem = tuple[int, int]  # (index of the benchmark, index of the problem in it)
Found = dict[Problem, list[Completion]]
_PYTHON = re.compile(r"\s*\[?\{'(.*')?(role|text|content|generated_text)':", re.DOTALL)


def grade_file(path: str, name: str, benchmarks: list[Benchmark], thinking: bool, limit: int = 0) -> list[list[Row]]:
    """Grade a file of completions, and print notes on what may not be intended.

    Args:
        path: rows in one of the layouts.
        name: the model's name in the table; a prefix to the models' own names if the rows have several.
        benchmarks: the benchmarks that are answered; none: the file's own prompts and gold answers make one.
        thinking: whether the prompts opened <think>, so that the completions do not contain it.
        limit: grade only this many problems from each benchmark's start; 0: all.

    Returns:
        The samples (for the keys see graded) of each model on each benchmark that the file answers, equally many for
        every problem.

    Raises:
        UserError: for an unknown layout, a row of no problem, and problems with different numbers of completions.
    """
    rows = _read(path)
    if benchmarks:
        problems = _problems_of(path, rows, benchmarks, limit)
        asked = [benchmarks[which].problems[i] for which, i in problems]
    else:
        benchmarks, problems = _own_benchmarks(path, rows)
        asked = [row.prompt for row in rows]
    _refuse_prompts(path, rows, asked)
    samples = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [(row, problem) for row, problem in zip(rows, problems) if row.model == model]
        found = _with_repeated_problems(benchmarks, _by_problem(own, thinking))
        samples += _graded(path, name if model is None else f"{name}: {model}", benchmarks, found, limit)
    return samples


def _read(path: str) -> list[EngineRow]:
    """The rows of the file, with their models' names if there are several. A failed request gets as many empty
    completions as the model's other requests have completions."""
    rows, filters = [], {}
    for where, row in read_rows(path):
        if isinstance(row, dict) and "resps" in row:  # lm-eval repeats every row for each of its task's filters
            asked = str([row.get(name) for name in ("doc_id", "doc", "arguments")])
            if filters.setdefault(asked, row.get("filter")) != row.get("filter"):
                continue
        rows.append(read(where, row))
    if not rows:
        raise UserError(f"{path} holds no rows")
    failed = [row for row in rows if row.error is not None]
    if len({row.model for row in rows} - {None}) < 2 and not rows[0].own:
        for row in rows:
            row.model = None
    elif nameless := [row.where for row in failed if row.model is None]:
        raise UserError(f"{nameless[0]} failed, and does not say with which model: give each model a file of its own")
    _check_texts(path, rows)
    widths = {row.model: len(row.completions) for row in sorted(rows, key=lambda row: len(row.completions))}
    for row in failed:
        row.completions = [Completion("", reason="error")] * max(1, widths[row.model])
    if failed:
        errors = Counter(row.error for row in failed).most_common(3)
        words = "; ".join(f"{count} x {error[:200]!r}" for error, count in errors)
        which = f"{len(failed)} of {len(rows)} requests failed and count as wrong, the first in {failed[0].where}"
        print(f"{path}: {which}: {words}")
    return rows


def _check_texts(path: str, rows: list[EngineRow]) -> None:
    """Refuse objects that Python wrote as text; note the field that is read, empty completions, and missing boxes."""
    field = next((row.path for row in rows if row.path), None)
    if others := sorted({name for row in rows for name in row.others}):
        print(f"{path}: completions are taken from the field {field}, and not from {', '.join(others)}")
    own = [one for row in rows for one in row.completions]
    if empty := sum(not one.text.strip() for one in own):
        print(f"{path}: {empty:,} of {len(own):,} completions are empty and count as wrong")
    if 2 * sum(bool(_PYTHON.match(one.text)) for one in own) > len(own) - empty:  # a few may be the model's own
        raise UserError(f"{path}: its completions are objects written as Python's text: give them as JSON")
    if any(re.search(r"\\f?(box|rame)", one.text) for one in own) or empty == len(own):
        return
    if all(row.path in (None, "prediction", "predictions", "predict") for row in rows):
        print(f"{path}: no {field} has a boxed answer; each is taken for the answer itself")
        for one in own:
            one.text = f"</think>\\boxed{{{one.text}}}"
    else:
        print(f"{path}: no completion has a boxed answer, which is the one that counts")


def _problems_of(path: str, rows: list[EngineRow], benchmarks: list[Benchmark], limit: int) -> list[Problem]:
    """The problem that each row answers."""
    asked = lru_cache(None)(partial(_problem_in, places=_places(benchmarks)))
    numbered = {(b.name, i): (which, i) for which, b in enumerate(benchmarks) for i in range(len(b.problems))}
    found: list[Problem | None] = []
    for row in rows:
        found.append(numbered.get(row.own) if row.own else asked(row.prompt) or asked(row.texts))
        if found[-1] is None and (row.prompt or row.own):
            given = f"'problem' {row.own[1]} of {row.own[0]!r} is" if row.own else "its prompt holds"
            raise UserError(f"{row.where}: {given} no problem of {', '.join(b.name for b in benchmarks)}")
    if None not in found:
        return found
    named = _problems_by_id(rows, benchmarks, limit)
    if named is None:
        if len(benchmarks) > 1 or len(rows) not in (len(benchmarks[0].problems), limit):
            raise UserError(
                f"{rows[found.index(None)].where} has no prompt, and no id that names its problem; then the file "
                "must have a row for each problem of one benchmark"
            )
        print(f"{path}: rows without a prompt or an id of a problem are taken in the order of {benchmarks[0].name}")
        named = [(0, place) for place in range(len(found))]
    return [problem or by_id for problem, by_id in zip(found, named)]


def _places(benchmarks: list[Benchmark]) -> dict[str, list[Problem]]:
    """{text of a problem: its places}, several if it is there several times."""
    places: dict[str, list[Problem]] = {}
    for which, benchmark in enumerate(benchmarks):
        for i, text in enumerate(benchmark.problems):
            places.setdefault(_words(text), []).append((which, i))
    return places


def _problem_in(text: str, places: dict[str, list[Problem]]) -> Problem | None:
    """Of all problems contained in a text the one that ends last; if several end there, the longest, since one problem
    may contain another; of its places the first."""
    text = _words(text)
    held = [(at + len(words), len(words), words) for words in places if (at := text.rfind(words)) >= 0]
    return places[max(held)[2]][0] if held else None


def _words(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _problems_by_id(rows: list[EngineRow], benchmarks: list[Benchmark], limit: int) -> list[Problem] | None:
    """The problem of each row by the first of its ids that identifies a problem in every row: its custom_id, or better
    by a benchmark's own id than by a number, which may be the row's. None if there is none.

    Raises:
        UserError: if the rows have a custom_id and no id identifies a problem: engines that write one promise no order.
    """
    for name, counted in sorted(product(rows[0].ids, (False, True)), key=lambda way: way[1] and way[0] != "custom_id"):
        ids = [row.ids.get(name, "") for row in rows]
        # With several benchmarks an id begins with the name of one; of several such names the longest is meant.
        names = [b.name for b in benchmarks] if len(benchmarks) > 1 else [""]
        whose = [max((name for name in names if id.startswith(name)), key=len, default=None) for id in ids]
        problems: dict[str, Problem] = {}
        for which, benchmark in enumerate(benchmarks):
            own = [id for id, begin in zip(ids, whose) if begin == names[which]]
            problems |= {id: (which, i) for id, i in _indices(own, benchmark, limit, counted).items()}
        if problems.keys() >= {*ids}:
            return [problems[id] for id in ids]
    if "custom_id" in rows[0].ids:
        raise UserError(
            f"{rows[0].where}: its custom_id {rows[0].ids['custom_id']!r} names no problem of "
            f"{', '.join(b.name for b in benchmarks)} by an id or its only number; give the rows their prompts"
        )
    return None


def _indices(ids: list[str], benchmark: Benchmark, limit: int, counted: bool) -> dict[str, int]:
    """{id: index of its problem} for the benchmark's own ids, or if `counted` for ids with a number that is one, or that
    runs over all problems, from 0 or 1. Empty if the ids are neither, or contain several such numbers."""
    if len(benchmark.problems) == 1:
        return dict.fromkeys(ids, 0)
    for own in benchmark.ids.values():
        if set(ids) <= set(own):
            return {id: own.index(id) for id in set(ids)}
    numbers = [[str(int(n)) for n in re.findall(r"[0-9]{1,9}", id.removeprefix(benchmark.name))] for id in ids]
    counts = [[str(start + i) for i in range(len(benchmark.problems))] for start in (0, 1)]
    found = []
    for column in zip(*numbers) if counted and len(set(map(len, numbers))) == 1 else ():
        for own in (*benchmark.ids.values(), *counts):
            if {*column} in ({*own}, {*own[:limit]}):
                found.append({id: own.index(number) for id, number in dict(zip(ids, column)).items()})
                break
    return found[0] if len(found) == 1 else {}


def _own_benchmarks(path: str, rows: list[EngineRow]) -> tuple[list[Benchmark], list[Problem]]:
    """The file's prompts as benchmarks, with the file's own gold answers, and the problem of each row."""
    golds: dict[str, dict[str | int, list[str]]] = {}  # {benchmark: {problem: its gold answers}}
    keys = []
    for row in rows:
        name, key = row.own or (Path(path).stem, row.prompt or next(iter(row.ids.values()), None))
        own = golds.setdefault(name, {})
        if key is None:
            raise UserError(f"{row.where} has neither a prompt nor an id, which would say what problem it answers")
        if row.golds is None and key not in own:
            raise UserError(f"{row.where} has no gold answer of its own: name the benchmark with --benchmarks")
        if row.golds is not None and own.setdefault(key, gold := golds_of(row.where, row.golds)) != gold:
            raise UserError(f"{row.where} has another gold answer than an earlier row of the same problem")
        keys.append((name, key))
    if unsure := {row.gold_field for row in rows} & {"answer", "label"}:
        print(f"{path}: its own {' and '.join(sorted(unsure))!r} is taken for the gold answer")
    places, benchmarks = {}, []
    for which, (name, own) in enumerate(golds.items()):
        if all(isinstance(key, int) for key in own):  # rows of samples.jsonl, in the order in which they were finished
            own = dict(sorted(own.items()))
        places |= {(name, key): (which, i) for i, key in enumerate(own)}
        texts = [*map(str, own)]
        benchmarks.append(Benchmark(name, texts, texts, [*own.values()]))
    check_golds(path, [gold for benchmark in benchmarks for gold in benchmark.golds])
    return benchmarks, [places[key] for key in keys]


def _refuse_prompts(path: str, rows: list[EngineRow], asked: list[str]) -> None:
    """Refuse completions that begin with a few-shot prompt, whose boxes would count as answers."""
    texts = [(one.text, problem) for row, problem in zip(rows, asked) for one in row.completions]
    num_boxed = sum(problem in text and bool(extract_answer(text[: text.find(problem)])) for text, problem in texts)
    if 2 * num_boxed > len(texts):
        raise UserError(
            f"{path}: {num_boxed:,} of {len(texts):,} completions have a boxed answer in front of the problem itself, "
            "so they seem to begin with their prompts; a row must hold the completion alone"
        )


def _by_problem(rows: Iterable[tuple[EngineRow, Problem]], thinking: bool) -> Found:
    """One model's completions of each problem. A repeated sample number with the same text is the same sample."""
    found: dict[Problem, dict[int, Completion]] = {}  # by sample number
    seen = set()
    for row, problem in rows:
        own = found.setdefault(problem, {})
        for one in row.completions:
            if not row.own and (thinking or row.opens) and "<think>" not in one.text:
                one.text = f"<think>\n{one.text}"
            if row.sample is not None and (problem, row.sample, one.text) in seen:
                continue
            seen.add((problem, row.sample, one.text))
            number = row.sample if row.own else len(own)
            if number in own:
                raise UserError(f"{row.where} is sample {number} of its problem, as is an earlier row with other text")
            own[number] = one
    return {problem: [own[number] for number in sorted(own)] for problem, own in found.items()}


def _with_repeated_problems(benchmarks: list[Benchmark], found: Found) -> Found:
    """Completions of a problem that is there several times, split among its copies; every copy gets all of them if
    there are only as many as another problem has. A benchmark with no completions of its other problems gets none."""
    places = _places(benchmarks).values()
    n = max((len(found[one]) for one, *more in places if not more and one in found), default=0)
    unshared = [copies[0] for copies in places if len({which for which, _ in copies}) == 1]
    absent = {which for which, _ in unshared} - {which for which, _ in found.keys() & unshared}
    for one, *more in places:
        if one in found and found.keys().isdisjoint(more):
            own = found.pop(one)
            copies = [copy for copy in (one, *more) if copy[0] not in absent] or [one]
            share = len(own) // len(copies) if len(own) != n and len(own) % len(copies) == 0 else 0
            for k, copy in enumerate(copies):
                found[copy] = own[k * share : (k + 1) * share] if share else own
    return found


def _graded(path: str, name: str, benchmarks: list[Benchmark], found: Found, limit: int) -> list[list[Row]]:
    """One model's completions graded, by benchmark."""
    samples = []
    for which, benchmark in enumerate(benchmarks):
        problems = [found.get((which, i), []) for i in range(len(benchmark.problems))][: limit or None]
        if not any(problems):
            print(f"{path}: {name} has no completions for {benchmark.name}")
            continue
        n = max(map(len, problems))
        for i, own in enumerate(problems):
            if len(own) != n:
                raise UserError(
                    f"{path}: {name} has {len(own)} completions for problem {i + 1} of {benchmark.name} and {n} for "
                    "others; every problem needs the same number (--limit N grades the first N problems alone)"
                )
        if n > 1 and all(min(Counter(one.text for one in own).values()) > 1 for own in problems):
            print(f"{path}: {name} has every completion of {benchmark.name} more than once, word for word")
        numbered = [(i, k, one) for i, own in enumerate(problems) for k, one in enumerate(own)]
        samples.append([graded(name, benchmark, i, k, one.text, one.tokens, one.reason) for i, k, one in numbered])
    return samples


if __name__ == "__main__":
    run_script(lambda _: print("\n".join(f"{path:24}{who}" for path, who in LAYOUTS.items()), flush=True))
