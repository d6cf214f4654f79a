"""Completions that another engine wrote, in its own layout, as samples to grade.

Accepted are JSONL files of rows as

    vLLM's RequestOutput      {"prompt": TEXT, "outputs": [{"text", "finish_reason", "token_ids"}, ...]}
    vLLM's run-batch          {"response": {"body": {"choices": [{"message": {"content"}, "finish_reason"}, ...]}}}
    rllm's and verl's         {"prompt": [MESSAGES], "responses": [TEXT, ...], "reward_model": {"ground_truth"}}
    lighteval's details       {"doc": {"query", "choices", "gold_index"}, "model_response": {"text": [TEXT, ...]}}
    lighteval's older ones    {"full_prompt": TEXT, "predictions": [TEXT, ...], "gold": [TEXT, ...]}
    sample.py's               {"prompt" or "messages", "completion": TEXT, "finish_reason", "tokens"}

(Parquet to JSONL: `pandas.read_parquet(FILE).to_json(OUT, orient="records", lines=True)`.) A row belongs to the problem
whose text its prompt holds; without a prompt, to the problem at its place in the file. Several rows of one problem are
its samples in turn. The gold answers are the benchmark's, or the file's own where no benchmark is named.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import read_rows
from nanoredi.data.benchmarks import Benchmark, golds_of
from nanoredi.evaluation.scores import Row, graded


@dataclass
class _Answers:
    """A row of the file.

    Attributes:
        where: "file, line n".
        prompt: its text; None where the layout has none.
        texts: the completions.
        tokens: of each, or None.
        reasons: why each ended, or None.
        golds: the row's own gold answers, if it has any.
    """

    where: str
    prompt: str | None
    texts: list[str]
    tokens: list[int | None] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    golds: list[str] | None = None


def grade_file(path: str, name: str, benchmarks: list[Benchmark], thinking: bool) -> list[list[Row]]:
    """Grade a file of completions.

    Args:
        path: JSONL, in one of the layouts above.
        name: the model's, in the table.
        benchmarks: whose problems they answer; none: the file's own prompts and gold answers make one.
        thinking: whether the prompts opened <think>, which then is no part of the completions.

    Returns:
        For each benchmark that the file answers its samples (graded has the keys), as many for every problem.

    Raises:
        UserError: for an unknown layout, a row of no problem, and a problem that has another number of completions.
    """
    answers = [_read(where, row) for where, row in read_rows(path)]
    if not answers:
        raise UserError(f"{path} holds no rows")
    if not benchmarks:
        benchmarks = [_benchmark_of(path, answers)]
    samples: list[dict[int, list[Row]]] = [{} for _ in benchmarks]
    for which, problem, row in _assigned(path, answers, benchmarks):
        own = samples[which].setdefault(problem, [])
        opened = thinking or (row.prompt or "").rstrip().endswith("<think>")
        for i, text in enumerate(row.texts):
            response = f"<think>\n{text}" if opened and "<think>" not in text else text
            tokens, reason = (values[i] if i < len(values) else None for values in (row.tokens, row.reasons))
            own.append(graded(name, benchmarks[which], problem, len(own), response, tokens, reason))
    for benchmark, problems in zip(benchmarks, samples):
        counts = [len(problems.get(i, [])) for i in range(len(benchmark.questions))]
        odd = next((i for i, count in enumerate(counts) if count != max(counts)), None)
        if problems and odd is not None:
            raise UserError(
                f"{path} has {counts[odd]} completions for problem {odd + 1} of {benchmark.name} and {max(counts)} for "
                "others; every problem needs as many"
            )
    return [[s for i in sorted(problems) for s in problems[i]] for problems in samples if problems]


def _read(where: str, row: Any) -> _Answers:
    """A row in whichever layout it has."""
    if not isinstance(row, dict):
        raise UserError(f"{where} holds no JSON object")
    prompt = _text_of(row.get("prompt", row.get("messages")))
    try:
        if "outputs" in row:
            outputs = row["outputs"]
            tokens = [len(o["token_ids"]) if o.get("token_ids") else None for o in outputs]
            found = _Answers(
                where, prompt, [o["text"] for o in outputs], tokens, [o.get("finish_reason") for o in outputs]
            )
        elif "response" in row:
            body = row["response"]["body"]
            choices = body["choices"]
            # Of several choices the usage counts all together.
            tokens = [(body.get("usage") or {}).get("completion_tokens")] if len(choices) == 1 else []
            texts = [_with_reasoning(choice["message"]) for choice in choices]
            found = _Answers(where, prompt, texts, tokens, [choice.get("finish_reason") for choice in choices])
        elif "responses" in row:
            truth = (row.get("reward_model") or {}).get("ground_truth")
            found = _Answers(where, prompt, row["responses"], golds=truth and golds_of(where, truth))
        elif "model_response" in row or "__model_response__" in row:
            response = row.get("model_response") or row["__model_response__"]
            doc = row.get("doc") or row["__doc__"]
            index = doc["gold_index"]
            golds = [doc["choices"][i] for i in (index if isinstance(index, list) else [index])]
            tokens = [len(t) for t in response.get("output_tokens") or []]
            found = _Answers(where, doc["query"], response["text"], tokens, golds=golds_of(where, golds))
        elif "predictions" in row:
            prompt = _text_of(row.get("full_prompt", row.get("example")))
            golds = row.get("gold")
            found = _Answers(where, prompt, row["predictions"], golds=golds and golds_of(where, golds))
        else:
            found = _Answers(where, prompt, [row["completion"]], [row.get("tokens")], [row.get("finish_reason")])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where} is in no layout that is known here, or lacks a part of it ({error}); python -m "
            "nanoredi.evaluation.completions lists them"
        ) from None
    if not isinstance(found.texts, list) or not found.texts or not all(isinstance(t, str) for t in found.texts):
        raise UserError(f"{where} has no list of texts where its completions should be")
    return found


def _text_of(prompt: Any) -> str | None:
    """A text, or the contents of messages."""
    if isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return "\n".join(m["content"] for m in prompt)
    return prompt if isinstance(prompt, str) else None


def _with_reasoning(message: dict[str, Any]) -> str:
    """The content; where the server has split the thinking off, that in front of it."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return f"<think>\n{reasoning}</think>{message['content'] or ''}" if reasoning else message["content"]


def _benchmark_of(path: str, answers: list[_Answers]) -> Benchmark:
    """The prompts of a file as a benchmark, by the file's own gold answers."""
    golds: dict[str, list[str]] = {}
    for row in answers:
        if row.golds is None or row.prompt is None:
            raise UserError(f"{row.where} has no gold answer of its own: name the benchmark with --benchmarks")
        golds.setdefault(row.prompt, row.golds)
    return Benchmark(Path(path).stem, list(golds), list(golds), list(golds.values()))


def _assigned(path: str, answers: list[_Answers], benchmarks: list[Benchmark]) -> Iterator[tuple[int, int, _Answers]]:
    """For each row the benchmark and the problem that it answers."""
    problems = [(which, i, text) for which, b in enumerate(benchmarks) for i, text in enumerate(b.problems)]
    problems.sort(key=lambda one: -len(one[2]))  # a problem may stand in a longer one
    known: dict[str, tuple[int, int]] = {}
    for place, row in enumerate(answers):
        if row.prompt is None:
            if len(benchmarks) > 1 or len(answers) != len(benchmarks[0].problems):
                raise UserError(
                    f"{row.where} has no prompt; then the file must have a row for each problem of one benchmark"
                )
            yield 0, place, row
            continue
        if row.prompt not in known:
            found = next(((which, i) for which, i, text in problems if text.strip() in row.prompt), None)
            if found is None:
                names = ", ".join(b.name for b in benchmarks)
                raise UserError(f"{row.where}: its prompt holds no problem of {names}")
            known[row.prompt] = found
        yield *known[row.prompt], row


if __name__ == "__main__":
    print(__doc__.strip())
