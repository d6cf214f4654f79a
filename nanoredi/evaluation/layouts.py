"""The layouts in which engines write completions, as one table; docs/layouts.md has an example of each.

A layout is known by the field that its completions stand in. What stands there is a text, an object of an engine that
holds one, or a list of either. Prompt, gold answers and ids are looked for under the names that any layout has for them.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from nanoredi.common.errors import UserError

# The completions' field (of an object within the row after a dot), and who writes it. The first that a row has counts.
LAYOUTS = {
    "response.body": "batch output of OpenAI's API and vLLM's run-batch",
    "result.message": "batch output of Anthropic's API",
    "choices": "chat.completion",
    "outputs": "vLLM's RequestOutput",
    "model_response.text": "lighteval's details",
    "__model_response__.text": "lighteval's details, flat",
    "predictions": "lighteval's older details",
    "resps": "lm-eval's samples",
    "responses": "rllm's and verl's",
    "completion": "sample.py's",
    "response": "samples.jsonl of evaluate.py",
    "output": "{prompt, output} and verl's {input, output, gts, score}",
    "generated_text": "{prompt, generated_text}",
    "generations": "{problem, generations}",
    "text": "SGLang's {text, meta_info}",
    "messages": "a conversation that ends with the assistant",
    "conversations": "the same in ShareGPT's names",
    "code": "Qwen2.5-Math's evaluation",
    "message": "Ollama's chat",
    "content": "llama.cpp's server",
}
_PROMPTS = (
    *("full_prompt", "prompt", "messages", "conversations", "input", "inputs", "problem", "question", "query"),
    *("example", "arguments", "doc.query", "__doc__.query", "doc.problem", "doc.question", "doc.Problem"),
    *("doc.Question", "request.body.messages", "body.messages"),
)
_GOLDS = ("gold", "gts", "reward_model.ground_truth", "ground_truth", "target", "answer", "expected_answer", "gt")
_IDS = (
    *("custom_id", "problem_id", "question_id", "unique_id", "doc_id", "idx", "index", "id", "uid", "key"),
    *("request_id", "doc.id", "extra_info.index", "meta_info.id"),
)
# "length", in other words.
_CUT_OFF = ("max_tokens", "MAX_TOKENS", "max_length", "max_new_tokens", "model_length", "limit")
# Of a row's only completion.
_TOKENS = (
    *("usage.completion_tokens", "result.message.usage.output_tokens", "details.generated_tokens", "eval_count"),
    *("tokens", "tokens_predicted"),
)
_REASONS = ("finish_reason", "done_reason", "details.finish_reason", "stop_type")


@dataclass
class Completion:
    """A text; its tokens and why it ended, where the engine says so."""

    text: str
    tokens: int | None = None
    reason: str | None = None


@dataclass
class Answers:
    """A row of the file."""

    where: str  # "file, line n"
    prompt: str | None  # its texts, the question last; None where there is none to be read
    completions: list[Completion]
    opens: bool = False  # the prompt ends by opening <think>, which is then no part of the completions
    golds: Any = None  # the row's own gold answers as the file has them, if any
    ids: dict[str, str] = field(default_factory=dict)  # of whatever may name the problem
    error: str | None = None  # the server's own words, where the request failed; then there are no completions
    # Of a row of samples.jsonl, which is sure of them:
    model: str | None = None
    benchmark: str | None = None
    problem: int | None = None
    sample: int | None = None


def read(where: str, row: Any) -> Answers:
    """A row in whichever layout it has.

    Raises:
        UserError: for one in no layout, naming its fields; for a completion that is no text, and a count or reason of
            another type.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} holds no JSON object")
    prompts = [text for path in _PROMPTS if (text := _text(_get(row, path), prompt=True))]
    found = Answers(where, "\n".join(prompts) or None, [], any(p.rstrip().endswith("<think>") for p in prompts))
    found.golds = next((gold for path in _GOLDS if (gold := _get(row, path)) is not None), None)
    doc = row.get("doc") or row.get("__doc__")
    if isinstance(index := _get(doc, "gold_index"), (int, list)) and isinstance(doc.get("choices"), list):
        indices = index if isinstance(index, list) else [index]
        found.golds = [doc["choices"][i] for i in indices if isinstance(i, int) and i < len(doc["choices"])]
    found.ids = {path: str(value) for path in _IDS if isinstance(value := _get(row, path), (str, int))}
    if isinstance(row.get("problem"), int) and isinstance(row.get("benchmark"), str):
        found.benchmark, found.problem, found.sample = row["benchmark"], row["problem"], row.get("sample")
        found.model = str(row.get("model"))
        if type(found.sample) is not int:
            raise UserError(f"{where}: its 'sample' is {str(found.sample)[:60]!r}; it must be a whole number")
    there = [path for path in LAYOUTS if _may_hold_completions(row, path)]
    path = next((path for path in there if _get(row, path) is not None), None)
    found.error = _error(row, path)
    if found.error is None:
        found.completions = _all(where, row, path or next(iter(there), None))  # null is an empty response
    return found


def _all(where: str, row: dict[str, Any], path: str | None) -> list[Completion]:
    """The completions that stand under a path."""
    if path is None:
        raise UserError(
            f"{where} is in no layout that is known here: it has the fields {', '.join(row) or 'none at all'}; known are "
            f"{', '.join(f'{path} ({who})' for path, who in LAYOUTS.items())}"
        )
    found = _completions(row if path == "text" else _get(row, path))
    beside = path.partition(".")[0]
    for name, fill in (("reasonings", _put_in_front), ("output_tokens", _count)):
        values = _get(row, f"{beside}.{name}")
        for one, own in zip(found, values if isinstance(values, list) else []):
            fill(one, own)
    if len(found) == 1:  # of several a row's own count is of all together
        usages = f"{path}.usage.completion_tokens", *_TOKENS
        # llama.cpp's tokens are ids, of which there are none where they were not asked for.
        counts = [_get(row, usage) for usage in usages if (path, usage) != ("content", "tokens")]
        found[0].tokens = _first(found[0].tokens, *counts)
        found[0].reason = _first(found[0].reason, *(_get(row, reason) for reason in _REASONS))
        if "</think>" not in str(found[0].text):
            _put_in_front(found[0], row.get("reasoning_content") or row.get("reasoning") or row.get("thinking"))
    for one in found:
        if isinstance(row.get("prompt"), str) and path == "generated_text" and isinstance(one.text, str):
            one.text = one.text.removeprefix(row["prompt"])  # transformers' pipelines repeat it
        one.reason = one.reason.get("type") if isinstance(one.reason, dict) else one.reason
        one.reason = "length" if one.reason in _CUT_OFF else one.reason
        _check(where, one)
    if not found:
        raise UserError(f"{where}: its {path!r} holds no completion")
    return found


def _put_in_front(one: Completion, reasoning: Any) -> None:
    if reasoning and isinstance(reasoning, str) and isinstance(one.text, str):
        one.text = f"<think>\n{reasoning}</think>{one.text}"


def _count(one: Completion, ids: Any) -> None:
    one.tokens = len(ids) if isinstance(ids, list) else None


def _check(where: str, one: Completion) -> None:
    if not isinstance(one.text, str):
        raise UserError(f"{where} has no text where its completion should be, but {str(one.text)[:60]!r}")
    if not (one.tokens is None or type(one.tokens) is int and one.tokens >= 0):
        raise UserError(f"{where}: its number of tokens is {str(one.tokens)[:60]!r}; it must be a whole number")
    if not (one.reason is None or isinstance(one.reason, str)):
        raise UserError(f"{where}: its finish_reason is {str(one.reason)[:60]!r}; it must be a text")


def _completions(value: Any) -> list[Completion]:
    """All that stand in a text, in an object, or in lists of these."""
    if isinstance(value, list) and (_role(value) or _parts(value) is None):
        if _role(value) and any(_role([message]) != "assistant" for message in value):
            value = value[-1:]
        return [one for item in value for one in _completions(item)]
    if not isinstance(value, dict):
        return [Completion(_text(value) if isinstance(value, list) else "" if value is None else value)]
    if isinstance(value.get("choices"), list):
        return _completions(value["choices"])
    message = value["message"] if isinstance(value.get("message"), dict) else value
    content = next((message[key] for key in ("content", "text", "generated_text", "value") if key in message), message)
    if {"role"} <= message.keys() <= {"role", "refusal", "tool_calls", "reasoning", "reasoning_content"}:
        content = None  # filtered by the server
    ids = value.get("token_ids") or value.get("output_ids")
    tokens = len(ids) if isinstance(ids, list) else _get(value, "meta_info.completion_tokens")
    reason = _first(value.get("finish_reason"), _get(value, "meta_info.finish_reason"), value.get("stop_reason"))
    if isinstance(content, list) and content and all(isinstance(one, str) for one in content):
        return _completions(content)
    if isinstance(content, list):
        content = _text(content)
    text: Any = "" if content is None else content  # _check looks at it
    one = Completion(text, tokens, reason)
    _put_in_front(one, message.get("reasoning_content") or message.get("reasoning") or message.get("thinking"))
    return [one]


def _text(value: Any, prompt: bool = False) -> str | None:
    """A text, the text parts of a content, or of a prompt's messages the contents of all but the assistant's last one. None
    where there is none."""
    if isinstance(value, str):
        if prompt and value.lstrip().startswith("[{"):  # messages, as lm-eval writes those of an API
            try:
                return _text(json.loads(value), prompt) or value
            except (ValueError, RecursionError):
                pass
        return value
    if isinstance(value, dict) and prompt:  # lm-eval's arguments
        value = list(value.values())
    if not isinstance(value, list):
        return None
    if _role(value):
        chosen = value[:-1] if _role(value) == "assistant" else value
        contents = [_first(m.get("content"), m.get("value")) for m in chosen]
        return "\n".join(text for content in contents if (text := _text(content))) or None
    if _parts(value) is not None:
        return _parts(value)
    return "\n".join(text for item in value if (text := _text(item, prompt))) if prompt else None


def _role(messages: Any) -> str | None:
    """Whose the last of some messages is; None where they are none."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return None
    role = _first(messages[-1].get("role"), messages[-1].get("from"))
    return {"gpt": "assistant", "model": "assistant"}.get(role, role) if isinstance(role, str) else None


def _parts(content: list[Any]) -> str | None:
    """The text of a content in parts, [{"type": "text", "text": TEXT}, ...], its thinking in front; None where it is none."""
    if not content or not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
        return None
    thinking = "".join(part["thinking"] for part in content if isinstance(part.get("thinking"), str))
    text = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    return f"<think>\n{thinking}</think>{text}" if thinking else text


def _error(row: dict[str, Any], path: str | None) -> str | None:
    """Why the server could not answer, in its own words; None where it could."""
    body = _get(row, "response.body")
    errors = [_get(body, "error"), body if isinstance(_get(body, "message"), str) else None, _get(row, "result.error")]
    if path is None or _get(row, "response.body.choices") == []:
        errors += [row.get("error"), row if row.get("object") == "error" else None]
        if "response" in row and (not row["response"] or {"body", "status_code"} & row["response"].keys()):
            errors.append("no response, and no word why")
    return next((_message(error) for error in errors if error), None)


def _message(error: Any) -> str:
    """The first `message` in an error object, however deep; else all of it."""
    inner = error
    while isinstance(inner, dict) and not isinstance(inner.get("message"), str):
        inner = next((value for value in inner.values() if isinstance(value, dict)), None)
    return inner["message"] if isinstance(inner, dict) else error if isinstance(error, str) else json.dumps(error)


def _get(row: Any, path: str) -> Any:
    """What a dotted path leads to; None where it leads nowhere."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _may_hold_completions(row: dict[str, Any], path: str) -> bool:
    """Whether a row has the field, and not as another layout's."""
    parent, _, key = path.rpartition(".")
    within = _get(row, parent) if parent else row
    if not isinstance(within, dict) or key not in within:
        return False
    if path in ("messages", "conversations"):  # else it is the prompt
        return _role(row[path]) == "assistant"
    if path == "response" and isinstance(row[path], dict) or path == "text" and "meta_info" not in row:
        return False
    value = within[key]
    if path == "choices":  # else they are those of the question
        return value is None or isinstance(value, list) and all(isinstance(one, dict) for one in value)
    if path in ("code", "message", "content"):  # words that errors and prompts have, too
        if row.get("error") or {"response", "text"} & row.keys() or row.get("role", "assistant") != "assistant":
            return False
        kinds = {"code": list, "message": dict, "content": str}
        return isinstance(value, kinds[path]) and (path != "message" or _role([value]) == "assistant")
    return True


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
