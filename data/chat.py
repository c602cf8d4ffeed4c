r"""Turns become text, with the spans that the model itself has to write.

Three renderings, chosen by the tokenizer and ``apply_chat_template``:

- **template**: the tokenizer's own chat template.
- **verbatim**, for a prompt that is one string, without template: prompt and response with nothing between.
- **dialogue**, for everything else without template: the system's text, then ``\n\nHuman: ...`` and
  ``\n\nAssistant: ...`` as Anthropic HH has it, EOS behind every turn of the assistant, and a prompt that ends in
  ``\n\nAssistant:``.

Invariants:

- The text in front of a response is exactly what ``prompt`` renders, so that what is trained on is what the rollout
  engines are given. A template that breaks this is refused for the row, never repaired by guess. A template that
  marks the assistant's part itself (``{% generation %}``) is taken at its word in demonstrations.
- The same turns are the same text on any day: a template that asks for the date is told ``chat_date``.
- The last response ends in EOS, or in the end-of-turn token that the template writes, and nothing follows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Literal

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from data.errors import RowError, TokenizerError
from data.records import ASSISTANT, Demonstration, Document, Prompt, Turn, Turns
from data.tokenizer import Tokenizer, bos_prefix, require_eos, special_texts

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPEAKER = {ASSISTANT: "\n\nAssistant:", "user": "\n\nHuman:"}


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text and what in it is a response.

    ``spans`` are half-open ranges of characters, in order. ``bos``: BOS goes in front. ``eos``: EOS goes behind, and
    belongs to the last span.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    bos: bool
    eos: bool


class Renderer:
    """Renders for one tokenizer.

    Args:
        tokenizer: the model's.
        apply_chat_template: where it has one, always, or never.
        chat_date: what a template prints that asks for today's date.

    Raises:
        TokenizerError: ``always``, and the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Tokenizer, apply_chat_template: Literal["auto", "always", "never"], chat_date: date
    ) -> None:
        self._tokenizer = tokenizer
        self._template: str | None = None
        if apply_chat_template == "always" and not tokenizer.chat_template:
            raise TokenizerError(
                f"tokenizer {tokenizer.name_or_path}: has no chat template, and data.apply_chat_template is `always`; "
                "use `auto`, or a tokenizer with one"
            )
        if apply_chat_template != "never" and tokenizer.chat_template:
            self._template = tokenizer.get_chat_template()
        self._marked = self._template is not None and _MARKED.search(self._template) is not None
        self._bos = bool(bos_prefix(tokenizer))
        self._special = special_texts(tokenizer)
        self._clock = clock_stopped_at(chat_date)

    def document(self, document: Document) -> Rendered:
        """A document: all of it is to be learnt, EOS too."""
        return Rendered(document.text, ((0, len(document.text)),), self._bos, eos=True)

    def prompt(self, prompt: Prompt) -> Rendered:
        """A prompt, up to where the response begins.

        Raises:
            RowError: the template refuses these turns.
        """
        if self._template is not None:
            return Rendered(self._render(prompt.turns, ask=True), (), bos=False, eos=False)
        if prompt.verbatim:
            return Rendered(prompt.turns[0].content, (), self._bos, eos=False)
        return Rendered(self._dialogue(prompt.turns) + _SPEAKER[ASSISTANT], (), self._bos, eos=False)

    def response(self, prompt: Prompt, response: Turns) -> Rendered:
        """A prompt and one response to it: the span is all that follows the prompt.

        Raises:
            RowError: the template refuses these turns, or writes the prompt otherwise when the response is there.
        """
        asked = self.prompt(prompt)
        text = self._whole(prompt, response)
        if not text.startswith(asked.text):
            raise RowError(_not_a_prefix(len(prompt.turns)))
        return self._ended(text, [(len(asked.text), len(text))], asked.bos)

    def demonstration(self, demonstration: Demonstration) -> Rendered:
        """A dialogue: every turn of the assistant is a span.

        Raises:
            RowError: as ``response``.
        """
        prompt, response = demonstration.prompt, demonstration.response
        turns = (*prompt.turns, *response)
        if self._marked:
            text, marked = self._apply(turns, False, marked=True)
            return self._ended(text, [(start, self._with_end_of_turn(text, end)) for start, end in marked], bos=False)
        if not any(turn.role == ASSISTANT for turn in prompt.turns):
            return self.response(prompt, response)
        text = self._whole(prompt, response)
        spans = []
        for at, turn in enumerate(turns):
            if turn.role != ASSISTANT or (at and turns[at - 1].role == ASSISTANT):
                continue
            after = next((i for i in range(at, len(turns)) if turns[i].role != ASSISTANT), len(turns))
            spans.append(self._span(turns, at, after, text))
        return self._ended(text, spans, self._template is None and self._bos)

    def _span(self, turns: Turns, at: int, after: int, text: str) -> tuple[int, int]:
        """The characters of turns [at, after), found by rendering up to either end."""
        if self._template is not None:
            before = self._render(turns[:at], ask=True) if at else ""
            through = self._render(turns[:after])
        else:
            before = self._dialogue(turns[:at]) + _SPEAKER[ASSISTANT]
            through = self._dialogue(turns[:after], last_eos=after < len(turns))
        if not through.startswith(before) or not text.startswith(through):
            raise RowError(_not_a_prefix(at))
        return len(before), self._end_of_turn(through, len(before))

    def _with_end_of_turn(self, text: str, end: int) -> int:
        """``end``, or behind the special token that stands there: some markers leave the end-of-turn token out."""
        return end + next((len(token) for token in self._special if text.startswith(token, end)), 0)

    def _end_of_turn(self, text: str, start: int) -> int:
        """Where a response ends: behind its last special token, if only white space follows that."""
        stripped = text.rstrip()
        return len(stripped) if len(stripped) > start and stripped.endswith(self._special) else len(text)

    def _ended(self, text: str, spans: list[tuple[int, int]], bos: bool) -> Rendered:
        """Cut what follows the last response, and say whether EOS has to be put behind it."""
        if not spans:
            raise RowError("the chat template marks nothing as the assistant's")
        start, end = spans[-1]
        end = self._end_of_turn(text[:end], start)
        ends_itself = text[start:end].endswith(self._special)
        if not ends_itself:
            require_eos(self._tokenizer, "has to follow the last response")
        return Rendered(text[:end], (*spans[:-1], (start, end)), bos, eos=not ends_itself)

    def _whole(self, prompt: Prompt, response: Turns) -> str:
        if self._template is not None:
            return self._render((*prompt.turns, *response))
        if prompt.verbatim:
            return prompt.turns[0].content + "".join(turn.content for turn in response)
        return self._dialogue((*prompt.turns, *response), last_eos=False)

    def _dialogue(self, turns: Turns, *, last_eos: bool = True) -> str:
        pieces: list[str] = []
        for number, turn in enumerate(turns):
            speaker = _SPEAKER.get(turn.role)
            if speaker is None:
                pieces.append(("\n\n" if pieces else "") + turn.content)
                continue
            pieces.append(f"{speaker} {turn.content}")
            if turn.role == ASSISTANT and (last_eos or number < len(turns) - 1):
                require_eos(self._tokenizer, "has to follow every turn of the assistant")
                pieces.append(str(self._tokenizer.eos_token))
        return "".join(pieces)

    def _render(self, turns: Turns, *, ask: bool = False) -> str:
        return self._apply(turns, ask, marked=False)[0]

    def _apply(self, turns: tuple[Turn, ...], ask: bool, *, marked: bool) -> tuple[str, list[tuple[int, int]]]:
        """The template over these turns: the text, and the spans it marks as the assistant's."""
        try:
            texts, spans = render_jinja_template(
                conversations=[[{"role": turn.role, "content": turn.content} for turn in turns]],
                chat_template=self._template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=marked,
                strftime_now=self._clock,
                **self._tokenizer.special_tokens_map,
            )
        except jinja2.TemplateError as error:
            raise RowError(f"the chat template refuses these turns: {error}") from error
        return str(texts[0]), [(int(start), int(end)) for start, end in spans[0]] if marked else []


def clock_stopped_at(day: date) -> Callable[[str], str]:
    """Stands for the ``strftime_now`` that Transformers offers to templates: midnight of one and the same day.

    >>> clock_stopped_at(date(2024, 7, 26))("%d %b %Y, %H:%M")
    '26 Jul 2024, 00:00'
    """
    return datetime.combine(day, time.min).strftime


def _not_a_prefix(turn: int) -> str:
    return (
        f"the chat template writes what stands before turn {turn + 1} otherwise once the turn is there, so its "
        "response cannot be told apart; give dialogues with one response each, or a template with "
        "{% generation %} markers"
    )
