"""The pieces that formats are made of: columns of a row as text, numbers, turns, prompts and responses.

Every function here raises ``RowError``, saying which column is wrong and how, where the row is not of its format.
"""

from __future__ import annotations

import math
import re

from data.errors import RowError
from data.records import ASSISTANT, SYSTEM, USER, Prompt, Turn, Turns, Values

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
        raise RowError(f"{name} must be a list of messages that is not empty, got {brief(value)}")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RowError(f"{name}: message {number} is {brief(message)}, not role and content")
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
    raise RowError(f"{where}: content must be text, got {brief(content)}")


def brief(value: object) -> str:
    """A value as a message names it: its type and how it begins."""
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
        return prompt_from(message_turns(value, name), name)
    if value.startswith("\n\nHuman:") and value.rstrip().endswith("\n\nAssistant:"):
        return prompt_from(hh_turns(value, name)[:-1], name)
    if not value.strip():
        raise RowError(f"{name} is empty")
    return Prompt((Turn(USER, value),), verbatim=True)


def prompt_from(turns: Turns, name: str) -> Prompt:
    """Turns that a response has to follow."""
    if not turns or turns[-1].role == ASSISTANT:
        raise RowError(f"{name}: no turn stands before the assistant's last")
    if not any(turn.content.strip() for turn in turns):
        raise RowError(f"{name} is empty")
    return Prompt(turns, verbatim=False)


def split_dialogue(turns: Turns, name: str) -> tuple[Prompt, Turns]:
    """A dialogue as prompt and response: the response is the assistant's last turns."""
    at = len(turns)
    while at and turns[at - 1].role == ASSISTANT:
        at -= 1
    if at == len(turns):
        raise RowError(f"{name}: the last turn is {turns[-1].role}'s, expected the assistant's")
    return prompt_from(turns[:at], name), turns[at:]


def reply(content: str) -> Turns:
    """Text as what the assistant said."""
    return (Turn(ASSISTANT, content),)


def response_of(value: object, name: str) -> Turns:
    """A response column: text, or messages of the assistant alone."""
    if isinstance(value, str):
        return reply(value)
    return _of_assistant(message_turns(value, name), name)


def _of_assistant(turns: Turns, name: str) -> Turns:
    if any(turn.role != ASSISTANT for turn in turns):
        raise RowError(f"{name}: a response to a prompt holds the assistant's turns alone")
    return turns


def response_beside(prompt: Prompt, asked: object, value: object, name: str) -> Turns:
    r"""A response to ``prompt``, or a whole dialogue that begins with its turns, of which what follows is taken.

    Beside a prompt that is a dialogue as Anthropic HH writes it, the space around a response is no part of it.

    Args:
        asked: the column that the prompt was read from.
        value: the response's column: text, a whole dialogue as text (``\n\nHuman: ...``), or messages.
    """
    if not isinstance(value, str):
        turns = message_turns(value, name)
        return _of_assistant(_following(prompt, turns) or turns, name)
    is_dialogue = not prompt.verbatim and value.startswith("\n\nHuman:")
    if is_dialogue and (following := _following(prompt, hh_turns(value, name))):
        return _of_assistant(following, name)
    if prompt.verbatim or not isinstance(asked, str):
        return reply(value)
    if is_dialogue:
        raise RowError(f"{name} is a dialogue that does not begin with the prompt")
    return reply(value.strip())


def _following(prompt: Prompt, turns: Turns) -> Turns:
    """The turns behind those of the prompt; none where they do not begin with it."""
    begins = turns[: len(prompt.turns)] == prompt.turns
    return turns[len(prompt.turns) :] if begins else ()


def number_of(value: object, name: str) -> float:
    """A finite number, or text that is one: files like CSV hold nothing but text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowError(f"{name} must be a number, got {brief(value)}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{name} must be a number, got {brief(value)}")
    return float(value)


def flag_of(value: object, name: str) -> bool:
    """A truth value: true and false, 1 and 0, or their names as text."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if not isinstance(value, bool | int | float | str) or str(value).strip().lower() not in known:
        raise RowError(f"{name} must be true or false, got {brief(value)}")
    return known[str(value).strip().lower()]
