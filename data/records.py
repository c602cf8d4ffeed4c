"""The few canonical forms that rows of every format become.

Invariants:

- A prompt ends where a response has to follow, so its last turn is not the assistant's.
- ``verbatim`` says that the prompt is one string written by hand for the model (columns ``prompt``, ``text``):
  without a chat template it is used as it stands, and a response follows it with nothing between.
- Two rows with the same prompt have the same ``prompt_key``, whatever else they hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


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
    """Responses to one prompt, best first.

    ``ranks`` start at 0 and rise by 0 (a tie) or 1. ``margin`` is none where the row gives none, ``rating`` is empty.
    ``preference`` is the probability that the first response beats the second; it is none where the row gives none,
    and always with more than two responses.
    """

    prompt: Prompt
    responses: tuple[Turns, ...]
    ranks: tuple[int, ...]
    margin: float | None = None
    rating: str = ""
    preference: float | None = None

    @property
    def is_tied(self) -> bool:
        """No response is better than another."""
        return not any(self.ranks)


@dataclass(frozen=True, slots=True)
class Feedback:
    """One response to a prompt, and whether it is wanted."""

    prompt: Prompt
    response: Turns
    desirable: bool


@dataclass(frozen=True, slots=True)
class Document:
    """Text to be learnt whole."""

    text: str


Record = Prompt | Demonstration | Comparison | Feedback | Document
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
        case _:
            return prompt_key(record.prompt)
