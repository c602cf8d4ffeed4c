"""The checkers that are built in: from a response and the row's columns to a score.

A response that does not have the form is wrong, which is a score. An answer in the data that cannot be read is a
failure: nothing is known of the response then.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter

from actors.errors import RewardError
from actors.rewards.config import (
    Check,
    ExactCheck,
    FormatCheck,
    Gsm8kCheck,
    JsonSchemaCheck,
    LengthCheck,
    MathCheck,
    NumericCheck,
    RegexCheck,
)
from actors.rewards.face import Answer, Reason, RewardFailure
from actors.rewards.fences import last_fenced
from actors.rewards.mathematics import boxed, parsed, same_mathematics

#: Gives whether a response passes, or why that cannot be said.
Verdict = bool | RewardFailure
Checker = Callable[[str, Mapping[str, Any]], Answer]

#: A sign counts where nothing stands before it that it could be the difference of.
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def checker_of(config: Mapping[str, Any]) -> Checker:
    """The checker of a ``Check`` as JSON.

    Raises:
        RewardError: its JSON schema is none.
    """
    check: Any = TypeAdapter[Any](Check).validate_python(config)
    passes = _passes(check)

    def score(response: str, columns: Mapping[str, Any]) -> Answer:
        answer = None
        if (column := getattr(check, "column", None)) is not None:
            if column not in columns:
                raise RewardError(
                    f"the checker {check.name} needs the column {column!r}; the prompts' rows keep "
                    f"{', '.join(columns) or 'none'} (data.keep_columns)"
                )
            answer = columns[column]
        verdict = passes(response, answer)
        if isinstance(verdict, RewardFailure):
            return verdict
        return float(check.right if verdict else check.wrong)

    return score


def _passes(check: Any) -> Callable[[str, Any], Verdict]:
    match check:
        case ExactCheck():
            return lambda response, answer: _exact(check, response, answer)
        case NumericCheck():
            return lambda response, answer: _numeric(check, last_number(response), answer, check.tolerance)
        case Gsm8kCheck():
            return lambda response, answer: _numeric(check, marked_number(response, check.needs_mark), answer, 0.0)
        case MathCheck():
            return lambda response, answer: _mathematics(check, response, answer)
        case RegexCheck():
            pattern = re.compile(check.pattern)
            find = pattern.fullmatch if check.whole else pattern.search
            return lambda response, _: find(response) is not None
        case JsonSchemaCheck():
            return _json_schema(check)
        case LengthCheck():
            return lambda response, _: check.least <= length(response, check.unit) <= _or_endless(check.most)
        case FormatCheck():
            tags = [rf"<{re.escape(name)}>(?P<s{at}>.*?)</{re.escape(name)}>" for at, name in enumerate(check.sections)]
            shape = re.compile(r"\s*" + r"\s*".join(tags) + r"\s*", re.DOTALL)
            return lambda response, _: _is_of_sections(shape, check.sections, response)
        case _:
            raise AssertionError(f"{check} is no check")


def last_number(text: str) -> float | None:
    """The last number of a text; commas between thousands are read over.

    >>> last_number("from 3 to 1,200.50 dollars"), last_number("none")
    (1200.5, None)
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def marked_number(text: str, needs_mark: bool) -> float | None:
    """The number behind the last ``####`` of a text (Cobbe et al. 2021, GSM8K).

    The first number there, so that what is written behind it does not matter. Without a mark: none, or where none is
    needed the last number of the text.

    >>> marked_number("2 + 2 = 4\\n#### 1,004 apples", True), marked_number("it is 4", True)
    (1004.0, None)
    """
    _, mark, behind = text.rpartition("####")
    if not mark:
        return None if needs_mark else last_number(text)
    found = re.match(r"\s*\$?\s*([-+]?[\d,]*\.?\d+)", behind)
    return float(found[1].replace(",", "")) if found else None


def length(text: str, unit: str) -> int:
    """Length in characters, words between blanks, or lines that are not blank."""
    if unit == "characters":
        return len(text)
    return len(text.split()) if unit == "words" else sum(bool(line.strip()) for line in text.splitlines())


def _exact(check: ExactCheck, response: str, answer: object) -> Verdict:
    text = _as_text(answer)
    if text is None:
        return _bad(check.column, answer, "a text, or a finite number")
    given, wanted = response.strip(), text.strip()
    if check.extract is not None:
        matches = list(re.finditer(check.extract, response))
        if not matches:
            return False
        given = ((matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or "").strip()
    return given.casefold() == wanted.casefold() if check.ignore_case else given == wanted


def _numeric(check: NumericCheck | Gsm8kCheck, given: float | None, answer: object, tolerance: float) -> Verdict:
    text = _as_text(answer)
    wanted = None if text is None else marked_number(text, needs_mark=False)
    if wanted is None or not math.isfinite(wanted):  # written out, a number may still be beyond all bounds
        return _bad(check.column, answer, "a finite number, or a text with one")
    return given is not None and abs(given - wanted) <= tolerance * max(1.0, abs(wanted))


def _mathematics(check: MathCheck, response: str, answer: object) -> Verdict:
    text = _as_text(answer) or ""
    inner = boxed(text)
    wanted = parsed(text if inner is None else inner)
    if not wanted:
        return _bad(check.column, answer, "mathematics in LaTeX")
    given = boxed(response)
    if given is None and check.needs_box:
        return False
    return same_mathematics(wanted, parsed(response, bare=False) if given is None else parsed(given))


def _json_schema(check: JsonSchemaCheck) -> Callable[[str, Any], Verdict]:
    # Here, for the other checkers do without it.
    import jsonschema

    kind = jsonschema.validators.validator_for(check.json_schema)
    try:
        kind.check_schema(check.json_schema)
    except jsonschema.SchemaError as error:
        raise RewardError(f"json_schema is not a JSON schema: {error.message}") from error
    validator = kind(check.json_schema)

    def passes(response: str, _: object) -> Verdict:
        text = last_fenced(response) if check.fenced else response
        if text is None:
            return False
        try:
            return bool(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError):  # not JSON, or nested beyond all measure
            return False

    return passes


def _is_of_sections(shape: re.Pattern[str], names: tuple[str, ...], response: str) -> bool:
    found = shape.fullmatch(response)
    if found is None:
        return False
    return not any(f"<{name}>" in text or f"</{name}>" in text for text in found.groups() for name in names)


def _as_text(answer: object) -> str | None:
    """An answer of the data; none where it is neither a text nor a number, or a number that no response can equal."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    return None if isinstance(answer, float) and not math.isfinite(answer) else str(answer)


def _or_endless(most: int | None) -> float:
    return float("inf") if most is None else most


def _bad(column: str, answer: object, wanted: str) -> RewardFailure:
    return RewardFailure(Reason.BAD_ROW, f"the column {column!r} holds {answer!r}; {wanted} is expected")
