"""From a reward's configuration to the reward."""

from __future__ import annotations

from collections.abc import Callable

from actors.rewards.checker import CheckerReward
from actors.rewards.config import (
    CheckerRewardConfig,
    FunctionRewardConfig,
    TextRewardConfig,
)
from actors.rewards.face import TextReward
from actors.rewards.function import FunctionReward
from cluster.context import RankContext


def build_reward(config: TextRewardConfig, context: RankContext) -> TextReward:
    """The reward that a configuration describes.

    Raises:
        RewardError: it cannot score anything: a function or a column is missing, the kernel allows no sandbox.
        ModelError, RolloutError: a judge's model cannot be loaded.
    """
    builders: dict[type[TextRewardConfig], Callable[[], TextReward]] = {}
    match config:
        case FunctionRewardConfig():
            return FunctionReward(config)
        case CheckerRewardConfig():
            return CheckerReward(config)
        case _:
            raise AssertionError(f"{config} is no reward over text; it is one of {builders}")
