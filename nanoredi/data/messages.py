"""Rows in people's layouts, read as messages: [{"role", "content"}], with "reasoning_content" if the thinking is apart.

    stage 1   {"messages"} or ShareGPT's {"conversations"}: a conversation that ends with the assistant's answer
              {"prompt", "completion"}, or Alpaca's {"instruction", "input", "output"}
    stage 2   {"prompt", "chosen", "rejected"}; chosen and rejected may be whole conversations that include the prompt

The prompt may have any name of PROMPTS, and a completion any of _ANSWERS. A prompt is text (the user's) or a list of
messages; an answer is text (the assistant's), a message, or a list that ends with one. A row may have the system message
as {"system"}. A message may be written as ShareGPT does, {"from", "value"}, and its content may be a list of text parts.
"""

import re
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.common.files import check

Messages = list[dict[str, Any]]
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # ShareGPT's and Gemini's names
# The names under which servers return the thinking apart from the content.
THINKING_NAMES = ("reasoning_content", "reasoning", "thinking")
SIDES = ("chosen", "rejected")
PROMPTS = ("prompt", "conversations", "messages", "problem", "question", "instruction", "query", "input")
# Fields that are one prompt together, by the field that must be there: Alpaca's, and those of questions about a text.
PARTS = {"instruction": ("instruction", "input", "context"), "question": ("context", "body", "question")}
_ANSWERS = ("completion", "output", "response", "generation", "generated_solution")  # the first is sample.py's
_VERDICTS = ("label", "correct", "is_correct", "kto_tag", "loss", "train", "training")  # false: not to be learned
# Fields that belong to a row's prompt, and that no prompt shows.
UNSHOWN = "tools functions documents choices options history initial_reason_steps chat_template_kwargs".split()
UNSHOWN += "image images video videos audio audios".split()


def user_message(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def with_system(messages: Messages, system: str | None) -> Messages:
    """Messages with a system message in front, unless it is empty or they begin with one of their own."""
    complete = not system or messages[0]["role"] == "system"
    return messages if complete else [{"role": "system", "content": system}, *messages]


def behind_system(where: str, row: dict[str, Any], messages: Messages) -> Messages:
    """A row's messages with the row's `system` in front, if any. Raises a UserError for what no prompt shows: tools."""
    if unshown := next((name for name in UNSHOWN if not is_empty(row.get(name))), None):
        raise UserError(f"{where} has {unshown!r}, which prompts do not show: drop it, or the row if it needs them")
    name = "system" if row.get("system") is not None else "system_prompt"
    return with_system(messages, check(where, row.get(name), (str, None), name))


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing, as tables write one that a row does not have: "[]", {"text": [], "label": null}."""
    if isinstance(value, dict | list):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return not value or value in ("[]", "{}", "null")


def check_messages(where: str, value: Any) -> Messages:
    """A row's message list, or its text as one message of the user's. A UserError names `where` and the message."""
    if isinstance(value, str) and value.strip():
        return user_message(value)
    problem = f"{where} must be text, or a list of messages with role and content, and not empty"
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError(problem)
    return [_message(f"{problem}; message {number}", message) for number, message in enumerate(value, 1)]


def _message(problem: str, given: dict[str, Any]) -> dict[str, Any]:
    message = {name: value for name, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None)} | message
    if not isinstance(message.get("role"), str):
        raise UserError(f"{problem} has no role")
    message["role"] = _ROLES.get(message["role"], message["role"])
    # Templates may ask whether there is such a field, though it is empty, as tables write it.
    if message.pop("tool_calls", None) or not is_empty(message.pop("function_call", None)):
        raise UserError(f"{problem} ({message['role']}) has tool_calls, which are not learned")
    content = message.get("content")
    if isinstance(content, list) and all(map(_is_text, content)):
        content = message["content"] = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{problem} ({message['role']}): its content is {'null' if content is None else 'no text'}")
    thinking = next((value for name in THINKING_NAMES if (value := message.pop(name, None))), "")
    if not isinstance(thinking, str):
        raise UserError(f"{problem} ({message['role']}): its thinking is no text")
    thinking = re.sub(r"^\s*<think>|</think>\s*$", "", thinking)  # templates write these around it
    return message | ({"reasoning_content": thinking} if thinking.strip() else {})


def _is_text(part: Any) -> bool:
    """Whether a part of a message's content is text that is said: not an image, nor thinking."""
    return isinstance(part, dict) and isinstance(part.get("text"), str) and "text" in str(part.get("type") or "text")


def conversation(where: str, row: Any) -> Messages:
    """The messages of a stage 1 row, whose last one is the assistant's."""
    given = given_fields(where, row)
    whole = [name for name in ("messages", "conversations") if name in given]
    answers = [name for name in _ANSWERS if name in given]
    field = next(iter(answers), None)
    if field == "completion" or field and "assistant" not in [last_role(given[name]) for name in whole]:
        if field != "completion" and any(given[name] != given[field] for name in answers):
            raise UserError(f"{where} has different answers in {' and '.join(map(repr, answers))}: keep one")
        *before, answer = answer_of(where, given, field)
        messages = [*prompt_of(where, given, field, before), answer]
    elif not whole:
        raise _missing(where, given, "'messages' (nor 'prompt' with 'completion', nor 'instruction' with 'output')")
    else:
        found = [check_messages(f"{where}: {n!r}", check(where, given[n], list, n)) for n in whole]
        messages, texts = found[0], [[(m["role"], m["content"]) for m in own] for own in found]
        if texts[0] != texts[-1]:
            raise UserError(f"{where} has 'messages' and other 'conversations': drop those that are not to be learned")
    if (role := messages[-1]["role"]) != "assistant":
        raise UserError(f"{where}: the last message must be the assistant's; its role is {role!r}")
    if len(messages) == 1:
        raise UserError(f"{where}: there is no message before the assistant's")
    marks = messages[-1] | given
    wrong = next((n for n in _VERDICTS if str(marks.get(n)).strip("[]").lower() in ("false", "0", "0.0")), None)
    if wrong and "weight" not in marks:
        raise UserError(f"{where}: {wrong!r} is false; give the row a 'weight' (below 0 to unlearn it), or drop it")
    return behind_system(where, given, messages)


def pair(where: str, row: Any) -> tuple[Messages, Messages]:
    """The prompt of a stage 2 row, and its chosen and rejected answers."""
    given = given_fields(where, row)
    if missing := next((name for name in SIDES if name not in given), None):
        raise _missing(where, given, repr(missing))
    if unread := next((name for name in ("weight", "rejected_weight") if given.get(name, 1) != 1), None):
        raise UserError(f"{where} has {unread!r}: the only weight that a pair may have is 'chosen_weight'")
    (*before, chosen), (*others, rejected) = (answer_of(where, given, name) for name in SIDES)
    if before != others:
        raise UserError(f"{where}: 'chosen' and 'rejected' must differ in their last message alone")
    return prompt_of(where, given, "chosen", before), [chosen, rejected]


def given_fields(where: str, row: Any) -> dict[str, Any]:
    """A row's fields without those that are null or an empty list, as tables write a field that a row does not have."""
    given = {name: value for name, value in row.items() if value not in (None, [])} if isinstance(row, dict) else {}
    for name in (*PROMPTS, *_ANSWERS, *SIDES):
        if isinstance(text := given.get(name), str) and re.match(r"\s*\[\s*{\s*['\"](role|content|from|value)\b", text):
            raise UserError(f"{where}: {name!r} has messages written as text, as in CSV: give a list, as in JSONL")
    return given


def _missing(where: str, given: dict[str, Any], name: str) -> UserError:
    return UserError(f"{where} has no field {name}; it holds {', '.join(map(repr, given))[:200] or 'nothing'}")


def prompt_of(where: str, given: dict[str, Any], answer: str = "", before: Messages | None = None) -> Messages:
    """A row's prompt with its system message. `before`: what comes before the answer in the field `answer`."""
    given = given_fields(where, given)
    names = PROMPTS[:2] if before else PROMPTS  # beside whole conversations the other names may hold anything
    # An answered conversation is a prompt only if there is no other field, and then refused.
    name = min((n for n in names if n in given), key=lambda n: last_role(given[n]) == "assistant", default=None)
    if not (name or before):
        raise _missing(where, given, "'prompt'")
    prompt = check_messages(f"{where}: {name!r}", asked_in(where, given, name, answer)) if name else before
    if before:  # of which the prompt may repeat all, all but the system message, or one of the user's
        texts, own = ([(m["role"], m["content"].strip()) for m in messages] for messages in (before, prompt))
        if own not in (texts, texts[texts[0][0] == "system" :], *([t] for t in texts if t[0] == "user")):
            raise UserError(f"{where}: {name!r} must be the messages before the answer in {answer!r}")
    elif prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: {name!r} must not end with a message of the assistant")
    return behind_system(where, given, before or prompt)


def asked_in(where: str, given: dict[str, Any], name: str, answer: str = "") -> Any:
    """What the field `name` of a row asks: its messages, or its text with the other parts of the prompt. Fields that look
    like further parts are refused, except beside TRL's `prompt`, which holds all that is asked."""
    parts, is_text = PARTS.get(name, (name,)), isinstance(given[name], str)
    beside = [n for n in PARTS["instruction"] if given.get(n) and given[n] != given[name] and n not in parts]
    if beside and (answer in _ANSWERS[1:] or is_text and name != "prompt"):
        raise UserError(f"{where} has {name!r} and {beside[0]!r}: one field must hold all that is asked")
    texts = (check(where, given.get(part) or "", str, part) for part in parts)
    return "\n".join(filter(str.strip, texts)) if is_text else given[name]


def answer_of(where: str, row: dict[str, Any], name: str) -> Messages:
    """A row's answer as messages, alone or after the prompt. The row's own thinking belongs to it, except in pairs."""
    *before, last = row[name] if isinstance(row[name], list) and row[name] else [row[name]]
    last = {"role": "assistant", "content": last} if isinstance(last, str) else last
    if isinstance(last, dict) and name not in SIDES:
        last = last | {field: text for field in THINKING_NAMES if is_thinking(text := row.get(field))}
    *before, last = messages = check_messages(f"{where}: {name!r}", [*before, last])
    if last["role"] != "assistant" or before and not any(message["role"] == "user" for message in before):
        raise UserError(f"{where}: {name!r} must be one message of the assistant")
    return messages


def is_thinking(value: Any) -> bool:
    """Whether a field with one of THINKING_NAMES holds thinking; a word may say how it was made: "on", "X-High"."""
    return isinstance(value, str) and not re.fullmatch(r"[\w-]*", value, re.ASCII)


def last_role(messages: Any) -> str | None:
    """The role of the last message; None if these are no messages."""
    are_messages = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    role = (messages[-1].get("role") or messages[-1].get("from")) if are_messages else None
    return _ROLES.get(role, role) if isinstance(role, str) else None


def folded(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thinking in its content, where that does not hold it already."""
    content, thinking = message["content"], message.get("reasoning_content", "").strip()
    if thinking and thinking not in content.rpartition("</think>")[0]:
        content = f"<think>\n{thinking}\n</think>\n\n{content.lstrip()}"
    return {name: value for name, value in message.items() if name != "reasoning_content"} | {"content": content}
