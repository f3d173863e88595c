"""Rows of prompts and responses, or of conversations, as text in stretches: what is given, and what is to be learned.

A stretch ends where its text does, so that a prompt is tokenized by itself: exactly as it will be when the model has to
go on from it. Of a conversation every assistant's message is a response; the chat template writes roles and separators
around the messages, and the end-of-text that it writes after an assistant's message belongs to the response. What
follows the last response is left out. A conversation that an assistant begins is left out whole: what its first message
answers is not known, and many templates refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from loqt_ds.data.errors import DataError
from loqt_ds.data.examples import text_of
from loqt_ds.data.files import check_text
from loqt_ds.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


class Stretch(NamedTuple):
    """A part of an example's text. is_response: to be learned. has_end: a chat template has written an end-of-text
    after what the row says."""

    text: str
    is_response: bool
    has_end: bool = False


class Example(NamedTuple):
    """stretches: prompt and response by turns, a response last; empty where prompt or response is, and where
    is_answer_first: an assistant begins. response: the last one as it stands in the data. where: for messages.
    num_unanswered: messages that followed it."""

    stretches: tuple[Stretch, ...]
    response: str
    where: str
    is_answer_first: bool = False
    num_unanswered: int = 0


class Reader:
    """Makes examples of rows as `config.data` says.

    Raises DataError for a chat template that is needed and not there, or cannot be read.
    """

    def __init__(self, data: Any, tokenizer: Tokenizer) -> None:
        self._data, self._tokenizer = data, tokenizer
        self.is_chat = data.messages_field is not None or data.chat_template is not None
        """Whether a chat template writes the text, with all special tokens that a text begins with."""
        self._template = _unescaped(data.prompt_template or "{prompt}")
        self._chat_template: str | None = None
        if data.chat_template is not None:
            self._chat_template = read_template(data.chat_template)
        elif self.is_chat:
            self._chat_template = _own_template(data, tokenizer)

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Raises DataError for columns that there are not, and for what is no text or no conversation."""
        data = self._data
        if data.messages_field is not None:
            messages = self._messages(row, where)
        else:
            prompt = self._text(row, "prompt_field", where)
            response = self._text(row, "response_field", where)
            if not prompt.strip() or not response.strip():
                return Example((), response, where)
            if not self.is_chat:
                stretches = (Stretch(self._template.replace("{prompt}", prompt), False), Stretch(response, True))
                return Example(stretches, response, where)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self._conversation(messages, where)

    def opening(self, prompt: str) -> str:
        """What a model sees before it answers a prompt."""
        if not self.is_chat:
            return self._template.replace("{prompt}", prompt)
        return self._render([{"role": "user", "content": prompt}], "the prompt", opens_answer=True)

    def _field(self, row: Mapping[str, Any], option: str, where: str) -> Any:
        name = getattr(self._data, option)
        if name not in row:
            raise DataError(
                f"data.{option}={name}: {where} has no such column; it has: {', '.join(map(repr, row)) or 'none'}"
            )
        return row[name]

    def _text(self, row: Mapping[str, Any], option: str, where: str) -> str:
        return text_of(self._field(row, option, where), f"data.{option}={getattr(self._data, option)}", where)

    def _messages(self, row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
        value = self._field(row, "messages_field", where)
        option = f"data.messages_field={self._data.messages_field}"
        if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
            raise DataError(f"{option}: {where} holds no list of messages there; each is {{role, content}}")
        messages = []
        for number, message in enumerate(value, start=1):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise DataError(
                    f"{option}: {where}, message {number} has the role {role!r} and content of type "
                    f"{type(content).__name__}; roles are {', '.join(ROLES)}, content is a string"
                )
            check_text(content, where)
            messages.append({"role": role, "content": content})
        return messages

    def _conversation(self, messages: list[dict[str, str]], where: str) -> Example:
        """Up to the last response; there is no example without one, where one is empty, or where one comes first."""
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [messages[place]["content"] for place in places]
        if not places or not all(answer.strip() for answer in answers):
            return Example((), answers[-1] if answers else "", where)
        if places[0] == 0:
            return Example((), answers[-1], where, is_answer_first=True)
        num_unanswered = len(messages) - 1 - places[-1]
        messages = messages[: places[-1] + 1]
        stretches: list[Stretch] = []
        written = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            for upto, is_response in ((number, False), (number + 1, True)):
                text = self._render(messages[:upto], where, opens_answer=not is_response)
                if not text.startswith(written):
                    raise DataError(
                        f"{where}: the chat template writes message {upto} in another way once others follow it, so "
                        "that what is learned is not what the model will see; give data.chat_template one that does "
                        "not, or conversations of one question and one answer"
                    )
                self._check_special(text, messages, where)
                new, end = text[len(written) :], self._end_of_text
                if is_response and not new.replace(end, "").strip():
                    raise DataError(
                        f"{where}: the chat template writes nothing of message {upto}, the assistant's, so that there "
                        "is nothing to learn; correct the row, or give data.chat_template one that writes it"
                    )
                # A message that spells it has not ended there.
                has_end = is_response and new.count(end) > message["content"].count(end)
                stretches.append(Stretch(new, is_response, has_end))
                written = text
        return Example(tuple(stretches), answers[-1], where, num_unanswered=num_unanswered)

    @cached_property
    def _end_of_text(self) -> str:
        return str(self._tokenizer.hf.convert_ids_to_tokens(self._tokenizer.eot_id))

    @cached_property
    def _not_special(self) -> list[str]:
        """Special tokens that the tokenizer reads as plain text where they are written out."""
        hf = self._tokenizer.hf
        return [
            text
            for text, index in zip(hf.all_special_tokens, hf.all_special_ids, strict=True)
            if self._tokenizer.encode(text) != [index]
        ]

    def _check_special(self, text: str, messages: list[dict[str, str]], where: str) -> None:
        """Raises DataError if the chat template has written a special token that would become pieces of text."""
        for token in self._not_special:
            if text.count(token) > sum(message["content"].count(token) for message in messages):
                raise DataError(
                    f"{where}: the chat template writes {token}, which data.tokenizer={self._tokenizer.name} reads as "
                    "plain text and not as the special token; give the directory of the model's tokenizer "
                    "(tokenizer.json, tokenizer_config.json) instead of its .model file"
                )

    def _render(self, messages: list[dict[str, str]], where: str, *, opens_answer: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.hf.apply_chat_template(
                messages, chat_template=self._chat_template, tokenize=False, add_generation_prompt=opens_answer
            )
        except Exception as error:  # a template is a program: its expressions raise whatever Python's do
            told = str(error) if isinstance(error, TemplateError) else repr(error)
            raise DataError(
                f"{where}: the chat template cannot write this conversation ({told}); correct the row or "
                f"data.chat_template"
            ) from error
        return str(text)


def _unescaped(text: str) -> str:
    r"""\n and \t as the characters that they stand for, and \\ as one backslash: a shell hands them on as they are
    typed."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def read_template(name: str) -> str:
    """The text of `data.chat_template`. Raises DataError where the file cannot be read, or is empty."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.chat_template={name} cannot be read ({error.strerror}); give a Jinja file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template={name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    if not text.strip():
        raise DataError(f"data.chat_template={name} is empty; give a Jinja template")
    return text


def _own_template(data: Any, tokenizer: Tokenizer) -> str:
    try:
        return str(tokenizer.hf.get_chat_template())
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"data.messages_field={data.messages_field}: the tokenizer {tokenizer.name} has no chat template; give "
            "data.chat_template, a file with one"
        ) from error
