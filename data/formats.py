"""The formats people already have, by the columns they are known by.

A row is recognised by its columns (those that are not null); other columns are left alone. Which format it is
depends on what the rows are for: ``prompts`` takes the prompt part of any format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data.errors import FormatError, RowError
from data.rankings import FACTS, conversation_pair, dialogue_pair, prompt_pair, ranked
from data.records import (
    ASSISTANT,
    SYSTEM,
    USER,
    Demonstration,
    Document,
    Feedback,
    Prompt,
    Record,
    Turn,
    Turns,
    Values,
)
from data.turns import (
    flag_of,
    hh_turns,
    message_turns,
    prompt_from,
    prompt_of,
    reply,
    response_beside,
    split_dialogue,
    string,
)

Kind = Literal["prompts", "examples", "comparisons", "feedback"]


@dataclass(frozen=True, slots=True)
class Format:
    """One format: the columns it is known by, and how a row becomes a record."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Values], Record]

    def __str__(self) -> str:
        return " + ".join([*self.columns, *(f"[{name}]" for name in self.optional)])


def recognise(columns: frozenset[str], kind: Kind, *, whole_document: bool = False) -> Format:
    """The format of rows with these columns.

    Args:
        columns: names of the columns that are not null.
        kind: what the rows are for.
        whole_document: pre-training, where a column ``text`` is taken before any other.

    Raises:
        FormatError: naming the columns found and the formats known.
    """
    formats = FORMATS[kind]
    if whole_document:
        formats = (TEXT, *formats)
    for candidate in formats:
        if columns.issuperset(candidate.columns):
            return candidate
    known = "; ".join(dict.fromkeys(str(candidate) for candidate in formats))
    hint = ""
    if kind == "examples" and {"chosen", "rejected"} <= columns:
        hint = (
            ". These are comparisons; to learn from the chosen responses rename them: "
            "`columns: {completion: chosen}` beside a prompt, `columns: {messages: chosen}` for whole dialogues"
        )
    raise FormatError(
        f"the columns are {', '.join(sorted(columns)) or 'none'}; for {kind} they must include one of: {known}. "
        f"`columns: {{OUR_NAME: YOUR_NAME}}` in the source renames them{hint}"
    )


class Answered(NamedTuple):
    """A prompt and a response, and the column that the response is in."""

    prompt: Prompt
    response: Turns
    name: str


def _prompt_completion(values: Values) -> Answered:
    prompt = prompt_of(values["prompt"], "prompt")
    response = response_beside(prompt, values["prompt"], values["completion"], "completion")
    return Answered(prompt, response, "completion")


def _turns(values: Values, name: str) -> Turns:
    value = values[name]
    turns = hh_turns(value, name) if isinstance(value, str) else message_turns(value, name)
    if name == "conversations" and isinstance(values.get("system"), str) and values["system"]:
        turns = (Turn(SYSTEM, string(values, "system")), *turns)
    return turns


def _dialogue(name: str) -> Callable[[Values], Answered]:
    def parse(values: Values) -> Answered:
        return Answered(*split_dialogue(_turns(values, name), name), name)

    return parse


def _dialogue_prompt(name: str) -> Callable[[Values], Prompt]:
    """The prompt part: all turns before the assistant's last, or all where the user has the last word."""

    def parse(values: Values) -> Prompt:
        turns = _turns(values, name)
        while turns and turns[-1].role == ASSISTANT:
            turns = turns[:-1]
        return prompt_from(turns, name)

    return parse


def _instruction_prompt(values: Values) -> Prompt:
    """Instruction and input, a blank line between, as one turn of the user."""
    instruction = string(values, "instruction")
    given = string(values, "input") if values.get("input") is not None else ""
    text = f"{instruction}\n\n{given}" if given.strip() else instruction
    return prompt_from((Turn(USER, text),), "instruction")


def _instruction(values: Values) -> Answered:
    return Answered(_instruction_prompt(values), reply(string(values, "output")), "output")


def _question_prompt(values: Values) -> Prompt:
    return prompt_from((Turn(USER, string(values, "question")),), "question")


def _question(values: Values) -> Answered:
    return Answered(_question_prompt(values), reply(string(values, "answer")), "answer")


def _column_prompt(values: Values) -> Prompt:
    return prompt_of(values["prompt"], "prompt")


def _document(values: Values) -> Document:
    text = string(values, "text")
    if not text.strip():
        raise RowError("text is empty")
    return Document(text)


def _text_prompt(values: Values) -> Prompt:
    return prompt_of(string(values, "text"), "text")


def _example(answered: Callable[[Values], Answered]) -> Callable[[Values], Demonstration]:
    def parse(values: Values) -> Demonstration:
        prompt, response, name = answered(values)
        if not any(turn.content.strip() for turn in response):
            raise RowError(f"{name} is empty")
        return Demonstration(prompt, response)

    return parse


def _labelled(answered: Callable[[Values], Answered]) -> Callable[[Values], Feedback]:
    def parse(values: Values) -> Feedback:
        prompt, response, _ = answered(values)
        return Feedback(prompt, response, flag_of(values["label"], "label"))

    return parse


_ANSWERED: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Values], Answered]], ...] = (
    (("messages",), (), _dialogue("messages")),
    (("conversations",), ("system",), _dialogue("conversations")),
    (("prompt", "completion"), (), _prompt_completion),
    (("instruction", "output"), ("input",), _instruction),
    (("question", "answer"), (), _question),
)
_ASKED: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Values], Prompt]], ...] = (
    (("prompt",), (), _column_prompt),
    (("messages",), (), _dialogue_prompt("messages")),
    (("conversations",), ("system",), _dialogue_prompt("conversations")),
    (("instruction",), ("input",), _instruction_prompt),
    (("question",), (), _question_prompt),
)
_PAIRS = (
    Format(("prompt", "chosen", "rejected"), FACTS, prompt_pair),
    Format(("conversations", "chosen", "rejected"), ("system", *FACTS), conversation_pair),
    Format(("chosen", "rejected"), FACTS, dialogue_pair),
)
_RANKED = tuple(
    Format((*columns, "responses", by), (*optional, *(fact for fact in FACTS if fact != by)), ranked(asked, by))
    for by in ("ranks", "scores", "preference")
    for columns, optional, asked in _ASKED
)
TEXT = Format(("text",), (), _document)
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "comparisons": (*_PAIRS, *_RANKED),
    "feedback": (
        *(Format((*columns, "label"), optional, _labelled(parse)) for columns, optional, parse in _ANSWERED),
        *_PAIRS,
    ),
    "examples": (*(Format(columns, optional, _example(parse)) for columns, optional, parse in _ANSWERED), TEXT),
    "prompts": (
        *(Format(columns, optional, parse) for columns, optional, parse in _ASKED[:3]),
        Format(("chosen", "rejected"), (), lambda values: dialogue_pair(values).prompt),
        *(Format(columns, optional, parse) for columns, optional, parse in _ASKED[3:]),
        Format(("text",), (), _text_prompt),
    ),
}
