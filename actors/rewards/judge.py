"""A language model as judge: it is asked about each response, and its score is read from what it says.

Two ways to read: the mean of the labels' values under the judge's probabilities for its first token, or the number
that a pattern finds in what it writes. Where neither gives a number the judge has failed; that is no low score.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actors.errors import EngineDead, RewardError, RolloutError
from actors.models import load_tokenizer
from actors.rewards.config import JudgeRewardConfig, LabelsConfig
from actors.rewards.face import Answer, Reason, RewardFailure, RewardSample, TextReward, checked
from actors.rewards.retries import may_be_tried_again
from actors.rollout import engine_environment
from cluster.context import RankContext
from data.chat import clock_stopped_at
from data.config import CHAT_DATE

if TYPE_CHECKING:
    from actors.vllm_engine.judging import JudgeEngine, Judgement

_FIELD = re.compile(r"\{(\w+)\}")


class JudgeReward(TextReward):
    """A judge on a vLLM engine of this process's own.

    Raises:
        ModelError: its tokenizer cannot be loaded.
        RewardError: labels that the judge's tokenizer cannot tell apart, or no chat template where one is wanted.
        RolloutError: the engine cannot start.
    """

    def __init__(self, config: JudgeRewardConfig, context: RankContext) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(config.model)
        if config.apply_chat_template == "always" and not self._tokenizer.chat_template:
            raise RewardError(f"the judge {config.model.path} has no chat template: set apply_chat_template: never")
        self._labels = label_tokens(self._tokenizer, config.labels.values) if config.labels else {}
        on_gpu = context.device == "cuda"
        # vLLM reads it when it is imported, and its engine's process inherits it.
        for name, value in engine_environment(on_gpu).items():
            os.environ.setdefault(name, value)
        # Here, so that whoever names this class does not import vLLM.
        from actors.vllm_engine.judging import JudgeEngine

        # What waits for others takes none of its own time.
        self._slots = asyncio.Semaphore(config.max_concurrent_sequences)
        self._attempts: dict[str, int] = {}
        self._engine: JudgeEngine = JudgeEngine(config, on_gpu=on_gpu, seed=context.seed)

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """One answer for each sample, as many of them asked at a time as the engine has room for.

        A question that failed is asked with another seed the next time.

        Raises:
            EngineDead: the engine died.
            RewardError: the template asks for a column that the samples do not have.
        """
        questions = [question(self._config.template, sample) for sample in samples]
        return list(await asyncio.gather(*(self._judged(text) for text in questions)))

    async def close(self) -> None:
        """End the engine, for good."""
        self._engine.shutdown()

    async def _judged(self, text: str) -> Answer:
        attempt = self._attempts.get(text, 0)
        async with self._slots:
            answer = await self._answer(text, attempt)
        if may_be_tried_again(answer) and attempt < self._config.num_retries:
            self._attempts[text] = attempt + 1
        else:  # it is not asked again
            self._attempts.pop(text, None)
        return answer

    async def _answer(self, text: str, attempt: int) -> Answer:
        try:
            said = await asyncio.wait_for(self._asked(self._encoded(text), attempt), self._config.timeout_s)
        except TimeoutError:
            return RewardFailure(Reason.TIMED_OUT, f"no judgement in {self._config.timeout_s} s")
        except EngineDead:
            raise
        except RolloutError as error:
            return RewardFailure(Reason.REFUSED, str(error))
        if self._config.labels is not None:
            return expected_value(self._config.labels, self._labels, said.logprobs)
        return parsed(self._config, said.text)

    async def _asked(self, tokens: list[int], attempt: int) -> Judgement:
        if self._labels:
            wanted = sorted({token for ids in self._labels.values() for token in ids})
            return await self._engine.probabilities(tokens, wanted)
        config = self._config
        return await self._engine.answer(
            tokens, max_tokens=config.max_response_tokens, temperature=config.temperature, attempt=attempt
        )

    def _encoded(self, text: str) -> list[int]:
        tokenizer, way = self._tokenizer, self._config.apply_chat_template
        templated = way == "always" or (way == "auto" and bool(tokenizer.chat_template))
        if templated:
            turns = [{"role": "user", "content": text}]
            # A template that prints the date is to judge the same tomorrow.
            clock = clock_stopped_at(CHAT_DATE)
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, strftime_now=clock)
        ids: list[int] = tokenizer(text, add_special_tokens=not templated)["input_ids"]
        return ids


def question(template: str, sample: RewardSample) -> str:
    """The template with the sample in it. What a prompt or a response says in braces stays as it is.

    >>> question("{response}?", RewardSample("p", "{prompt}", True, {}))
    '{prompt}?'

    Raises:
        RewardError: it asks for what is not there.
    """
    given = {"prompt": sample.prompt, "response": sample.response}
    columns = {name: value if isinstance(value, str) else str(value) for name, value in sample.columns.items()}

    def filled(match: re.Match[str]) -> str:
        name = match[1]
        if name not in given and name not in columns:
            known = ", ".join([*given, *columns])
            raise RewardError(f"the judge's template asks for {{{name}}}; there are {known} (data.keep_columns)")
        return given[name] if name in given else columns[name]

    return _FIELD.sub(filled, template)


def label_tokens(tokenizer: Any, labels: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    """The tokens that each label may begin with, as it stands and behind a blank, that no other label begins with.

    Raises:
        RewardError: a label has none.
    """
    first: dict[str, set[int]] = {}
    for label in labels:
        ways = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (label, f" {label}")]
        first[label] = {ids[0] for ids in ways if ids}
    own = {}
    for label, ids in first.items():
        others: set[int] = set().union(*(first[other] for other in labels if other != label))
        if not (alone := ids - others):
            raise RewardError(f"the judge's tokenizer begins the label {label!r} as another: use other labels")
        own[label] = tuple(sorted(alone))
    return own


def expected_value(
    labels: LabelsConfig, tokens: Mapping[str, Sequence[int]], logprobs: Mapping[int, float]
) -> Answer:
    """The labels' values, weighted by their probabilities, which are made to sum to 1.

    >>> labels = LabelsConfig(values={"Yes": 1.0, "No": 0.0})
    >>> round(expected_value(labels, {"Yes": [5], "No": [6]}, {5: math.log(0.6), 6: math.log(0.2)}), 6)
    0.75
    """
    mass = {label: sum(math.exp(logprobs.get(token, -math.inf)) for token in ids) for label, ids in tokens.items()}
    whole = sum(mass.values())
    if not whole >= max(labels.least_mass, 1e-12):
        why = f"the judge gives {', '.join(labels.values)} a probability of {whole:.3g} together"
        return RewardFailure(Reason.UNREADABLE, why)
    return checked(sum(labels.values[label] * share for label, share in mass.items()) / whole)


def parsed(config: JudgeRewardConfig, text: str) -> Answer:
    """The number in the first group of the pattern's last match."""
    assert config.pattern is not None, "a judge has labels or a pattern"
    matches = list(re.finditer(config.pattern, text))
    try:
        number = float(matches[-1][1])
    except (IndexError, TypeError, ValueError):
        return RewardFailure(Reason.UNREADABLE, f"no number by {config.pattern!r} in the judge's {text!r}")
    low = -math.inf if config.low is None else config.low
    high = math.inf if config.high is None else config.high
    if not low <= number <= high:
        return RewardFailure(Reason.UNREADABLE, f"the judge gave {number}; from {low} to {high} is expected")
    return checked(number)
