"""What a run must know of an online algorithm without running it. Imports no torch: configurations are checked by it.

What each does is in ``algorithms.bundles``, under the same name. An algorithm of one's own is named by where it is,
``my_module:MY_ALGORITHM``: a ``bundles.Algorithm``, which carries its own ``Needs``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from algorithms.errors import AlgorithmError

Baseline = Literal["none", "greedy", "initial"]

#: Keys of ``algorithm`` that only some algorithms read; those of a critic are read by whoever needs one.
KEYS_OF_SOME = frozenset({"gamma", "whiten_advantages", "whiten_rewards"})
KEYS_OF_A_CRITIC = frozenset({"gae_lambda", "clip_value", "critic_warmup_iterations"})


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs of a run.

    Attributes:
        critic: values of every prefix; without it the run has no critic.
        groups: several samples of each prompt, whose scores are compared.
        baseline: one more response to each prompt, whose score the others are compared with: the policy's most
            probable one (``greedy``), or one of the model that the run began with (``initial``).
        keys: those of ``KEYS_OF_SOME`` that it reads; others are refused where they are changed.
        defaults: keys of ``algorithm`` whose default is another for it, nested as in the YAML.
    """

    critic: bool = False
    groups: bool = False
    baseline: Baseline = "none"
    keys: frozenset[str] = KEYS_OF_SOME
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unread_keys(self) -> frozenset[str]:
        """Keys of ``algorithm`` that mean nothing to it."""
        return (KEYS_OF_SOME - self.keys) | (frozenset() if self.critic else KEYS_OF_A_CRITIC)


_NONE: frozenset[str] = frozenset()
_WHITENED = frozenset({"whiten_advantages"})

#: The algorithms that are there. Sources: with their functions, in ``algorithms.bundles``.
BUILT_IN: Mapping[str, Needs] = {
    "ppo": Needs(critic=True, defaults={"whiten_advantages": True}),
    "grpo": Needs(
        groups=True,
        keys=_NONE,
        defaults={"normalise": "sequences", "kl": {"placement": "loss", "coefficient": 0.04}},
    ),
    "turn_grpo": Needs(
        groups=True,
        keys=frozenset({"gamma"}),
        defaults={"normalise": "sequences", "kl": {"placement": "loss", "coefficient": 0.04}},
    ),
    # Without a KL penalty; where one is asked for it is GRPO's, whatever the reference is.
    "dr_grpo": Needs(
        groups=True,
        keys=_NONE,
        defaults={"normalise": "constant", "kl": {"placement": "loss", "coefficient": 0.0}},
    ),
    "rloo": Needs(groups=True, keys=_WHITENED),
    "reinforce_plus_plus": Needs(keys=frozenset({"gamma", "whiten_rewards"})),
    "reinforce_plus_plus_baseline": Needs(
        groups=True, keys=_NONE, defaults={"kl": {"placement": "loss", "estimator": "k2"}}
    ),
    "remax": Needs(baseline="greedy", keys=_WHITENED),
    "initial_baseline": Needs(baseline="initial", keys=_WHITENED),
}


def needs_of(name: str) -> Needs:
    """What the algorithm of this name needs.

    Raises:
        AlgorithmError: there is none, or what stands under an import path is no ``Algorithm``.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    needs = getattr(imported(name), "needs", None)
    if not isinstance(needs, Needs):
        raise AlgorithmError(f"{name} is no algorithm; it must be an algorithms.bundles.Algorithm")
    return needs


def imported(name: str) -> object:
    """What stands at ``my_module:NAME``.

    Raises:
        AlgorithmError: this is no import path, the module cannot be imported, or has nothing of that name.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(BUILT_IN)
        raise AlgorithmError(f"there is no algorithm {name!r}; one of {known}, or your own as my_module:MY_ALGORITHM")
    try:
        found: object = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise AlgorithmError(
            f"{name}: module {module} cannot be imported ({error}); it must be installed, or on PYTHONPATH, wherever "
            "roles run"
        ) from error
    if found is None:
        raise AlgorithmError(f"{name}: module {module} has no {attribute}")
    return found
