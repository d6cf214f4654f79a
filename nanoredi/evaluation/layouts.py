"""The layouts in which engines write completions, as one table; docs/layouts.md has an example of each.

A layout is recognised by the field that holds its completions. Its value is a text, an object that again has one of
these fields, or a list of either. Token counts, thinking and finish reasons are the innermost object's that has any.
Names are compared without regard to case and to underscores around them (finishReason, __doc__).
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import check
from nanoredi.common.formats import parse_json
from nanoredi.data.benchmarks import SURE_GOLDS, in_one_case, listed
from nanoredi.data.messages import THINKING_NAMES, is_thinking, last_role

# The field that holds the completions, and who writes it. If a row has several, the first one here counts.
LAYOUTS = {
    "result": "batch output of Anthropic's API, HELM",
    "choices": "chat.completion",
    "candidates": "Gemini's generateContent",
    "outputs": "vLLM's RequestOutput",
    "model_response": "lighteval's details",
    "model_output": "evalscope, Bedrock's batch output, evalchemy's examples",
    "model_outputs": "evalchemy's of several samples",
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
    "conversations": "the same with ShareGPT's names",
    "all_messages": "MathArena's outputs",
    "code": "Qwen2.5-Math's evaluation",
    "message": "Ollama's chat",
    "content": "llama.cpp's server, Anthropic's messages",
    "prediction": "OpenCompass' predictions",
    "predict": "LLaMA-Factory's generated_predictions.jsonl",
}
_INNER_FIELDS = (*LAYOUTS, "body", "parts", "value")  # the same for an object within the row
_FIELDS_IN_TEXT = "choices candidates outputs message content generated_text".split()  # for an object that is text
_PROMPTS = (
    "full_prompt prompt messages conversations origin_prompt instruction input inputs problem question query example "
    "arguments doc.query doc.problem doc.question"
).split()
# Not final_answer: that may be the model's.
_GOLDS = ("reward_model.ground_truth", *SURE_GOLDS, "target", "answer", "label")
_IDS = "custom_id problem_id question_id doc_id idx index id uid key doc.id extra_info.index meta_info.id".split()
_ID = re.compile("(example|instance|item|problem|prompt|query|question|record|request|row|task|unique)_(id|idx|index)")
_MODELS = "model model_name model_id generator response.model response.body.model output.model".split()
_DETAILS = ("", "usage.", "meta_info.", "details.")  # objects in an object, with what it says about its completions
_TOKENS = (
    "completion_tokens output_tokens generated_tokens num_generated_tokens eval_count tokens_predicted token_ids "
    "output_ids tokens"
).split()
_REASONS = ("finish_reason", "finish_reasons", "done_reason", "stop_type", "stop_reason", "incomplete_details.reason")
_THINKING = (*THINKING_NAMES, "reasonings")
_NOT_ASKED = (*_THINKING, "role", "from", "type", "until")  # fields of a message or request that no prompt shows
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")  # types of a content's parts
# Finish reasons that mean "length".
_CUT_OFF = "max_tokens max_length max_new_tokens max_output_tokens model_length model_context_window_exceeded limit"


@dataclass
class Completion:
    """A text, with its number of tokens and its finish reason if the engine gives them."""

    text: str
    tokens: int | None = None
    reason: str | None = None


@dataclass
class EngineRow:
    """What a row says about its problem and the completions of it."""

    where: str  # "file, line n"
    prompt: str  # its texts, the question last; empty if there is none
    opens: bool  # whether the prompt ends with <think>, which the completion then does not contain
    golds: Any  # the row's own gold answers, as they are in the file
    gold_field: str  # the field that they are in
    ids: dict[str, str]  # every field that may identify the problem
    model: str | None  # the model's name, if the row has it
    completions: list[Completion] = field(default_factory=list)
    error: str | None = None  # the server's message if the request failed; then there are no completions
    path: str | None = None  # the field that holds the completions
    others: list[str] = field(default_factory=list)  # other fields that may hold completions, with other values
    texts: str = ""  # all text of the row except its completions
    sample: int | None = None  # the sample's number, if nanoredi wrote the row
    own: tuple[str, int] | None = None  # the benchmark's name and the problem's number, if it is a row of samples.jsonl


def read(where: str, row: Any) -> EngineRow:
    """Read a row in whichever layout it has.

    Raises:
        UserError: if it has none, with the names of its fields; if a completion is not text, or a token count or finish
            reason has the wrong type.
    """
    given = {"outputs": row} if isinstance(row, list) else row  # the samples of a problem
    if not isinstance(given, dict):
        raise UserError(f"{where} holds no JSON object")
    row = _in_snake_case(in_one_case(where, given, _snake_case))
    row |= {name: _whole_number(row[name]) for name in ("sample", "problem") if name in row}
    prompts = [text for path in _PROMPTS if (text := "\n".join(_prompt_texts(_get(row, path))))]
    opens = any(prompt.rstrip().endswith("<think>") for prompt in prompts)
    model = next((name for path in _MODELS if isinstance(name := _get(row, path), str)), None)
    ids = dict.fromkeys([*_IDS, *filter(_ID.fullmatch, row)])
    ids = {path: str(value) for path in ids if isinstance(value := _get(row, path), (str, int, float))}
    found = EngineRow(where, "\n".join(prompts), opens, *_golds(row), ids, model)
    _read_own_numbers(found, row)
    fields = {name: _completions(row[name]) for name in _completion_fields(row, LAYOUTS)}
    if fields:
        texts = {name: [one.text for one in own] for name, own in fields.items()}
        found.path, *more = fields
        found.others = [name for name in more if row[name] and texts[name] != texts[found.path]]
        found.completions = _with_details(fields[found.path], row)
    if not any(one.text for one in found.completions):
        found.error = _error(row, found.completions)
    if found.error is None:
        _refuse(found, given, row)
        for one in found.completions:
            _settle(where, one, prompts)
    else:
        found.completions = []
    found.texts = "\n".join(text for name, value in row.items() for text in _prompt_texts(value, name not in fields))
    return found


def _prompt_texts(value: Any, is_asked: bool = True) -> Iterator[str]:
    """All texts, at any depth, that are no part of the model's answer or thinking, except for a given <think>."""
    value = _from_text(value)  # lm-eval writes messages as text
    if isinstance(value, str) and is_asked:
        yield value
    if isinstance(value, dict):
        is_asked = not _is_answer([value]) if last_role([value]) else is_asked
        value = [inner for name, inner in value.items() if name not in _NOT_ASKED]
    for inner in value if isinstance(value, list) else ():
        yield from _prompt_texts(inner, is_asked)


def _is_answer(messages: Any) -> bool:
    """Whether these are messages that end with an answer; a mere <think> was given to the model as its beginning."""
    return last_role(messages) == "assistant" and str(messages[-1].get("content")).strip() != "<think>"


def _golds(row: dict[str, Any]) -> tuple[Any, str]:
    """The row's own gold answers, which may be indices of choices, and the field that they are in."""
    name = next((path for path in _GOLDS if _get(row, path) not in (None, "", [])), "")
    golds = _get(row, name) if name else None
    indices, choices = _get(row, "doc.gold_index"), _get(row, "doc.choices")
    indices = [indices] if isinstance(indices, int) else indices
    if isinstance(indices, list) and isinstance(choices, list):  # lighteval's
        return [choices[i] for i in indices if isinstance(i, int) and i in range(len(choices))], name
    choices = row.get("choices") or row.get("options")
    if isinstance(choices, list) and isinstance(golds, int) and golds in range(len(choices)):
        if not isinstance(choices[golds], dict):  # else they are chat.completion's
            return [chr(ord("A") + golds), str(choices[golds])], name
    return golds, name


def _read_own_numbers(found: EngineRow, row: dict[str, Any]) -> None:
    """The numbers in rows of nanoredi's own: of samples.jsonl, or of sample.py, which numbers only the sample."""
    problem, sample = row.get("problem"), row.get("sample")
    if type(problem) is int and isinstance(row.get("benchmark"), str):
        found.own, found.model = (row["benchmark"], problem), str(row.get("model"))
        check(found.where, sample, int, "its 'sample'")
    if found.own or type(sample) is int and {"completion", "finish_reason", "tokens"} <= row.keys():
        found.sample = sample


def _completion_fields(value: dict[str, Any], names: Any) -> list[str]:
    """The fields of an object that may hold its completions, those that are null or empty last."""
    there = [name for name in names if name in value and _may_hold_completions(value, name, names is LAYOUTS)]
    return sorted(there, key=lambda name: value[name] in (None, [], ""))


def _may_hold_completions(row: dict[str, Any], name: str, top: bool) -> bool:
    """Whether a field holds completions, rather than something else with the same name. top: of the row, not within."""
    value = _from_text(row[name]) if top else row[name]
    has_failed = top and row.get("error")  # then a message or content is the server's
    match name:
        case "messages" | "conversations" | "all_messages":  # may be the prompt
            return _is_answer(value)
        case "choices":  # may be a question's choices
            return value is None or isinstance(value, list) and all(isinstance(one, dict) for one in value)
        case "text" if top:
            return "meta_info" in row
        case "content" if top:
            return not has_failed and (last_role([row]) == "assistant" or bool({"stop_type", "stop"} & row.keys()))
        case "message":
            return isinstance(value, dict) and not has_failed and (not top or last_role([value]) == "assistant")
        case "code" | "parts":
            return isinstance(value, list) and not has_failed
        case "response" | "result" | "body" | "model_response" | "model_output" if isinstance(value, dict):
            return bool(_completion_fields(value, _INNER_FIELDS))
    return name != "result"


def _completions(value: Any) -> list[Completion]:
    """All completions in a text, in an object, or in a list of these."""
    if isinstance(value, str):
        found = [] if (inner := _from_text(value)) is value else _completions(inner)
        return found if found and all(isinstance(one.text, str) for one in found) else [Completion(value)]
    if isinstance(value, list) and (parts := _text_of_parts(value)) is not None:
        return [Completion(parts)]
    if isinstance(value, list):
        is_asked = last_role(value) and any(last_role([message]) != "assistant" for message in value)
        return [one for item in (value[-1:] if is_asked else value) for one in _completions(item)]
    if isinstance(value, dict):
        if fields := _completion_fields(value, _INNER_FIELDS):
            inner = value[fields[0]] if fields[0] != "parts" else _text_of_parts(value["parts"], True)
            return _with_details(_completions(inner), value)
        if {"role", "finish_reason"} & value.keys():  # filtered by the server
            value = None
    return [Completion("" if value is None else value)]  # _settle refuses what is no text


def _text_of_parts(content: list[Any], is_sure: bool = False) -> str | None:
    """The text of a content in parts, [{"type": "text", "text": TEXT}, ...], after its thinking; None if the list is
    something else, such as messages or samples."""
    are_parts = all(isinstance(part, dict) and (is_sure or "type" in part) for part in content)
    if not are_parts or not is_sure and all("role" in part for part in content):
        return None
    thinks = [part.get("thought") is True or part.get("type") in _THOUGHTS for part in content]
    thinking, text = ("".join(_text_in(p) for p, own in zip(content, thinks) if own is kind) for kind in (True, False))
    return f"<think>\n{thinking}</think>{text}" if any(thinks) else text


def _text_in(part: Any) -> str:
    """The text of a part, or of the parts within it."""
    said = next((part[name] for name in ("text", "content", *THINKING_NAMES, "summary") if _get(part, name)), "")
    return said if isinstance(said, str) else "".join(map(_text_in, said)) if isinstance(said, list) else ""


def _with_details(found: list[Completion], value: dict[str, Any]) -> list[Completion]:
    """Add what the object around the completions says about them, unless an object within it has said so already."""
    num = len(found)
    about = _of_each(value, _TOKENS, num, count=True), _of_each(value, _REASONS, num), _of_each(value, _THINKING, num)
    for one, tokens, reason, thinking in zip(found, *about):
        one.tokens = one.tokens if one.tokens is not None else tokens
        one.reason = one.reason if one.reason is not None else reason
        if is_thinking(thinking) and isinstance(one.text, str) and "</think>" not in one.text:
            one.text = f"<think>\n{thinking}</think>{one.text}"
    return found


def _of_each(value: dict[str, Any], names: Iterable[str], num: int, count: bool = False) -> list[Any]:
    """What an object says about each of its completions, under the first of some names that it has. For several
    completions it must be a list: a single value is about all together. With `count` a list may also be counted."""
    for path in (about + name for about in _DETAILS for name in names):
        said = _get(value, path)
        if not isinstance(said, list):
            said = [said] if num == 1 and not (count and isinstance(said, dict)) else []
        elif count and num == 1:  # the completion's tokens, or a list of one such list or of one count
            is_of_one = len(said) == 1 and isinstance(said[0], list if path.endswith("ids") else (list, int))
            said = said if is_of_one else [len(said) or None]
        said = [len(one) if isinstance(one, list) else _whole_number(one) for one in said] if count else said
        if len(said) == num and any(one is not None for one in said):
            return said
    return [None] * num


def _whole_number(value: Any) -> Any:
    """A whole number that a table has as text or as a float (pandas: 12.0), or None for its empty cell; else the value."""
    if value == "":
        return None
    number = re.fullmatch(r"([0-9]{1,9})(\.0)?", str(value)) if isinstance(value, (str, float)) else None
    return int(number[1]) if number else value


def _error(row: dict[str, Any], found: list[Completion]) -> str | None:
    """The server's message about why a row has no text; None if the request did not fail."""
    body = _get(row, "response.body")
    errors = [_get(body, "error"), body if isinstance(_get(body, "message"), str) else None, _get(row, "result.error")]
    errors += [row.get("error"), row if row.get("object") == "error" else None]
    if not found:
        errors += [_get(row, "response.prompt_feedback"), row.get("prompt_feedback"), _get(row, "result.type")]
    answered = row.get("response", "not a batch")
    if answered in (None, {}) or not found and isinstance(answered, dict) and {"body", "status_code"} & answered.keys():
        errors.append("no response, for no given reason")
    return next((_message(error) for error in errors if error), None)


def _message(error: Any) -> str:
    """The first `message` in an error object, at any depth; else all of it."""
    inner = error
    while isinstance(inner, dict) and not isinstance(inner.get("message"), str):
        inner = next((value for value in inner.values() if isinstance(value, dict)), None)
    return inner["message"] if isinstance(inner, dict) else error if isinstance(error, str) else json.dumps(error)


def _refuse(found: EngineRow, given: dict[str, Any], row: dict[str, Any]) -> None:
    """Refuse a row without whole completions."""
    where, path = found.where, found.path
    if path is None:
        raise UserError(
            f"{where} is in no known layout: it has the fields {', '.join(given)[:500] or 'none at all'}, and "
            f"completions are looked for in {', '.join(LAYOUTS)} (docs/layouts.md has an example of each)"
        )
    is_piece = row.get("done") is False or path == "content" and row.get("stop") is False
    if is_piece or str(row.get("object")).endswith(".chunk"):
        raise UserError(f"{where} is a piece of a stream; a row must hold a whole completion: request them unstreamed")
    if not found.completions:
        raise UserError(f"{where}: its {path!r} holds no completion")


def _settle(where: str, one: Completion, prompts: list[str]) -> None:
    """Check a completion's types, unify its finish reason, and remove its prompt."""
    check(where, one.text, str, "its completion")
    check(where, one.tokens, (range(2**31), None), "its number of tokens")
    one.reason = one.reason.get("type", one.reason.get("reason")) if isinstance(one.reason, dict) else one.reason
    check(where, one.reason, (str, None), "its finish_reason")
    if one.reason and one.reason.lower().rpartition(".")[2] in _CUT_OFF.split():
        one.reason = "length"
    for prompt in prompts:  # which transformers' pipelines repeat
        one.text = one.text.removeprefix(prompt)


def _from_text(value: Any) -> Any:
    """A list of texts, messages, or objects with completions that were written as text. Other JSON may be the model's."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(UserError):
            inner = _in_snake_case(parse_json("it", value))
            objects, names = (inner, _INNER_FIELDS) if isinstance(inner, list) else ([inner], _FIELDS_IN_TEXT)
            if last_role(objects) or any(isinstance(one, dict) and _completion_fields(one, names) for one in objects):
                return inner
    return listed(value)


def _get(row: Any, path: str) -> Any:
    """The value at a dotted path; None if there is none."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _in_snake_case(value: Any) -> Any:
    """A value from JSON with all field names in snake case."""
    if isinstance(value, dict):
        return {_snake_case(name): _in_snake_case(inner) for name, inner in value.items()}
    return [_in_snake_case(inner) for inner in value] if isinstance(value, list) else value


@lru_cache(10_000)
def _snake_case(name: str) -> str:
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).strip("_").lower()
