"""The layouts in which engines write completions, as one table; docs/layouts.md has an example of each.

A layout is known by the field that its completions stand in. What stands there is a text, an object that has one of these
fields in its turn, or a list of either. What the objects on the way say of tokens, thinking and why a completion ended
counts, the innermost first. Names are read without regard to case and underscores around them (finishReason, __doc__).
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.formats import parse_json
from nanoredi.data.benchmarks import SURE_GOLDS, in_one_case, listed
from nanoredi.data.messages import THINKING_NAMES

# The completions' field, and who writes it. The first that a row has counts.
LAYOUTS = {
    "result": "batch output of Anthropic's API, HELM",
    "choices": "chat.completion",
    "candidates": "Gemini's generateContent",
    "outputs": "vLLM's RequestOutput",
    "model_response": "lighteval's details",
    "model_output": "evalscope, Bedrock's batch output",
    "predictions": "lighteval's older details",
    "resps": "lm-eval's samples",
    "responses": "rllm's and verl's",
    "completions": "{prompt, completions}",
    "completion": "sample.py's, TRL's",
    "response": "samples.jsonl of evaluate.py, batch output of OpenAI's API and vLLM's run-batch",
    "output": "{prompt, output}, verl's {input, output, gts, score}, OpenAI's Responses, Inspect's samples",
    "generated_text": "{prompt, generated_text}",
    "generations": "{problem, generations}",
    "generation": "NeMo-Skills' and distilabel's",
    "text": "SGLang's {text, meta_info}",
    "messages": "a conversation that ends with the assistant",
    "conversations": "the same in ShareGPT's names",
    "all_messages": "MathArena's outputs",
    "code": "Qwen2.5-Math's evaluation",
    "message": "Ollama's chat",
    "content": "llama.cpp's server, Anthropic's messages",
    "prediction": "OpenCompass' predictions",
    "predict": "LLaMA-Factory's generated_predictions.jsonl",
}
_INNER = (*LAYOUTS, "body", "parts", "value")  # of an object within the row
_PROMPTS = (
    "full_prompt prompt messages conversations origin_prompt instruction input inputs problem question query example "
    "arguments doc.query doc.problem doc.question"
).split()
# A final_answer may be what the model has come to.
_GOLDS = ("reward_model.ground_truth", *SURE_GOLDS, "target", "answer", "label")
_IDS = (
    "custom_id problem_id question_id unique_id doc_id idx index id uid key record_id request_id doc.id "
    "extra_info.index meta_info.id"
).split()
_MODELS = ("model", "model_name", "model_id", "generator", "response.body.model")
# Of the completions in an object; these may stand in another one within it.
_ABOUT = ("", "usage.", "meta_info.", "details.")
_TOKENS = (
    "completion_tokens output_tokens generated_tokens num_generated_tokens eval_count tokens_predicted token_ids "
    "output_ids tokens"
).split()
_REASONS = ("finish_reason", "done_reason", "stop_type", "stop_reason", "incomplete_details.reason")
_THINKING = (*THINKING_NAMES, "reasonings")
_UNASKED = (*_THINKING, "role", "from", "type")  # of a message
_CUT_OFF = ("max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "limit")  # "length"


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
    path: str | None = None  # the completions' field
    texts: str = ""  # all that the row holds beside its completions
    model: str | None = None  # who answered, where the row says so
    # Of a row of samples.jsonl, which is sure of them:
    benchmark: str | None = None
    problem: int | None = None
    sample: int | None = None


def read(where: str, row: Any) -> Answers:
    """A row in whichever layout it has.

    Raises:
        UserError: for one in no layout, naming its fields; for a completion that is no text, and a count or reason of
            another type.
    """
    given = {"outputs": row} if isinstance(row, list) else row  # the samples of a problem
    if not isinstance(given, dict):
        raise UserError(f"{where} holds no JSON object")
    row = _plain(in_one_case(where, given, _name))
    prompts = [text for path in _PROMPTS if (text := "\n".join(_texts(_get(row, path))))]
    found = Answers(where, "\n".join(prompts) or None, [], any(p.rstrip().endswith("<think>") for p in prompts))
    found.golds = next((gold for path in _GOLDS if (gold := _get(row, path)) not in (None, "")), None)
    index, choices = _get(row, "doc.gold_index"), _get(row, "doc.choices")
    if isinstance(index, (int, list)) and isinstance(choices, list):
        indices = index if isinstance(index, list) else [index]
        found.golds = [choices[i] for i in indices if isinstance(i, int) and i in range(len(choices))]
    choices = row.get("choices") or row.get("options")
    if isinstance(choices, list) and isinstance(found.golds, int) and found.golds in range(len(choices)):
        found.golds = [chr(ord("A") + found.golds), str(choices[found.golds])]
    found.ids = {path: str(value) for path in _IDS if isinstance(value := _get(row, path), (str, int))}
    found.model = next((name for path in _MODELS if isinstance(name := _get(row, path), str)), None)
    if isinstance(row.get("problem"), int) and isinstance(row.get("benchmark"), str):
        found.benchmark, found.problem, found.sample = row["benchmark"], row["problem"], row.get("sample")
        found.model = str(row.get("model"))
        if type(found.sample) is not int:
            raise UserError(f"{where}: its 'sample' is {str(found.sample)[:60]!r}; it must be a whole number")
    found.path = _field(row, LAYOUTS)
    if found.path is not None:
        found.completions = _described(_completions(row[found.path]), row)
    if not any(one.text for one in found.completions):
        found.error = _error(row, found.completions)
    if found.error is None:
        _check(found, given, row, prompts)
    else:
        found.completions = []
    found.texts = "\n".join(text for name, value in row.items() for text in _texts(value, name != found.path))
    return found


def _check(found: Answers, given: dict[str, Any], row: dict[str, Any], prompts: list[str]) -> None:
    """Refuse a row without whole completions; say in one way why they ended."""
    where, path = found.where, found.path
    if path is None:
        raise UserError(
            f"{where} is in no layout that is known here: it has the fields {', '.join(given) or 'none at all'}; known are "
            f"{', '.join(f'{path} ({who})' for path, who in LAYOUTS.items())}"
        )
    is_piece = row.get("done") is False or path == "content" and row.get("stop") is False
    if is_piece or str(row.get("object")).endswith(".chunk"):
        raise UserError(f"{where} is a piece of a stream; a row must hold a whole completion: ask without streaming")
    if not found.completions:
        raise UserError(f"{where}: its {path!r} holds no completion")
    for one in found.completions:
        if not isinstance(one.text, str):
            raise UserError(f"{where} has no text where its completion should be, but {str(one.text)[:60]!r}")
        if not (one.tokens is None or type(one.tokens) is int and one.tokens >= 0):
            raise UserError(f"{where}: its number of tokens is {str(one.tokens)[:60]!r}; it must be a whole number")
        one.reason = one.reason.get("type") if isinstance(one.reason, dict) else one.reason
        if not (one.reason is None or isinstance(one.reason, str)):
            raise UserError(f"{where}: its finish_reason is {str(one.reason)[:60]!r}; it must be a text")
        if one.reason and one.reason.lower().rpartition(".")[2] in _CUT_OFF:
            one.reason = "length"
        for prompt in prompts:  # transformers' pipelines repeat it
            one.text = one.text.removeprefix(prompt)


def _completions(value: Any) -> list[Completion]:
    """All that stand in a text, in an object, or in lists of these."""
    text: Any
    value = _unquoted(value)
    if isinstance(value, list) and (parts := _parts(value)) is not None:
        return [Completion(parts)]
    if isinstance(value, list):
        is_asked = _role(value) and any(_role([message]) != "assistant" for message in value)
        return [one for item in (value[-1:] if is_asked else value) for one in _completions(item)]
    if not isinstance(value, dict):
        return [Completion("" if value is None else value)]
    if (name := _field(value, _INNER)) is not None:
        inner = value[name] if name != "parts" else _parts(value[name], True)
        return _described(_completions(inner), value)
    # Filtered by the server, or else no completion, which _check says.
    text = "" if {"role", "finish_reason"} & value.keys() else value
    return [Completion(text)]


def _described(found: list[Completion], value: dict[str, Any]) -> list[Completion]:
    """Completions with what the object around them says of them, unless one within it has said so."""
    num = len(found)
    about = _each(value, _TOKENS, num, len), _each(value, _REASONS, num), _each(value, _THINKING, num)
    for one, tokens, reason, thinking in zip(found, *about):
        one.tokens = one.tokens if one.tokens is not None else tokens
        one.reason = one.reason if one.reason is not None else reason
        if thinking and isinstance(thinking, str) and isinstance(one.text, str) and "</think>" not in one.text:
            one.text = f"<think>\n{thinking}</think>{one.text}"
    return found


def _each(value: dict[str, Any], names: Iterable[str], num: int, count: Any = None) -> list[Any]:
    """What an object says under the first of some names, for each of its completions. Of several completions a list says
    it one by one; anything else is of all together. A list may also be what is counted."""
    for path in (about + name for about in _ABOUT for name in names):
        said = _get(value, path)
        if count and isinstance(said, dict):
            continue
        if not isinstance(said, list):
            said = [said] * num if num == 1 else []
        elif count and num == 1 and not (said and isinstance(said[0], list)):
            said = [len(said) or None]
        if len(said) == num and any(one is not None for one in said):
            said = [len(one) if count and isinstance(one, list) else one for one in said]
            return [int(one) if isinstance(one, float) and one.is_integer() else one for one in said]
    return [None] * num


def _field(value: dict[str, Any], names: Any) -> str | None:
    """Which field of an object holds its completions; one that is null or empty where no other does."""
    there = [name for name in names if name in value and _may_hold_completions(value, name, names is LAYOUTS)]
    return next((name for name in there if value[name] not in (None, [])), next(iter(there), None))


def _may_hold_completions(row: dict[str, Any], name: str, top: bool) -> bool:
    """Whether a field holds completions, and nothing else that bears its name."""
    value = row[name]
    if name in ("messages", "conversations", "all_messages"):  # else it is the prompt
        return _role(value) == "assistant"
    if name == "choices":  # else they are those of the question
        return value is None or isinstance(value, list) and all(isinstance(one, dict) for one in value)
    if top and name == "text":
        return "meta_info" in row
    if top and name in ("code", "message", "content"):  # words that errors and prompts have, too
        if row.get("error") or {"response", "text"} & row.keys():
            return False
        if name == "content" and row.get("role") != "assistant" and not {"stop_type", "stop"} & row.keys():
            return False
        if name == "message" and _role([value]) != "assistant":
            return False
    if name in ("code", "parts", "message"):
        return isinstance(value, dict if name == "message" else list)
    if name in ("response", "result", "body", "model_response", "model_output") and isinstance(value, dict):
        return _field(value, _INNER) is not None
    return name != "result"


def _unquoted(value: Any) -> Any:
    """A list of texts, messages or an API's response that was written as a text; what else may be the model's own JSON."""
    if isinstance(value, str) and value[:2] in ("[{", '{"'):
        with suppress(UserError):
            inner = parse_json("it", value)
            return _plain(inner) if _role(inner) or "choices" in inner else value
    return listed(value)


def _texts(value: Any, is_asked: bool = True) -> Iterator[str]:
    """All texts, however deep, that the model has neither said nor thought."""
    value = _unquoted(value)  # lm-eval writes the messages of an API so
    if isinstance(value, str) and is_asked:
        yield value
    if isinstance(value, dict):
        role = _role([value])
        is_asked = role != "assistant" if role else is_asked
        value = [inner for name, inner in value.items() if name not in _UNASKED]
    for inner in value if isinstance(value, list) else ():
        yield from _texts(inner, is_asked)


def _role(messages: Any) -> str | None:
    """Whose the last of some messages is; None where they are none."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return None
    role = messages[-1].get("role") or messages[-1].get("from")
    return {"gpt": "assistant", "model": "assistant"}.get(role, role) if isinstance(role, str) else None


def _parts(content: list[Any], is_sure: bool = False) -> str | None:
    """The text of a content in parts, [{"type": "text", "text": TEXT}, ...], its thinking in front; None where it is none,
    as messages are, and samples."""
    if not content or not all(isinstance(part, dict) for part in content):
        return None
    if not is_sure and not (all("type" in part for part in content) and any("role" not in part for part in content)):
        return None
    thinks = [part.get("thought") is True or part.get("type") in ("thinking", "reasoning") for part in content]
    thinking, text = ("".join(_part(p) for p, own in zip(content, thinks) if own is which) for which in (True, False))
    return f"<think>\n{thinking}</think>{text}" if thinking else text


def _part(part: Any) -> str:
    """What a part says, itself or by parts of its own."""
    said = next((part[name] for name in ("text", "content", *THINKING_NAMES, "summary") if _get(part, name)), "")
    return said if isinstance(said, str) else "".join(map(_part, said)) if isinstance(said, list) else ""


def _error(row: dict[str, Any], found: list[Completion]) -> str | None:
    """Why the server could not answer a row without a text, in its own words; None where it could."""
    body = _get(row, "response.body")
    errors = [_get(body, "error"), body if isinstance(_get(body, "message"), str) else None, _get(row, "result.error")]
    errors += [row.get("error"), row if row.get("object") == "error" else None]
    if not found:
        errors += [_get(row, "response.prompt_feedback"), row.get("prompt_feedback"), _get(row, "result.type")]
    answered = row.get("response", "by no batch")
    if answered in (None, {}) or not found and isinstance(answered, dict) and {"body", "status_code"} & answered.keys():
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


def _plain(value: Any) -> Any:
    """A value from JSON with its names in lower case, words joined by underscores."""
    if isinstance(value, dict):
        return {_name(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


@lru_cache(10_000)
def _name(name: str) -> str:
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).strip("_").lower()
