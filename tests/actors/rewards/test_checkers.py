"""What the built-in checkers take for right, for wrong, and for data that say nothing."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from actors.errors import RewardError
from actors.rewards import worker
from actors.rewards.checker import CheckerReward
from actors.rewards.checkers import checker_of, last_number, marked_number
from actors.rewards.config import CheckerRewardConfig
from actors.rewards.face import Reason, RewardFailure, RewardSample
from actors.rewards.mathematics import boxed

# What latex2sympy2's generated parser warns of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:antlr4.*")


def check(name: str, response: str, answer: object = None, **config: Any) -> float | RewardFailure:
    return checker_of({"name": name, "right": 1.0, "wrong": -1.0, **config})(response, {"answer": answer})


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
R, W = 1.0, -1.0


@pytest.mark.parametrize(
    ("name", "response", "answer", "config", "expected"),
    [
        ("exact", " Paris \n", "Paris", {}, R),
        ("exact", "paris", "Paris", {}, W),
        ("exact", "paris", "Paris", {"ignore_case": True}, R),
        ("exact", "I say A, no: (B)", "B", {"extract": r"\(?([ABCD])\)"}, R),
        ("exact", "I say nothing", "B", {"extract": r"\(([ABCD])\)"}, W),
        ("exact", "42", 42, {}, R),
        ("numeric", "first 7, so 1,234.5 it is", 1234.5, {}, R),
        ("numeric", "10-3", "3", {}, R),
        ("numeric", "it is -3.", -3, {}, R),
        ("numeric", "1e3", "1000", {}, R),
        ("numeric", "none at all", 3, {}, W),
        ("numeric", "1e999", 3, {}, W),
        ("numeric", "-1e-07", -1e-7, {}, R),
        ("gsm8k", "#### 0.5", 0.5, {}, R),
        ("numeric", "3.1", 3, {"tolerance": 0.05}, R),
        ("gsm8k", "2 and 3\n#### 1,000", "so\n#### 1000", {}, R),
        ("gsm8k", "#### 5\nno:\n#### $12.00 in 3 days", "12", {}, R),
        ("gsm8k", "#### 1430001", "#### 1,430,000", {}, W),
        ("numeric", "1430001", 1430000, {}, W),
        ("gsm8k", "it is 12", "#### 12", {}, W),
        ("gsm8k", "it is 12", "#### 12", {"needs_mark": False}, R),
        ("gsm8k", "#### twelve", "#### 12", {}, W),
        ("math", r"thus \boxed{\frac{1}{2}}", "0.5", {}, R),
        ("math", r"thus \boxed{\dfrac12}", r"so $\boxed{\frac{2}{4}}$.", {}, R),
        ("math", r"\boxed{(x+1)^2}", "x^2+2x+1", {}, R),
        ("math", r"\boxed{3} no \boxed{4}", "3", {}, W),
        ("math", "it is 4", "4", {}, W),
        ("math", "it is $4$", "4", {"needs_box": False}, R),
        ("math", r"\boxed{\{1,2,3\}}", r"\{3,2,1\}", {}, R),
        ("math", r"\boxed{", "4", {}, W),
        ("regex", "abc 12", None, {"pattern": r"\d+"}, R),
        ("regex", "abc 12", None, {"pattern": r"\d+", "whole": True}, W),
        ("json_schema", '{"n": 3}', None, {"json_schema": SCHEMA}, R),
        ("json_schema", '{"n": "3"}', None, {"json_schema": SCHEMA}, W),
        ("json_schema", "{n: 3}", None, {"json_schema": SCHEMA}, W),
        ("json_schema", "[" * 100_000, None, {"json_schema": SCHEMA}, W),
        ("json_schema", 'Here:\n```json\n{"n": 3}\n```', None, {"json_schema": SCHEMA, "fenced": True}, R),
        ("length", "one two three", None, {"most": 3}, R),
        ("length", "one two three", None, {"least": 4}, W),
        ("length", "abc", None, {"unit": "characters", "least": 3, "most": 3}, R),
        ("length", "a\n\nb\n", None, {"unit": "lines", "most": 2}, R),
        ("format", "<think>a\n</think>\n<answer>b</answer>", None, {"sections": ["think", "answer"]}, R),
        ("format", "<answer>b</answer><think>a</think>", None, {"sections": ["think", "answer"]}, W),
        ("format", "<think>a</think> so <answer>b</answer>", None, {"sections": ["think", "answer"]}, W),
        ("format", "<think>a<think></think><answer>b</answer>", None, {"sections": ["think", "answer"]}, W),
    ],
)
def test_right_and_wrong(name: str, response: str, answer: object, config: dict[str, Any], expected: float) -> None:
    assert check(name, response, answer, **config) == expected


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        *(("exact", answer) for answer in (None, math.nan)),
        *(("numeric", answer) for answer in ("many", math.nan, -math.inf, "1e999", True, 10**400)),
        *(("gsm8k", answer) for answer in (["12"], math.nan, "#### nan")),
        *(("math", answer) for answer in ("", None, math.nan)),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_failure(name: str, answer: object) -> None:
    found = check(name, r"#### 12 \boxed{12}", answer)
    assert isinstance(found, RewardFailure) and found.reason is Reason.BAD_ROW


def test_sympy_is_loaded_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and a call that is killed for that would begin with it anew."""
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    worker._scorer({"check": {"name": "math"}})
    assert "math_verify" in sys.modules


def test_pieces() -> None:
    assert last_number("a1b") == 1.0 and last_number("v1.2.3") == 0.3
    assert marked_number("####  -1,5 00", True) == -15.0
    assert boxed(r"\boxed{a\}b}") == r"a\}b" and boxed(r"\boxed 5") is None and boxed("") is None


async def test_a_check_that_takes_for_ever_is_killed_and_the_others_go_on() -> None:
    config = CheckerRewardConfig(check={"name": "regex", "pattern": r"(a+)+b"}, timeout_s=1.0)
    reward = CheckerReward(config)
    samples = [RewardSample("", text, True, {}) for text in ("aab", "a" * 60, "c")]
    first, second, third = await reward.score(samples)
    await reward.close()
    assert (first, third) == (1.0, 0.0)
    assert isinstance(second, RewardFailure) and second.reason is Reason.TIMED_OUT


def test_what_cannot_check_anything_is_refused() -> None:
    with pytest.raises(RewardError, match=r"needs the column 'answer'; the prompts' rows keep solution"):
        checker_of({"name": "gsm8k"})("#### 1", {"solution": "1"})
    with pytest.raises(RewardError, match="not a JSON schema"):
        check("json_schema", "{}", json_schema={"type": "nothing"})
    for wrong in ({"name": "regex", "pattern": "("}, {"name": "length", "least": 3, "most": 2}, {"name": "other"}):
        with pytest.raises(ValueError):
            CheckerRewardConfig(check=wrong)
