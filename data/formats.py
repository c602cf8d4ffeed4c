"""The formats people already have, and the few canonical forms they become.

A row is recognised by its columns (those that are not null); other columns are left alone. Which format it is
depends on what the rows are for: ``prompts`` takes the prompt part of any format.

Invariants:

- A prompt ends where a response has to follow, so its last turn is not the assistant's.
- ``verbatim`` says that the prompt is one string written by hand for the model (columns ``prompt``, ``text``):
  without a chat template it is used as it stands, and a response follows it with nothing between.
- Two rows with the same prompt have the same ``prompt_key``, whatever else they hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from data.errors import FormatError, RowError

Kind = Literal["prompts", "examples", "comparisons"]

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
#: ShareGPT's names of the roles; the others are the names that chat templates know.
ROLES = {
    "human": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function": "tool",
} | {name: name for name in (SYSTEM, USER, ASSISTANT, "tool", "developer")}

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": USER, "Assistant": ASSISTANT}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said."""

    role: str
    content: str


Turns = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a response is asked for."""

    turns: Turns
    verbatim: bool


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to learn. Assistant turns inside the prompt are learnt as well."""

    prompt: Prompt
    response: Turns


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt."""

    prompt: Prompt
    chosen: Turns
    rejected: Turns


@dataclass(frozen=True, slots=True)
class Document:
    """Text to be learnt whole."""

    text: str


Record = Prompt | Demonstration | Comparison | Document
Values = Mapping[str, object]


def prompt_key(record: Record) -> bytes:
    """What the held-out split hashes: the prompt (of a document: its text) as bytes.

    Example: a demonstration, a comparison and a prompt that share the prompt fall on the same side of the split.
    """
    match record:
        case Document(text):
            return text.encode()
        case Prompt(turns, _):
            return json.dumps([[turn.role, turn.content] for turn in turns], ensure_ascii=False).encode()
        case Demonstration(prompt, _) | Comparison(prompt, _, _):
            return prompt_key(prompt)


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


def string(values: Values, name: str) -> str:
    """A column that must be text.

    Raises:
        RowError: it is not.
    """
    value = values[name]
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, got {type(value).__name__}")
    return value


def message_turns(value: object, name: str) -> Turns:
    """Turns of a list of messages: ``role``/``content``, or ShareGPT's ``from``/``value``; one message alone counts.

    Content may be a list of text parts, as multimodal chats have it.

    Raises:
        RowError: not such a list, an unknown role, or a part that is not text.
    """
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{name} must be a list of messages that is not empty, got {_brief(value)}")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RowError(f"{name}: message {number} is {_brief(message)}, not role and content")
        role = message.get("role") or message.get("from")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if role not in ROLES:
            raise RowError(f"{name}: message {number} has the role {role!r}; known roles: {', '.join(ROLES)}")
        turns.append(Turn(ROLES[role], _content(content, f"{name}: message {number}")))
    return tuple(turns)


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise RowError(f"{where}: content must be text, got {_brief(content)}")


def _brief(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def hh_turns(text: str, name: str) -> Turns:
    r"""Turns of a whole dialogue as Anthropic HH writes it: ``\n\nHuman: ...\n\nAssistant: ...``.

    The space around what a side says is no part of it. Turns of one side behind each other become one.

    Raises:
        RowError: no such turns, or text before the first.
    """
    pieces = _HH_TURN.split(text)
    if len(pieces) == 1 or pieces[0].strip():
        raise RowError(rf"{name} must begin with '\n\nHuman:' or '\n\nAssistant:', got {text[:40]!r}")
    turns: list[Turn] = []
    for who, said in zip(pieces[1::2], pieces[2::2], strict=True):
        turn = Turn(_HH_ROLES[who], said.strip())
        if turns and turns[-1].role == turn.role:
            turn = Turn(turn.role, f"{turns.pop().content}\n\n{turn.content}".strip())
        turns.append(turn)
    return tuple(turns)


def prompt_of(value: object, name: str) -> Prompt:
    r"""A prompt column: text, a list of messages, or a dialogue that ends in ``\n\nAssistant:``."""
    if not isinstance(value, str):
        return _asking(message_turns(value, name), name)
    if value.startswith("\n\nHuman:") and value.rstrip().endswith("\n\nAssistant:"):
        return _asking(hh_turns(value, name)[:-1], name)
    if not value.strip():
        raise RowError(f"{name} is empty")
    return Prompt((Turn(USER, value),), verbatim=True)


def _asking(turns: Turns, name: str) -> Prompt:
    if not turns or turns[-1].role == ASSISTANT:
        raise RowError(f"{name}: no turn stands before the assistant's last")
    if not any(turn.content.strip() for turn in turns):
        raise RowError(f"{name} is empty")
    return Prompt(turns, verbatim=False)


def _split(turns: Turns, name: str) -> tuple[Prompt, Turns]:
    """A dialogue as prompt and response: the response is the assistant's last turns."""
    at = len(turns)
    while at and turns[at - 1].role == ASSISTANT:
        at -= 1
    if at == len(turns):
        raise RowError(f"{name}: the last turn is {turns[-1].role}'s, expected the assistant's")
    return _asking(turns[:at], name), turns[at:]


def _demonstration(prompt: Prompt, response: Turns, name: str) -> Demonstration:
    if not any(turn.content.strip() for turn in response):
        raise RowError(f"{name} is empty")
    return Demonstration(prompt, response)


def _said(content: str) -> Turns:
    return (Turn(ASSISTANT, content),)


def _response(value: object, name: str) -> Turns:
    if isinstance(value, str):
        return _said(value)
    turns = message_turns(value, name)
    if any(turn.role != ASSISTANT for turn in turns):
        raise RowError(f"{name}: a response to a prompt holds the assistant's turns alone")
    return turns


def _prompt_completion(values: Values) -> Demonstration:
    prompt = prompt_of(values["prompt"], "prompt")
    return _demonstration(prompt, _response(values["completion"], "completion"), "completion")


def _dialogue(name: str) -> Callable[[Values], Demonstration]:
    def parse(values: Values) -> Demonstration:
        value = values[name]
        turns = hh_turns(value, name) if isinstance(value, str) else message_turns(value, name)
        if name == "conversations" and isinstance(values.get("system"), str) and values["system"]:
            turns = (Turn(SYSTEM, string(values, "system")), *turns)
        return _demonstration(*_split(turns, name), name)

    return parse


def _dialogue_prompt(name: str) -> Callable[[Values], Prompt]:
    """The prompt part: all turns before the assistant's last, or all where the user has the last word."""

    def parse(values: Values) -> Prompt:
        value = values[name]
        turns = hh_turns(value, name) if isinstance(value, str) else message_turns(value, name)
        while turns and turns[-1].role == ASSISTANT:
            turns = turns[:-1]
        return _asking(turns, name)

    return parse


def _instruction_prompt(values: Values) -> Prompt:
    """Instruction and input, a blank line between, as one turn of the user."""
    instruction = string(values, "instruction")
    given = string(values, "input") if values.get("input") is not None else ""
    text = f"{instruction}\n\n{given}" if given.strip() else instruction
    return _asking((Turn(USER, text),), "instruction")


def _instruction(values: Values) -> Demonstration:
    return _demonstration(_instruction_prompt(values), _said(string(values, "output")), "output")


def _question_prompt(values: Values) -> Prompt:
    return _asking((Turn(USER, string(values, "question")),), "question")


def _question(values: Values) -> Demonstration:
    return _demonstration(_question_prompt(values), _said(string(values, "answer")), "answer")


def _document(values: Values) -> Document:
    text = string(values, "text")
    if not text.strip():
        raise RowError("text is empty")
    return Document(text)


def _comparison(prompt: Prompt, chosen: Turns, rejected: Turns) -> Comparison:
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    return Comparison(prompt, chosen, rejected)


def _prompt_comparison(values: Values) -> Comparison:
    """Chosen and rejected beside a prompt: responses, or whole dialogues that begin with the prompt's turns."""
    prompt = prompt_of(values["prompt"], "prompt")
    sides = []
    for name in ("chosen", "rejected"):
        value = values[name]
        turns = _said(value) if isinstance(value, str) else message_turns(value, name)
        whole = len(turns) > len(prompt.turns) and turns[: len(prompt.turns)] == prompt.turns
        sides.append(turns[len(prompt.turns) :] if whole else _response(value, name))
    return _comparison(prompt, *sides)


def _conversation_comparison(values: Values) -> Comparison:
    """ShareGPT: the dialogue so far, and two messages that may come next."""
    prompt = _asking(message_turns(values["conversations"], "conversations"), "conversations")
    return _comparison(prompt, _response(values["chosen"], "chosen"), _response(values["rejected"], "rejected"))


def _dialogue_comparison(values: Values) -> Comparison:
    """Two whole dialogues, as text (Anthropic HH) or as messages, that differ in the last response alone."""
    prompt: dict[str, Prompt] = {}
    response: dict[str, Turns] = {}
    for name in ("chosen", "rejected"):
        value = values[name]
        turns = hh_turns(value, name) if isinstance(value, str) else message_turns(value, name)
        prompt[name], response[name] = _split(turns, name)
    if prompt["chosen"] != prompt["rejected"]:
        raise RowError("chosen and rejected differ before the last response, so they answer different prompts")
    return _comparison(prompt["chosen"], response["chosen"], response["rejected"])


def _chosen_prompt(values: Values) -> Prompt:
    return _dialogue_comparison(values).prompt


def _text_prompt(values: Values) -> Prompt:
    return prompt_of(string(values, "text"), "text")


TEXT = Format(("text",), (), _document)
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "comparisons": (
        Format(("prompt", "chosen", "rejected"), (), _prompt_comparison),
        Format(("conversations", "chosen", "rejected"), (), _conversation_comparison),
        Format(("chosen", "rejected"), (), _dialogue_comparison),
    ),
    "examples": (
        Format(("messages",), (), _dialogue("messages")),
        Format(("conversations",), ("system",), _dialogue("conversations")),
        Format(("prompt", "completion"), (), _prompt_completion),
        Format(("instruction", "output"), ("input",), _instruction),
        Format(("question", "answer"), (), _question),
        TEXT,
    ),
    "prompts": (
        Format(("prompt",), (), lambda values: prompt_of(values["prompt"], "prompt")),
        Format(("messages",), (), _dialogue_prompt("messages")),
        Format(("conversations",), (), _dialogue_prompt("conversations")),
        Format(("chosen", "rejected"), (), _chosen_prompt),
        Format(("instruction",), ("input",), _instruction_prompt),
        Format(("question",), (), _question_prompt),
        Format(("text",), (), _text_prompt),
    ),
}
