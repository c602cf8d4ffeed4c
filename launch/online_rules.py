"""Rules between an online algorithm and the rest of its run: roles, samples. Imports no torch.

What an algorithm needs is its own to say (``algorithms.needs``): no rule here knows one by its name.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from actors.config import CriticConfig, PolicyConfig, ReferenceConfig, RolloutConfig
from algorithms.config import OnlineConfig, PretrainingMixConfig
from data.config import DataConfig
from launch.errors import Problem
from launch.fields import dotted, required
from launch.settings import OnlineSettings


def critic_where_needed(algorithm: OnlineConfig, critic: CriticConfig | None) -> Iterator[Problem]:
    """A critic is there exactly where the algorithm learns from values."""
    if algorithm.needs.critic and critic is None:
        yield _missing("critic", CriticConfig, algorithm.name, "the model that estimates what a prefix is worth")
    elif critic is not None and not algorithm.needs.critic:
        yield Problem(
            "critic", f"{algorithm.name} learns without a critic", "remove the section, or set algorithm.name to ppo"
        )


def reference_where_needed(
    algorithm: OnlineConfig, policy: PolicyConfig, reference: ReferenceConfig | None
) -> Iterator[Problem]:
    """A KL penalty has one reference: the role, the policy with its adapter off, or the policy's moving average."""
    if policy.ema_is_reference:
        if reference is not None:
            yield Problem(
                "reference",
                "policy.ema_is_reference makes the policy's moving average the reference, and there is one",
                "remove the section, or policy.ema_is_reference",
            )
        return
    if reference is None and algorithm.kl.coefficient > 0 and not policy.tuning.has_adapter:
        problem = _missing(
            "reference",
            ReferenceConfig,
            f"algorithm.kl.coefficient {algorithm.kl.coefficient:g}",
            "the model that the policy is held close to",
        )
        yield Problem(problem.where, problem.what, f"{problem.right}; or set algorithm.kl.coefficient to 0")


def baseline_where_needed(
    algorithm: OnlineConfig, rollout: RolloutConfig, baseline: RolloutConfig | None
) -> Iterator[Problem]:
    """Engines with the initial weights are there exactly where the algorithm compares with them, and answer once."""
    initial = algorithm.needs.baseline == "initial"
    if initial and baseline is None:
        yield _missing("baseline", RolloutConfig, algorithm.name, "engines that keep the initial weights")
    elif baseline is not None and not initial:
        yield Problem(
            "baseline", f"{algorithm.name} compares with no initial model", "remove the section, or initial_baseline"
        )
    elif baseline is not None and baseline.sampling.samples_per_prompt != 1:
        number = baseline.sampling.samples_per_prompt
        yield Problem("baseline.sampling.samples_per_prompt", f"{number}, and one response is the baseline", "1")
    elif baseline is not None and baseline.sampling.max_response_tokens > rollout.sampling.max_response_tokens:
        longest = rollout.sampling.max_response_tokens
        yield Problem(
            "baseline.sampling.max_response_tokens",
            f"{baseline.sampling.max_response_tokens} is more than the policy's own, {longest}",
            f"{longest}, so that the two are scored alike",
        )


def environment_suits(
    algorithm: OnlineConfig, rollout: RolloutConfig, baseline: RolloutConfig | None
) -> Iterator[Problem]:
    """Episodes are compared with each other and with no baseline; a turn fits into one."""
    if baseline is not None and baseline.environment is not None:
        yield Problem("baseline.environment", "a baseline is one response", "leave it out")
    if (environment := rollout.environment) is None:
        return
    if algorithm.needs.baseline != "none":
        what = f"{algorithm.name} compares with one more response to the prompt, and an environment gives episodes"
        yield Problem("rollout.environment", what, "another algorithm, or no environment")
    if rollout.sampling.max_response_tokens >= environment.max_tokens and environment.max_turns > 1:
        longest = rollout.sampling.max_response_tokens
        yield Problem(
            "rollout.environment.max_tokens",
            f"{environment.max_tokens} is no more than one turn, rollout.sampling.max_response_tokens = {longest}",
            "room for max_turns turns and what the environment says between them",
        )


def groups_where_needed(algorithm: OnlineConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """What compares the samples of a prompt has several."""
    if algorithm.needs.groups and rollout.sampling.samples_per_prompt < 2:
        yield Problem(
            "rollout.sampling.samples_per_prompt",
            f"1, and {algorithm.name} compares several responses to a prompt",
            "2 or more, usually 8",
        )


def redrawn_prompts_have_groups(online: OnlineSettings, rollout: RolloutConfig) -> Iterator[Problem]:
    """Whether the samples of a prompt differ can be asked of several."""
    if online.max_redraws and rollout.sampling.samples_per_prompt < 2:
        yield Problem(
            "online.max_redraws",
            f"{online.max_redraws}, but with one response to a prompt no prompt has two scores that differ",
            "0, or rollout.sampling.samples_per_prompt of 2 or more",
        )


def age_is_corrected_for(online: OnlineSettings, algorithm: OnlineConfig) -> Iterator[Problem]:
    """What is divided by the policy of before training, and not by the one that drew it, has a weight between them."""
    if online.max_staleness and algorithm.recompute_logprobs and algorithm.correction.method == "none":
        yield Problem(
            "algorithm.recompute_logprobs",
            f"the recomputed log-probs are of the weights that training starts from, and with online.max_staleness = "
            f"{online.max_staleness} older ones drew the samples: nothing would make up for the difference",
            "an algorithm.correction.method (truncated), or false: the ratio is then to who drew each token",
        )


def whole_distribution_is_drawn_from(algorithm: OnlineConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """The ratio and the KL compare log-probs of the same distribution."""
    sampling = rollout.sampling
    cut = {"top_p": (sampling.top_p, 1), "top_k": (sampling.top_k, 0)}
    for key, (value, whole) in cut.items():
        if value != whole and not algorithm.recomputes_logprobs:
            yield Problem(
                f"rollout.sampling.{key}",
                f"{value:g}: the engine's log-probs are then of what this leaves of the distribution, those of policy "
                "and reference of all of it, so the ratio would not begin at 1, nor the KL at 0",
                f"{whole}; or algorithm.recompute_logprobs, or better an algorithm.correction.method",
            )


def nothing_drops_out(policy: PolicyConfig, critic: CriticConfig | None) -> Iterator[Problem]:
    """What an update computes, scoring has computed too, but for what was learnt in between."""
    for name, role in (("policy", policy), ("critic", critic)):
        if role is not None and role.tuning.lora.dropout:
            yield Problem(
                f"{name}.tuning.lora.dropout",
                f"{role.tuning.lora.dropout:g} drops in updates and not in scoring: log-probs and values of the same "
                "weights would differ, and the ratio would not begin at 1",
                "0",
            )


def pretraining_fits(
    algorithm: OnlineConfig, policy: PolicyConfig, pretraining_data: DataConfig | None
) -> Iterator[Problem]:
    """Pre-training text is there where its mixture is configured, and its longest sequence fits one pack."""
    if pretraining_data is None:
        if algorithm.pretraining != PretrainingMixConfig():
            yield Problem("algorithm.pretraining", "is set, and there is no text to mix in", "add pretraining_data")
        return
    longest, budget = pretraining_data.max_tokens, policy.max_tokens_per_pack
    if longest > budget:
        yield Problem(
            "policy.max_tokens_per_pack",
            f"{budget} is less than the longest sequence, pretraining_data.max_tokens = {longest}",
            f"at least {longest}",
        )
    if pretraining_data.keep_columns:
        yield Problem("pretraining_data.keep_columns", "are what rewards are given, and text gets none", "leave it out")


def _missing(role: str, section: type[BaseModel], who: str, purpose: str) -> Problem:
    least = ", ".join(dotted((role, *key)) for key in required(section))
    what = f"the section is missing, and {who} needs it ({purpose})"
    return Problem(role, what, f"add it with at least {least}")


ROLE_RULES = (
    critic_where_needed,
    reference_where_needed,
    baseline_where_needed,
    environment_suits,
    groups_where_needed,
    redrawn_prompts_have_groups,
    age_is_corrected_for,
    whole_distribution_is_drawn_from,
    nothing_drops_out,
    pretraining_fits,
)
