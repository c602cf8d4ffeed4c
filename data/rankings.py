"""Comparisons: two responses to a prompt, or several with ranks or scores.

Beside the responses a row may say by how much, how surely, and in which words the first is better: ``margin`` (a
number), ``preference`` (the probability that the first of two beats the second) and ``rating`` (a name).

Invariant: equal keys have equal ranks. A row of nothing but ties is no bad row; what becomes of it is the builder's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from data.errors import RowError
from data.records import SYSTEM, Comparison, Prompt, Turn, Turns, Values
from data.turns import (
    brief,
    hh_turns,
    message_turns,
    number_of,
    prompt_from,
    prompt_of,
    reply,
    response_beside,
    response_of,
    split_dialogue,
    string,
)

#: Columns that any comparison may have.
FACTS = ("margin", "rating", "preference")
#: Columns that a prompt may be read from as a dialogue of text, in the order in which they are looked for.
_MAY_BE_HH = ("prompt", "messages", "conversations")


def prompt_pair(values: Values) -> Comparison:
    """Chosen and rejected beside a prompt: responses, or whole dialogues that begin with the prompt."""
    asked = values["prompt"]
    prompt = prompt_of(asked, "prompt")
    given = {name: values[name] for name in ("chosen", "rejected")}
    return _pair(prompt, _beside(prompt, asked, given), values)


def conversation_pair(values: Values) -> Comparison:
    """ShareGPT: the dialogue so far, and two messages that may come next."""
    turns = message_turns(values["conversations"], "conversations")
    if isinstance(values.get("system"), str) and values["system"]:
        turns = (Turn(SYSTEM, string(values, "system")), *turns)
    prompt = prompt_from(turns, "conversations")
    return _pair(prompt, [response_of(values[name], name) for name in ("chosen", "rejected")], values)


def dialogue_pair(values: Values) -> Comparison:
    """Two whole dialogues, as text (Anthropic HH) or as messages, that differ in the last response alone."""
    prompts: list[Prompt] = []
    responses: list[Turns] = []
    for name in ("chosen", "rejected"):
        value = values[name]
        turns = hh_turns(value, name) if isinstance(value, str) else message_turns(value, name)
        prompt, response = split_dialogue(turns, name)
        prompts.append(prompt)
        responses.append(response)
    if prompts[0] != prompts[1]:
        raise RowError("chosen and rejected differ before the last response, so they answer different prompts")
    return _pair(prompts[0], responses, values)


def ranked(asked: Callable[[Values], Prompt], by: str) -> Callable[[Values], Comparison]:
    """How to read a prompt with ``responses``, ordered by the column ``by``.

    ``ranks``: lower is better. ``scores``: higher is better. Equal ones are ties. ``preference``: of two responses,
    the probability that the first is better, where 0.5 is a tie.

    Example: scores [0.5, 2.0, 0.5] put the second response first: ranks [0, 1, 1].
    """

    def parse(values: Values) -> Comparison:
        prompt = asked(values)
        given = values["responses"]
        if not isinstance(given, list) or len(given) < 2:
            raise RowError(f"responses must be a list of two or more, got {brief(given)}")
        column = next((values[name] for name in _MAY_BE_HH if values.get(name) is not None), None)
        responses = _beside(prompt, column, {f"response {number}": value for number, value in enumerate(given, 1)})
        preference = _preference(values, len(responses))
        if by == "preference":
            first = 1.0 if preference is None else preference
            keys = [1 - first, first]
        else:
            keys = _numbers(values[by], by, len(responses))
            keys = [-key for key in keys] if by == "scores" else keys
        return _ordered(prompt, responses, keys, preference, values)

    return parse


def _ordered(
    prompt: Prompt, responses: Sequence[Turns], keys: Sequence[float], preference: float | None, values: Values
) -> Comparison:
    """Best (lowest key) first."""
    rank_of = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    order = sorted(range(len(keys)), key=lambda place: keys[place])
    best_key: dict[Turns, float] = {}
    for response, key in zip(responses, keys, strict=True):
        if best_key.setdefault(response, key) != key:
            raise RowError(f"the same response is given two places: {brief(response[0].content)}")
    return Comparison(
        prompt,
        tuple(responses[place] for place in order),
        tuple(rank_of[keys[place]] for place in order),
        *_margin_and_rating(values),
        preference if order[0] == 0 or preference is None else 1 - preference,
    )


def _pair(prompt: Prompt, responses: Sequence[Turns], values: Values) -> Comparison:
    if responses[0] == responses[1]:
        raise RowError("chosen and rejected are the same")
    return Comparison(prompt, tuple(responses), (0, 1), *_margin_and_rating(values), _preference(values, 2))


def _beside(prompt: Prompt, asked: object, given: Mapping[str, object]) -> list[Turns]:
    """Responses, or wholes of prompt and response: turns, or texts of which every one begins with a plain prompt's.

    One text alone that begins so may be an answer that repeats the question.
    """
    text = prompt.turns[0].content
    wholes = [isinstance(value, str) and len(value) > len(text) and value.startswith(text) for value in given.values()]
    if prompt.verbatim and all(wholes):
        return [reply(str(value)[len(text) :]) for value in given.values()]
    return [response_beside(prompt, asked, value, name) for name, value in given.items()]


def _numbers(value: object, name: str, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise RowError(f"{name} must be a list of {count} numbers, one a response, got {brief(value)}")
    return [number_of(item, name) for item in value]


def _margin_and_rating(values: Values) -> tuple[float | None, str]:
    margin = values.get("margin")
    rating = string(values, "rating") if values.get("rating") is not None else ""
    return None if margin is None else number_of(margin, "margin"), rating


def _preference(values: Values, num_responses: int) -> float | None:
    value = values.get("preference")
    if value is None:
        return None
    preference = number_of(value, "preference")
    if num_responses != 2:
        raise RowError(f"preference is of two responses, here are {num_responses}")
    if not 0 <= preference <= 1:
        raise RowError(f"preference is the probability that the first is better, 0 to 1, got {preference}")
    return preference
