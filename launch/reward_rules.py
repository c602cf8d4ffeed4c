"""Rules between the rewards of an online run and the rest of it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from actors.config import RolloutConfig
from actors.rewards.combination_config import (
    LengthConfig,
    NormaliseConfig,
    OverlongConfig,
    PiecewiseConfig,
    RepetitionConfig,
    TotalConfig,
)
from actors.rewards.config import (
    AnyReward,
    CheckerRewardConfig,
    CodeRewardConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
)
from algorithms.config import OnlineConfig
from cluster.config import ClusterConfig
from data.config import DataConfig
from launch.devices import model_role_problems, runs_on_gpu
from launch.errors import Problem

#: The role of the only reward of a run, where the configuration gives it no name.
UNNAMED = "reward"
#: The sum of what an environment gave stands among the rewards under this name.
ENVIRONMENT = "environment"
#: What a reward cannot be called: the other roles, and what scores travel beside.
OTHER_NAMES = frozenset(
    {"policy", "critic", "reference", "reward", "rollout", "baseline", "credit", "source", "pretraining_source"}
    | {"environment", "evaluation", "safety_prompts", "score"}
)
NAME = re.compile(r"[a-z][a-z0-9_]*")
_FIELD = re.compile(r"\{(\w+)\}")


def by_role(reward: AnyReward | None, rewards: Mapping[str, AnyReward]) -> dict[str, AnyReward]:
    """Every reward by the name of its role."""
    return {**({} if reward is None else {UNNAMED: reward}), **rewards}


def by_place(reward: AnyReward | None, rewards: Mapping[str, AnyReward]) -> dict[str, AnyReward]:
    """Every reward by where it stands in the configuration."""
    return by_role(reward, {f"rewards.{name}": one for name, one in rewards.items()})


def reward_names(
    reward: AnyReward | None, rewards: Mapping[str, AnyReward], rollout: RolloutConfig
) -> tuple[str, ...]:
    """The names of all that gives scores: the rewards, and the environment where there is one."""
    environment = () if rollout.environment is None else (ENVIRONMENT,)
    return (*by_role(reward, rewards), *environment)


def rewards_are_there(
    reward: AnyReward | None, rewards: dict[str, AnyReward], rollout: RolloutConfig
) -> Iterator[Problem]:
    """One reward without a name, or some with names that nothing else has; none is needed beside an environment."""
    if not reward_names(reward, rewards, rollout):
        yield Problem(
            "rewards", "the section is missing: nothing says what a response is worth",
            "rewards: {NAME: {kind: ...}}, or reward: {model: {path: ...}} for one reward model",
        )
    elif reward is not None and rewards:
        yield Problem("reward", "is there beside rewards", f"move it there, under a name: rewards.{_free(rewards)}")
    for name in rewards:
        if name in OTHER_NAMES:
            yield Problem(f"rewards.{name}", f"{name} is the name of something else in a run", "another name")
        elif not NAME.fullmatch(name) or f"{name}_std" in rewards:
            right = "small letters, digits and _; `_std` is added to it for what is logged"
            yield Problem(f"rewards.{name}", f"{name!r} cannot be the name of a reward", right)


def _free(rewards: Mapping[str, AnyReward]) -> str:
    return next(name for name in ("model", "learnt", "scorer", "another") if name not in rewards)


def total_is_of_the_rewards(
    reward: AnyReward | None, rewards: dict[str, AnyReward], rollout: RolloutConfig, total: TotalConfig
) -> Iterator[Problem]:
    """What combines and shapes names rewards that are there."""
    names = reward_names(reward, rewards, rollout)
    if names and (reason := total.why_not(names)):
        yield Problem("total", reason)


def total_suits_the_algorithm(algorithm: OnlineConfig, total: TotalConfig) -> Iterator[Problem]:
    """A response that is compared with a baseline is scored as that is: by itself."""
    if algorithm.needs.baseline == "none":
        return
    why = f"looks over the batch, and {algorithm.name} scores the response that it compares with by itself"
    if isinstance(total.combine, PiecewiseConfig) and total.combine.whiten:
        yield Problem("total.combine.whiten", why, "false")
    for name, step in total.shaping.items():
        if isinstance(step, NormaliseConfig) and step.by == "running":
            yield Problem(f"total.shaping.{name}.by", why, "constants")


def overlong_margin_fits(total: TotalConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """The penalty of overlong responses rises within a response."""
    drawn = rollout.max_drawn_tokens
    for name, step in total.shaping.items():
        if isinstance(step, OverlongConfig):
            longest = step.max_tokens or drawn
            free = longest - step.margin_tokens
            if free < 0:
                yield Problem(
                    f"total.shaping.{name}.margin_tokens",
                    f"{step.margin_tokens} is more than the longest response, {longest} tokens",
                    f"at most {longest}",
                )
            elif free >= drawn:
                yield Problem(
                    f"total.shaping.{name}.max_tokens",
                    f"{longest} with margin_tokens = {step.margin_tokens}: the penalty begins above {free} tokens, and "
                    f"no response has more than {drawn}",
                    f"at most {drawn + step.margin_tokens - 1}, or leave it out",
                )


def penalties_can_apply(total: TotalConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """The longest response is long enough for what a length or a repetition costs."""
    drawn = rollout.max_drawn_tokens
    for name, step in total.shaping.items():
        if isinstance(step, LengthConfig) and step.free_tokens >= drawn:
            what = f"{step.free_tokens} tokens cost nothing, and no response has more than {drawn}"
            yield Problem(f"total.shaping.{name}.free_tokens", what, f"at most {drawn - 1}")
        elif isinstance(step, RepetitionConfig) and step.ngram >= drawn:
            yield Problem(
                f"total.shaping.{name}.ngram",
                f"{step.ngram}-grams repeat in responses of {step.ngram + 1} tokens or more, and the longest response "
                f"has {drawn}",
                f"a smaller one, usually {RepetitionConfig().ngram}",
            )


def columns_are_kept(
    data: DataConfig, reward: AnyReward | None, rewards: dict[str, AnyReward], total: TotalConfig
) -> Iterator[Problem]:
    """Columns of the prompts' rows that rewards are known to ask for are kept."""
    wanted = {where: columns_of(one) for where, one in by_place(reward, rewards).items()}
    if isinstance(total.combine, PiecewiseConfig) and total.combine.tag_column is not None:
        wanted["total.combine.tag_column"] = {total.combine.tag_column}
    for where, columns in wanted.items():
        for column in sorted(columns - set(data.keep_columns)):
            kept = ", ".join((*data.keep_columns, column))
            yield Problem(where, f"needs the column {column!r} of the prompts' rows", f"data.keep_columns: [{kept}]")


def columns_of(reward: AnyReward) -> set[str]:
    """Columns of the prompts' rows that a reward is known to ask for."""
    match reward:
        case CheckerRewardConfig(check=check):
            return {check.column} if hasattr(check, "column") else set()
        case CodeRewardConfig(tests_column=column):
            return {column}
        case JudgeRewardConfig(template=template):
            return set(_FIELD.findall(template)) - {"prompt", "response"}
        case _:
            return set()


def rewards_suit_devices(
    cluster: ClusterConfig, reward: AnyReward | None, rewards: dict[str, AnyReward]
) -> Iterator[Problem]:
    """What needs a GPU has one, and a judge leaves room for who shares it."""
    for where, one in by_place(reward, rewards).items():
        if isinstance(one, ModelRewardConfig | JudgeRewardConfig):
            yield from model_role_problems(where, one, one.model, cluster)
        if isinstance(one, JudgeRewardConfig) and runs_on_gpu(one, cluster):
            yield from _judge_fits(where, one)


def _judge_fits(where: str, judge: JudgeRewardConfig) -> Iterator[Problem]:
    share, gpus = judge.gpu_memory_fraction, judge.gpus_per_rank
    if gpus < 1 and judge.kv_cache_bytes is None and share > gpus:
        what = f"the judge takes {share:g} of a GPU's memory but has {gpus:g} of the GPU"
        yield Problem(f"{where}.gpu_memory_fraction", what, f"at most {gpus:g}, or set kv_cache_bytes")


REWARD_RULES = (
    rewards_are_there,
    total_is_of_the_rewards,
    total_suits_the_algorithm,
    overlong_margin_fits,
    penalties_can_apply,
    columns_are_kept,
    rewards_suit_devices,
)
