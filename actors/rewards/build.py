"""From a reward's configuration to the reward."""

from __future__ import annotations

from actors.rewards.checker import CheckerReward
from actors.rewards.code import CodeReward
from actors.rewards.config import (
    CheckerRewardConfig,
    CodeRewardConfig,
    FunctionRewardConfig,
    HttpRewardConfig,
    JudgeRewardConfig,
    TextRewardConfig,
)
from actors.rewards.face import TextReward
from actors.rewards.function import FunctionReward
from actors.rewards.judge import JudgeReward
from actors.rewards.service import HttpReward
from cluster.context import RankContext


def build_reward(config: TextRewardConfig, context: RankContext) -> TextReward:
    """The reward that a configuration describes.

    Raises:
        RewardError: it cannot score anything: a function or a column is missing, the kernel allows no sandbox.
        ModelError, RolloutError: a judge's model cannot be loaded.
    """
    match config:
        case FunctionRewardConfig():
            return FunctionReward(config)
        case CheckerRewardConfig():
            return CheckerReward(config)
        case CodeRewardConfig():
            return CodeReward(config)
        case HttpRewardConfig():
            return HttpReward(config)
        case JudgeRewardConfig():
            return JudgeReward(config, context)
        case _:
            raise AssertionError(f"{type(config).__name__} is no reward over text")
