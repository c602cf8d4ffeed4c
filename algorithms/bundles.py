"""Online algorithms, each a small frozen bundle: how credit is assigned, which loss, and what it needs of a run.

Nothing else knows of them: the credit role calls the one function, the policy the other, and rules and driver read
``needs``. To add one is to write a credit function, and a bundle (docs/algorithms.md does).

Legend: N samples, T their response tokens laid end to end; ``offsets`` (N+1,) int64 are where samples begin and end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor

from algorithms import group_advantages
from algorithms.advantages import gae
from algorithms.config import OnlineConfig
from algorithms.errors import AlgorithmError
from algorithms.losses import Loss
from algorithms.needs import BUILT_IN, Needs, imported
from algorithms.packed import sample_sums, spread
from algorithms.policy_losses import (
    cispo_loss,
    clip_higher_loss,
    dual_clip_loss,
    gspo_loss,
    gspo_token_loss,
    reinforce_loss,
)


@dataclass(frozen=True)
class CreditInputs:
    """The whole global batch, in float64 on the CPU.

    Attributes:
        rewards_T: the shaped score on each sample's last token, what an environment gave on the last token of each
            turn, and, where the KL is part of the reward, its penalty on
            every token.
        group_ids_N: the prompt of each sample.
        values_T: by the critic; none without one.
        baseline_scores_N: shaped score of the baseline's response to the same prompt; none without one.
        turn_offsets: (U+1,), where turns begin and end among the T tokens; none where each sample is one turn.
    """

    rewards_T: Tensor
    offsets: Tensor
    group_ids_N: Tensor
    values_T: Tensor | None
    baseline_scores_N: Tensor | None
    gamma: float
    gae_lambda: float
    turn_offsets: Tensor | None = None

    @property
    def sample_rewards_N(self) -> Tensor:
        """Each sample's reward, summed over its tokens."""
        return sample_sums(self.rewards_T, self.offsets)

    def on_tokens(self, advantages_N: Tensor) -> Tensor:
        """Each sample's advantage on all of its tokens, (T,)."""
        return spread(advantages_N, self.offsets)

    @property
    def values(self) -> Tensor:
        """``values_T``, which are there.

        Raises:
            AlgorithmError: the run has no critic.
        """
        if self.values_T is None:
            raise AlgorithmError("this algorithm needs a critic's values: say so in its Needs")
        return self.values_T

    @property
    def baselines(self) -> Tensor:
        """``baseline_scores_N``, which are there.

        Raises:
            AlgorithmError: the run draws no baseline.
        """
        if self.baseline_scores_N is None:
            raise AlgorithmError("this algorithm needs the score of a baseline: say so in its Needs")
        return self.baseline_scores_N


class Bounds(TypedDict):
    """How far below and above 1 a ratio may be."""

    clip_low: float
    clip_high: float


@dataclass(frozen=True)
class LossInputs:
    """A micro-batch of whole samples.

    Attributes:
        weights_T: how the loss is normalised, times what credit assignment weighs tokens with.
        denominator: response tokens of the whole minibatch.
    """

    policy_logprobs_T: Tensor
    behaviour_logprobs_T: Tensor
    advantages_T: Tensor
    offsets: Tensor
    weights_T: Tensor
    denominator: float
    config: OnlineConfig

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, those to divide by, and advantages: what each loss begins with."""
        return self.policy_logprobs_T, self.behaviour_logprobs_T, self.advantages_T

    @property
    def bounds(self) -> Bounds:
        """As configured, or the loss's own."""
        low, high = self.config.clip_bounds
        return {"clip_low": low, "clip_high": high}


#: Gives advantages (T,) and, with a critic, the returns (T,) that it learns.
CreditFunction = Callable[[CreditInputs], tuple[Tensor, Tensor | None]]
PolicyLoss = Callable[[LossInputs], Loss]


def configured_loss(inputs: LossInputs) -> Loss:
    """The loss that ``algorithm.policy_loss`` names."""
    return POLICY_LOSSES[inputs.config.policy_loss](inputs)


@dataclass(frozen=True)
class Algorithm:
    """An online algorithm.

    Attributes:
        credit: pure: columns of the whole batch to advantages and returns.
        needs: of the run.
        loss: pure: of a micro-batch. KL and entropy terms are added to it where they are configured.
    """

    credit: CreditFunction
    needs: Needs = field(default_factory=Needs)
    loss: PolicyLoss = configured_loss


def algorithm_of(name: str) -> Algorithm:
    """The algorithm of this name, or at this import path.

    Raises:
        AlgorithmError: there is none.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    found = imported(name)
    if not isinstance(found, Algorithm):
        raise AlgorithmError(f"{name} is no algorithm; it must be an algorithms.bundles.Algorithm")
    return found


def _ppo(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    """Generalised advantages (Schulman et al. 2016)."""
    return gae(inputs.rewards_T, inputs.values, inputs.offsets, inputs.gamma, inputs.gae_lambda)


def _grpo(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    return inputs.on_tokens(group_advantages.grpo(inputs.sample_rewards_N, inputs.group_ids_N)), None


def _turn_grpo(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    turn_offsets = inputs.offsets if inputs.turn_offsets is None else inputs.turn_offsets
    return group_advantages.turn_grpo(
        inputs.rewards_T, turn_offsets, inputs.offsets, inputs.group_ids_N, gamma=inputs.gamma
    ), None


def _dr_grpo(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    return inputs.on_tokens(group_advantages.dr_grpo(inputs.sample_rewards_N, inputs.group_ids_N)), None


def _rloo(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    return inputs.on_tokens(group_advantages.rloo(inputs.sample_rewards_N, inputs.group_ids_N)), None


def _reinforce_plus_plus(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    return group_advantages.reinforce_plus_plus(inputs.rewards_T, inputs.offsets, gamma=inputs.gamma), None


def _reinforce_plus_plus_baseline(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    rewards_N = inputs.sample_rewards_N
    return group_advantages.reinforce_plus_plus_baseline(rewards_N, inputs.group_ids_N, inputs.offsets), None


def _remax(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    return inputs.on_tokens(group_advantages.remax(inputs.sample_rewards_N, inputs.baselines)), None


def _initial_baseline(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    return inputs.on_tokens(group_advantages.score_difference(inputs.sample_rewards_N, inputs.baselines)), None


#: Sources are with the estimators, in ``group_advantages`` and ``advantages``.
ALGORITHMS: Mapping[str, Algorithm] = {
    "ppo": Algorithm(_ppo, BUILT_IN["ppo"]),
    "grpo": Algorithm(_grpo, BUILT_IN["grpo"]),
    "turn_grpo": Algorithm(_turn_grpo, BUILT_IN["turn_grpo"]),
    "dr_grpo": Algorithm(_dr_grpo, BUILT_IN["dr_grpo"]),
    "rloo": Algorithm(_rloo, BUILT_IN["rloo"]),
    "reinforce_plus_plus": Algorithm(_reinforce_plus_plus, BUILT_IN["reinforce_plus_plus"]),
    "reinforce_plus_plus_baseline": Algorithm(
        _reinforce_plus_plus_baseline, BUILT_IN["reinforce_plus_plus_baseline"]
    ),
    "remax": Algorithm(_remax, BUILT_IN["remax"]),
    "initial_baseline": Algorithm(_initial_baseline, BUILT_IN["initial_baseline"]),
}


def _clip(inputs: LossInputs) -> Loss:
    return clip_higher_loss(*inputs.tokens, **inputs.bounds, weights_T=inputs.weights_T, denominator=inputs.denominator)


def _dual_clip(inputs: LossInputs) -> Loss:
    return dual_clip_loss(
        *inputs.tokens,
        **inputs.bounds,
        clip_dual=inputs.config.clip_dual,
        weights_T=inputs.weights_T,
        denominator=inputs.denominator,
    )


def _gspo(inputs: LossInputs) -> Loss:
    return gspo_loss(
        *inputs.tokens, inputs.offsets, **inputs.bounds, weights_T=inputs.weights_T, denominator=inputs.denominator
    )


def _gspo_token(inputs: LossInputs) -> Loss:
    return gspo_token_loss(
        *inputs.tokens, inputs.offsets, **inputs.bounds, weights_T=inputs.weights_T, denominator=inputs.denominator
    )


def _cispo(inputs: LossInputs) -> Loss:
    return cispo_loss(*inputs.tokens, **inputs.bounds, weights_T=inputs.weights_T, denominator=inputs.denominator)


def _reinforce(inputs: LossInputs) -> Loss:
    return reinforce_loss(*inputs.tokens, weights_T=inputs.weights_T, denominator=inputs.denominator)


POLICY_LOSSES: Mapping[str, PolicyLoss] = {
    "clip": _clip,
    "dual_clip": _dual_clip,
    "gspo": _gspo,
    "gspo_token": _gspo_token,
    "cispo": _cispo,
    "reinforce": _reinforce,
}
