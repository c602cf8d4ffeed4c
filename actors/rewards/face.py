"""The one face of every reward that reads text, and what it says where it has no score.

Invariants:

- There is one answer for each sample, in the order of the samples: a number that is finite in float32, or a
  ``RewardFailure``. A failure is never written as a number, and no answer is None.
- A wrong answer of the policy is a score; a failure is of the reward. What would go wrong in the same way for every
  sample (a file that is missing, a column that nobody keeps) raises ``RewardError`` instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Protocol, TypeAlias

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

LONGEST_DETAIL = 300
#: Columns of scores are float32: what is beyond would be infinite there.
LARGEST_SCORE = 3.4028234663852886e38


@dataclass(frozen=True)
class RewardSample:
    """A response to be scored.

    ``finished`` says that it ended by itself and was not cut off. ``columns`` are the other columns of the prompt's
    row, those that ``data.keep_columns`` names.
    """

    prompt: str
    response: str
    finished: bool
    columns: Mapping[str, JSON]


class Reason(StrEnum):
    """Why a sample has no score."""

    TIMED_OUT = "timed_out"
    RAISED = "raised"
    CRASHED = "crashed"
    NOT_FINITE = "not_finite"
    WRONG_TYPE = "wrong_type"
    WRONG_LENGTH = "wrong_length"
    BAD_ROW = "bad_row"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    UNREADABLE = "unreadable"
    TOO_LONG = "too_long"


@dataclass(frozen=True)
class RewardFailure:
    """No score: failures are counted by ``reason``; ``detail`` is for people."""

    reason: Reason
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", self.detail[:LONGEST_DETAIL])


Answer: TypeAlias = float | RewardFailure


class TextReward(Protocol):
    """Whatever scores text. Rewards name it as their base.

    ``samples_per_call`` are those that have their answers together, or none: it does not pay to ask for fewer at a
    time. A call of ``score`` may be cancelled: then it ends what works on its samples.
    """

    samples_per_call: int = 1

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """One answer for each sample, in their order.

        Raises:
            RewardError: it cannot score anything as it is configured.
        """
        ...

    async def close(self) -> None:
        """End what it started. It may be used again: that starts it anew."""
        ...

    def take_failed_tries(self) -> Counter[str]:
        """Samples by the reason why they were tried again within ``score``, each time counted, since the last call."""
        return Counter()


def checked(value: object) -> Answer:
    """What a reward returned, as a score: any real number that is finite in float32; True is 1 and False 0.

    Arrays and tensors without a dimension, and numpy's truth values, count as the number in them.

    >>> checked(True), checked(0.5)
    (1.0, 0.5)
    >>> checked(None).reason, checked(float("nan")).reason
    (<Reason.WRONG_TYPE: 'wrong_type'>, <Reason.NOT_FINITE: 'not_finite'>)
    """
    if getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[attr-defined]
    if not isinstance(value, Real):
        return RewardFailure(Reason.WRONG_TYPE, f"it is {type(value).__name__}: {value!r}; a number is expected")
    try:
        number = float(value)
    except OverflowError:
        return RewardFailure(Reason.NOT_FINITE, "it is an integer too large for a float")
    if not abs(number) <= LARGEST_SCORE:
        return RewardFailure(Reason.NOT_FINITE, f"it is {number}; a score is at most {LARGEST_SCORE} either way")
    return number


def checked_batch(values: object, num_samples: int) -> list[Answer]:
    """What a batched reward returned: a sequence with one number a sample.

    Where it is not as long as the batch nobody knows which score is whose, so the whole batch has failed.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        if not hasattr(values, "tolist"):  # an array or a tensor
            why = f"it is {type(values).__name__}; a list with one number a sample is expected"
            return [RewardFailure(Reason.WRONG_TYPE, why)] * num_samples
        values = values.tolist()
    if not isinstance(values, Sequence) or len(values) != num_samples:
        given = len(values) if isinstance(values, Sequence) else "no"
        why = f"{given} scores for {num_samples} samples"
        return [RewardFailure(Reason.WRONG_LENGTH, why)] * num_samples
    return [checked(value) for value in values]


def to_json(sample: RewardSample) -> dict[str, JSON]:
    """A sample as it travels to other processes."""
    return {
        "prompt": sample.prompt,
        "response": sample.response,
        "finished": sample.finished,
        "columns": dict(sample.columns),
    }
