"""Messages to text, as a checkpoint's chat template writes them: what a model is asked, and what it is to answer.

Three rules hold whatever the template does. The prompt in training is the text that sampling starts from. What the
template writes after an answer is learned, and ends a sample. And no part of an answer is lost: many templates drop the
thinking of earlier answers, which saves context in a chat, but training needs it.
"""

import os
from typing import Any

from nanoredi.common.errors import UserError
from nanoredi.data.messages import THINKING_NAMES, Messages, folded, user_message
from nanoredi.data.template import Template

# Placeholders for a question, an answer and its thinking, to find out what a template does with them.
_QUESTION, _ANSWER, _THOUGHTS = "\ue000question\ue001", "\ue000answer\ue001", "\ue000thoughts\ue001"
_THINK, _THOUGHT = "<think>", "</think>"
# What split() reports, each with the number of rows that it is true of.
_ENDED = "rows have an answer with the template's own header or end: it is not doubled"
_GOES_ON = "rows have an answer that continues after an end of turn: all of it is learned"
_TEMPLATED = "rows have a prompt that is templated already: it is used as it is"
_REWRITTEN = "rows have an answer that the chat template rewrites: the template's form is learned"
_WHOLE = "rows have an answer that the chat template cuts, or writes after another prompt: all of it is learned"
_UNCLOSED = "rows have an answer that never closes the <think> that their prompt opens: it is learned as it is"
_EARLIER = "rows have several answers: only the last one is learned"


class Chat:
    """A chat template, and what it does with answers.

    Args:
        source: the template's text.
        name: of its checkpoint, for messages.
        special: {"bos_token": ...}, the special tokens by the names that templates use.
        marks: the vocabulary's tokens that do not occur in ordinary text (<|im_end|>).

    Attributes:
        end: what the template writes after an answer.
        stop_text: the text at its beginning, before any of the marks; a sample ends there, as at a stop string. Empty
            if that is nothing but white space.

    Raises:
        UserError: from the constructor, for a broken template, or one that does not show question and answer once.
    """

    def __init__(self, source: str, name: str, special: dict[str, str], marks: list[str]):
        self._label, self._special, self._marks = f"the chat template of {name}", special, marks
        self._template = Template(source, name)
        self._takes_thinking = True
        question, answer = user_message(_QUESTION), {"role": "assistant", "content": _ANSWER}
        asked, *ends = self._rendered([*question, answer]).split(_ANSWER)
        if len(ends) != 1:
            raise UserError(f"{self._label} shows the last answer {len(ends)} times; it must show it once")
        if _QUESTION not in asked:
            raise UserError(f"{self._label} shows an answer without its question; it must show all messages")
        [self.end] = ends
        thinking = {**answer, "reasoning_content": _THOUGHTS}
        self._takes_thinking = _THOUGHTS in self._tried([*question, thinking])
        self._shows_all = (text := folded(thinking)["content"]) in self._tried([{**answer, "content": text}])
        head, _, self._tail = self._tried(user_message(_ANSWER), True).partition(_ANSWER)
        opening = self._tail.rstrip().removesuffix(_THINK)
        begins = {0, *(i for mark in (*marks, "\n") for i in range(len(opening)) if opening.startswith(mark, i))}
        # Parts of the generation prompt that an answer may repeat at its start; a bare word is the answer's own.
        openings = {opening[i:].strip() for i in begins} - {""}
        self._openings = sorted((one for one in openings if not one.isalnum()), key=len, reverse=True)
        bos = special.get("bos_token", "")
        self._bos = bos if head.startswith(bos) else ""
        self._header = max((mark for mark in marks if mark in head), key=head.rfind, default="")
        eos = special.get("eos_token", "")
        places = [place for mark in (*marks, eos) if mark and (place := self.end.find(mark)) >= 0]
        plain = self.end[: min(places, default=None)]
        self.stop_text = plain if plain.strip() else ""
        named = (eos, special.get("pad_token"))
        ends = {mark for mark in marks if mark in self.end or mark in named} | {self.stop_text, self.end}
        self._ends = sorted({end.rstrip() for end in ends} - {""})

    def prompt(self, messages: Messages, think: bool = False) -> str:
        """The conversation as text, up to where the model is to answer. A prompt that is templated already is kept.

        Args:
            messages: [{"role", "content"}], the last one the user's.
            think: append <think> as the paper's evaluation does: right after the role, with no newline in between.

        Raises:
            UserError: when the template refuses the messages, or does not show one of them.
        """
        text = self._templated(messages)
        if text is None:
            text = self._rendered(messages, add_generation_prompt=True)
            self._check(messages, text)
        if think and not text.rstrip().endswith(_THINK):
            text = text.rstrip("\n") + f"{_THINK}\n"
        return text

    def split(self, messages: Messages, remarks: set[str] | None = None) -> tuple[str, str]:
        """The conversation as text, cut before the last message, which is the assistant's: (prompt, completion).

        The completion is what the template writes after the prompt, if that contains the whole answer. If it does not,
        or if the template writes another prompt before an answer than for sampling, the completion is the answer as
        given plus the template's end; a <think> that the prompt has opened is not opened again.

        Args:
            remarks: receives what was done to the messages, as sentences for the user.

        Raises:
            UserError: as prompt does; when the template has the model answer without thinking, and the answer thinks.
        """
        remarks = set() if remarks is None else remarks
        *before, answer = messages
        content = self._unwrapped(answer["content"])
        if content != answer["content"]:
            remarks.add(_ENDED)
            answer = {**answer, "content": content}
        if any(end in folded(answer)["content"] for end in self._ends):
            remarks.add(_GOES_ON)
        if any(message["role"] == "assistant" for message in before):
            remarks.add(_EARLIER)
        if prompt := self._templated(before):
            remarks.add(_TEMPLATED)
            completion = self._continued(prompt, answer) + self.end
        else:
            prompt, whole = self._template.render(self._variables(before, True), self._variables([*before, answer]))
            self._check(before, prompt)
            completion = self._completion(prompt, whole, answer, remarks)
        if prompt.rstrip().endswith(_THINK) and _THOUGHT not in completion:
            remarks.add(_UNCLOSED)
        return prompt, completion

    def _completion(self, prompt: str, whole: str, answer: dict[str, Any], remarks: set[str]) -> str:
        """What is learned of an answer, given what the template writes up to it and with it."""
        given = self._continued(prompt, answer)
        if prompt + given + self.end == whole:
            return given + self.end
        written, content = whole.removeprefix(prompt), answer["content"]
        parts = (content, answer.get("reasoning_content", "")) if self._takes_thinking else (given,)
        # Compared without white space, which templates trim in many ways.
        lost = written == whole or any("".join(part.split()) not in "".join(written.split()) for part in parts)
        # The template has put an empty <think> block before an answer that opens its thinking and never closes it.
        doubled = _THINK in content and whole.count(_THINK) > (prompt + given).count(_THINK)
        if lost or doubled:
            remarks.add(_WHOLE)
            return given + self.end
        if "reasoning_content" not in answer:
            remarks.add(_REWRITTEN)
        return written

    def opened(self, prompt: Messages, responses: list[str]) -> list[str]:
        """Responses that were sampled from a prompt, with the <think> that the template may have opened for them."""
        _, mark, space = self.prompt(prompt).rpartition(_THINK)
        opening = "" if space.strip() else mark + space
        return [text if not text.strip() or text.lstrip().startswith(_THINK) else opening + text for text in responses]

    def is_blank(self, answer: dict[str, Any]) -> bool:
        """Whether an answer is empty but for the template's own header and end."""
        return not (self._unwrapped(answer["content"]).strip() or "reasoning_content" in answer)

    def measured(self, prompt: Messages, answers: Messages) -> tuple[list[str], bool]:
        """A prompt and the answers to it, as texts to count the tokens of, and whether training tokenises these texts.

        The original applied the template to each part separately, so the default system prompt comes before an answer,
        and no generation prompt after a prompt. Where the template drops nothing, this does the same, to reproduce the
        original's counts.
        """
        if self._shows_all:
            texts = self._template.render(*(self._variables(part) for part in (prompt, *([a] for a in answers))))
            if all(folded(answer)["content"] in text for answer, text in zip(answers, texts[1:])):
                return texts, False
        return [self.prompt(prompt), *(self.split([*prompt, answer])[1] for answer in answers)], True

    def _rendered(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._template.render(self._variables(messages, add_generation_prompt))[0]

    def _tried(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation as text, or nothing where the template refuses it."""
        try:
            return self._rendered(messages, add_generation_prompt)
        except UserError:
            return ""

    def _variables(self, messages: Messages, add_generation_prompt: bool = False) -> dict[str, Any]:
        shown = [folded(message) for message in messages]
        if self._takes_thinking:  # under any of its names
            thoughts = [dict.fromkeys(THINKING_NAMES, m.get("reasoning_content")) for m in messages]
            shown = [m | (own if "reasoning_content" in m else {}) for m, own in zip(messages, thoughts)]
        none = dict.fromkeys(("tools", "documents"))  # transformers always passes these
        return {"messages": shown, "add_generation_prompt": add_generation_prompt, **none, **self._special}

    def _check(self, messages: Messages, text: str) -> None:
        """Refuse a message that the text does not show, or shows as another role: templates know only some roles."""
        source = self._template.source
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            known = role in ("user", "assistant") or role in source + text.replace(content, "").lower()
            # A template may drop thinking, trim, or change what it shows; if it shows nothing, nothing changes with it.
            other = [*messages[:i], {**message, "content": _ANSWER}, *messages[i + 1 :]]
            if known and (content.rpartition(_THOUGHT)[2].strip() in text or self._tried(other, True) != text):
                continue
            roles = [one for one in ("system", "user", "assistant", "tool") if one in source and one != role]
            hint = f"; it handles the roles {', '.join(roles)}" if roles else ""
            raise UserError(f"{self._label} does not show message {i + 1}, whose role is {role!r}, as such{hint}")

    def _templated(self, messages: Messages) -> str | None:
        """A prompt whose text is templated already, its generation prompt completed; None for any other prompt."""
        text = messages[-1]["content"] if messages[-1]["role"] == "user" else ""
        if self._header not in text:
            return None
        bare, tail = text.rstrip(), self._tail.strip()
        forced = bare.endswith(_THINK) and _THINK not in tail
        bare = bare.removesuffix(_THINK).rstrip() if forced else bare
        for length in range(len(tail), 0, -1):
            begun = tail[:length]
            if bare.endswith(begun) and (begun == tail or any(mark in begun for mark in self._marks)):
                if any(message["content"].strip() not in text for message in messages):
                    raise UserError("the last message is templated already: give it alone, without a system message")
                text = text if forced else bare + tail[length:] + self._tail[len(self._tail.rstrip()) :]
                return self._bos + text.removeprefix(self._bos)
        return None

    def _unwrapped(self, text: str) -> str:
        """An answer without the template's header before it and the template's end after it."""
        if opening := next((opening for opening in self._openings if text.lstrip().startswith(opening)), None):
            text = text.lstrip().removeprefix(opening).lstrip()
        while end := next((end for end in self._ends if text.rstrip().endswith(end)), None):
            text = text.rstrip().removesuffix(end)
        return text

    def _continued(self, prompt: str, answer: dict[str, Any]) -> str:
        """The answer with its thinking, as the continuation of the prompt."""
        text, open_to = folded(answer)["content"], prompt.rstrip()
        if open_to.endswith(_THOUGHT) and (_THINK in text or _THOUGHT in text):
            raise UserError(f"{self._label} closes the thinking in the prompt, but this answer thinks")
        if open_to.endswith(_THINK) and text.lstrip().startswith(_THINK):
            text = text.lstrip().removeprefix(_THINK)
            text = text[len(os.path.commonprefix((text, prompt[len(open_to) :]))) :]
        return text
