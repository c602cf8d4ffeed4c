"""What a run needs of its rewards, as far as it can be known without starting them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from actors.errors import RewardError
from actors.rewards.binding import Signature, is_async, load_function
from actors.rewards.config import (
    AnyReward,
    CheckerRewardConfig,
    CodeRewardConfig,
    FunctionRewardConfig,
    HttpRewardConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
)
from cluster.config import ClusterConfig
from data.tokenizer import Tokenizer
from launch.config import OnlineRunConfig, RunConfig
from launch.errors import Problem
from launch.paths import resolve_reward
from launch.reward_rules import by_place

if TYPE_CHECKING:
    from launch.check_models import Facts

OF_SAMPLE = ("prompt", "response", "finished")


def check_rewards(config: RunConfig, tokenizers: Mapping[str, Tokenizer], facts: Facts) -> Iterator[Problem]:
    """What is wrong with rewards over text, and an evaluation's checkers. Adds what they are to ``facts``.

    Args:
        tokenizers: of models that could be loaded, by where these stand in the configuration.
    """
    if not isinstance(config, OnlineRunConfig):
        return
    checkers = {} if config.evaluation is None else config.evaluation.checkers
    checking = {f"evaluation.checkers.{name}": checker for name, checker in checkers.items()}
    for where, reward in (by_place(config.reward, config.rewards) | checking).items():
        try:
            if fact := _fact(where, resolve_reward(reward), config, tokenizers):
                facts.append((where, fact + _outlasting(reward, config.cluster)))
        except RewardError as error:
            yield Problem(where, str(error))


def _fact(where: str, reward: AnyReward, config: OnlineRunConfig, tokenizers: Mapping[str, Tokenizer]) -> str:
    """What a reward is, in words.

    Raises:
        RewardError: it could not score anything.
    """
    match reward:
        case FunctionRewardConfig():
            return _function(reward, config.data.keep_columns)
        case CheckerRewardConfig(check=check):
            # Here, because JSON schemas are loaded with it.
            from actors.rewards.checkers import checker_of

            checker_of(check.model_dump(mode="json"))
            return f"checker {check.name}"
        case CodeRewardConfig(isolation=isolation, num_workers=workers):
            return f"code in {workers} sandboxes at a time, isolated by {isolation} where the role runs"
        case HttpRewardConfig(endpoints=endpoints):
            return f"service at {', '.join(endpoints)}, which is not asked now"
        case JudgeRewardConfig():
            return _judge(reward, tokenizers.get(f"{where}.model"))
        case _:
            return ""


def _outlasting(reward: AnyReward, cluster: ClusterConfig) -> str:
    """That one sample may take longer than the whole call that asks for its slice, where it may."""
    within_s = cluster.answer_within_s
    if (longest_s := longest_of_a_sample(reward)) <= within_s:
        return ""
    return (
        f"; a sample may take {longest_s:,g} s, and what is not done {within_s:,g} s after its slice came has timed "
        "out: lower timeout_s or num_retries, or raise cluster.call_timeout_s"
    )


def longest_of_a_sample(reward: AnyReward) -> float:
    """Seconds that a sample may take with all its tries, waits between them included; of code, one test of it."""
    if isinstance(reward, ModelRewardConfig):
        return 0.0
    one_s: float = reward.timeout_s
    if isinstance(reward, CodeRewardConfig):
        return one_s  # a test that takes too long is a score, and not tried again
    if isinstance(reward, HttpRewardConfig):
        waits = (min(reward.max_backoff_s, reward.backoff_s * 2**at) for at in range(reward.num_attempts - 1))
        one_s = reward.num_attempts * one_s + sum(waits)
    return (1 + reward.num_retries) * one_s + reward.retry_wait_s * (2.0**reward.num_retries - 1)


def _function(reward: FunctionRewardConfig, columns: tuple[str, ...]) -> str:
    function = load_function(reward.path)
    signature = Signature.of(function)
    known = (*OF_SAMPLE, *columns)
    if missing := [name for name in signature.required if name not in known]:
        raise RewardError(
            f"{reward.path} asks for {missing[0]!r}; it can be given {', '.join(known)}: add it to data.keep_columns"
        )
    return f"{'async ' if is_async(function) else ''}function {reward.path} of {', '.join(signature.names)}"


def _judge(reward: JudgeRewardConfig, tokenizer: Tokenizer | None) -> str:
    if tokenizer is not None:
        # Here, because torch is loaded with it.
        from actors.rewards.judge import label_tokens

        if reward.apply_chat_template == "always" and not getattr(tokenizer, "chat_template", None):
            raise RewardError("the judge has no chat template: set apply_chat_template: never")
        if reward.labels is not None:
            label_tokens(tokenizer, reward.labels.values)
    return f"judge, {'by the probabilities of its labels' if reward.labels else 'by a pattern in what it writes'}"
