"""The bundles: what they need, what the configuration makes of it, and that each name leads to its own functions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from algorithms import policy_losses
from algorithms.bundles import ALGORITHMS, POLICY_LOSSES, Algorithm, CreditInputs, LossInputs, algorithm_of
from algorithms.config import CorrectionConfig, KLConfig, OnlineConfig, PolicyLossName
from algorithms.errors import AlgorithmError
from algorithms.needs import BUILT_IN, Needs, needs_of

OWN = Algorithm(lambda inputs: (inputs.rewards_T, None), Needs(groups=True, defaults={"normalise": "constant"}))
HERE = f"{__name__}:OWN"


def refused(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        OnlineConfig(**changes)
    return str(caught.value)


def test_what_is_built_in_is_said_once() -> None:
    assert ALGORITHMS.keys() == BUILT_IN.keys()
    assert all(ALGORITHMS[name].needs is needs for name, needs in BUILT_IN.items())
    assert POLICY_LOSSES.keys() == set(get_args(PolicyLossName))


def test_needs_are_read_without_torch() -> None:
    program = "import sys, algorithms.config, algorithms.needs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_defaults_are_the_algorithms_own_and_what_is_said_stays() -> None:
    assert OnlineConfig().whiten_advantages and OnlineConfig().normalise == "tokens"
    grpo = OnlineConfig(name="grpo")
    assert (grpo.normalise, grpo.kl.placement, grpo.kl.coefficient, grpo.kl.estimator_used) == (
        "sequences", "loss", 0.04, "k3"
    )
    assert not grpo.whiten_advantages
    changed = OnlineConfig.model_validate({"name": "grpo", "kl": {"coefficient": 0.5}, "normalise": "tokens"})
    assert (changed.kl.placement, changed.kl.coefficient, changed.normalise) == ("loss", 0.5, "tokens")
    assert OnlineConfig(name="dr_grpo").kl.coefficient == 0
    with_kl = OnlineConfig.model_validate({"name": "dr_grpo", "kl": {"coefficient": 0.1}})
    assert (with_kl.kl.placement, with_kl.kl.in_loss, with_kl.kl.estimator_used) == ("loss", True, "k3")
    for name in BUILT_IN:
        config = OnlineConfig(name=name)
        assert OnlineConfig.model_validate(config.model_dump()) == config


def test_an_estimator_is_the_default_of_its_placement() -> None:
    """k2 is for the gradient of REINFORCE++ with baseline; a number in the reward is k1, as everywhere."""
    name = "reinforce_plus_plus_baseline"
    assert OnlineConfig(name=name).kl.estimator_used == "k2"
    kl: Any
    for kl in ({"placement": "reward"}, KLConfig(placement="reward")):
        in_reward = OnlineConfig.model_validate({"name": name, "kl": kl})
        assert (in_reward.kl.placement, in_reward.kl.estimator_used) == ("reward", "k1")
        assert OnlineConfig.model_validate(in_reward.model_dump()) == in_reward
    for kl in ({"coefficient": 0.1}, KLConfig(coefficient=0.1), {"placement": "loss"}):
        in_loss = OnlineConfig.model_validate({"name": name, "kl": kl})
        assert (in_loss.kl.placement, in_loss.kl.estimator_used) == ("loss", "k2")
    assert OnlineConfig.model_validate({"kl": {"placement": "loss", "estimator": "k1"}}).kl.estimator_used == "k1"
    said = OnlineConfig.model_validate({"name": name, "kl": {"placement": "reward", "estimator": "k2"}})
    assert said.kl.estimator_used == "k2"


@pytest.mark.parametrize("name", BUILT_IN)
def test_keys_that_mean_nothing_are_refused_where_they_are_changed(name: str) -> None:
    changes = {"gamma": 0.9, "gae_lambda": 0.5, "clip_value": None, "critic_warmup_iterations": 2}
    unread = BUILT_IN[name].unread_keys
    for key, value in changes.items():
        if key in unread:
            assert f"{key} means nothing to {name}; leave it out" in refused(name=name, **{key: value})
        else:
            OnlineConfig.model_validate({"name": name, key: value})
    OnlineConfig.model_validate({"name": name, "gamma": 1.0, "clip_value": 0.2})
    if "whiten_rewards" in unread:
        assert f"whiten_rewards means nothing to {name}" in refused(name=name, whiten_rewards=True)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"name": "gppo"}, "there is no algorithm 'gppo'; one of ppo, grpo"),
        ({"clip_dual": 2.0}, "clip_dual belongs to policy_loss dual_clip, not to clip"),
        ({"policy_loss": "cispo"}, "policy_loss cispo needs clip_high"),
        ({"policy_loss": "reinforce", "clip_low": 0.1}, "no ratio to clip"),
        ({"correction": {"method": "truncated", "low": 0.1}}, "low belongs to masked and sequence_masked"),
        ({"correction": {"cap": 3.0}}, "cap belongs to truncated, decoupled and sequence_masked, not to none"),
        ({"correction": {"method": "masked", "cap": 3.0}}, "cap belongs to truncated, decoupled and sequence_masked"),
        ({"correction": {"method": "decoupled", "high": 3.0}}, "high belongs to masked and sequence_masked"),
        ({"correction": {"method": "masked", "low": 6.0}}, "low 6 is above 1"),
        ({"correction": {"method": "sequence_masked", "low": 1.0005}}, "low 1.0005 is above 1"),
        ({"correction": {"method": "sequence_masked", "high": 0.9995}}, "high 0.9995 is below 1"),
        ({"correction": {"method": "masked", "low": 1.0, "high": 1.0}}, "low 1 is not below high 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], what: str) -> None:
    assert what in refused(**changes)


def test_bounds() -> None:
    assert OnlineConfig().clip_bounds == (0.2, 0.2)
    assert OnlineConfig(clip_ratio=0.1).clip_bounds == (0.1, 0.1)
    assert OnlineConfig(clip_high=0.28).clip_bounds == (0.2, 0.28)
    assert OnlineConfig(policy_loss="gspo").clip_bounds == (3e-4, 4e-4)
    assert OnlineConfig(policy_loss="cispo", clip_high=4.0).clip_bounds == (1.0, 4.0)


def test_bounds_of_a_correction() -> None:
    """A geometric mean over a sample stays far nearer to 1 than a token's k."""

    def bounds(**correction: Any) -> tuple[float, float]:
        return OnlineConfig.model_validate({"correction": correction}).correction.bounds

    assert bounds(method="masked") == (0.5, 5.0)
    assert bounds(method="sequence_masked") == (0.999, 1.001)
    assert bounds(method="sequence_masked", low=0.99) == (0.99, 1.001)
    assert bounds(method="masked", low=0.0, high=2.0) == (0.0, 2.0)
    again = CorrectionConfig.model_validate(CorrectionConfig(method="sequence_masked").model_dump())
    assert again.bounds == (0.999, 1.001)


def test_a_correction_has_log_probs_recomputed() -> None:
    assert not OnlineConfig().recomputes_logprobs
    assert OnlineConfig.model_validate({"correction": {"method": "truncated"}}).recomputes_logprobs


def test_ones_own_by_its_import_path() -> None:
    config = OnlineConfig(name=HERE)
    assert config.needs is OWN.needs and config.normalise == "constant"
    assert algorithm_of(HERE) is OWN
    config = OnlineConfig(name=HERE, gamma=0.5)  # it may read any key that it does not disown
    assert config.gamma == 0.5
    for path, why in {
        "no_such_module:X": "module no_such_module cannot be imported",
        "math:X": "module math has no X",
        "math:pi": "math:pi is no algorithm; it must be an algorithms.bundles.Algorithm",
    }.items():
        assert why in refused(name=path)
        with pytest.raises(AlgorithmError, match=why):
            algorithm_of(path)
    with pytest.raises(AlgorithmError, match="no algorithm"):
        needs_of("x:")


def test_what_an_algorithm_lacks_is_said() -> None:
    nothing = torch.zeros(0)
    inputs = CreditInputs(nothing, torch.tensor([0]), nothing.long(), None, None, 1.0, 1.0)
    with pytest.raises(AlgorithmError, match="needs a critic's values"):
        ALGORITHMS["ppo"].credit(inputs)
    for name in ("remax", "initial_baseline"):
        with pytest.raises(AlgorithmError, match="needs the score of a baseline"):
            ALGORITHMS[name].credit(inputs)


@pytest.mark.parametrize("name", get_args(PolicyLossName))
def test_each_policy_loss_is_the_one_of_its_name(name: PolicyLossName) -> None:
    source = torch.Generator().manual_seed(3)
    policy, behaviour, advantages, weights = torch.randn(4, 9, generator=source, dtype=torch.float64)
    offsets = torch.tensor([0, 4, 9])
    bounds = {} if name == "reinforce" else {"clip_low": 0.1, "clip_high": 0.3}
    config = OnlineConfig.model_validate({"policy_loss": name, **bounds})
    inputs = LossInputs(policy, behaviour, advantages, offsets, weights, 9.0, config)
    function = getattr(policy_losses, f"{'clip_higher' if name == 'clip' else name}_loss")
    sequence = (offsets,) if name.startswith("gspo") else ()
    expected = function(policy, behaviour, advantages, *sequence, **bounds, weights_T=weights, denominator=9.0)
    loss, metrics = OWN.loss(inputs)
    assert torch.equal(loss, expected[0])
    assert metrics.keys() == expected[1].keys()
