"""What can go wrong in a role: one tree of errors."""

from __future__ import annotations


class RoleError(RuntimeError):
    """Base of every error that a role raises by itself."""


class ModelError(RoleError):
    """A model or tokenizer cannot be loaded, or is not of the kind that the role needs."""


class TrainingDiverged(RoleError):
    """A loss or a gradient is not a finite number; the update it would have made was not applied."""


class RewardError(RoleError):
    """A reward cannot score anything as it is configured: a function, a file or a column is missing."""


class RolloutError(RoleError):
    """A prompt that cannot be answered, an engine that cannot start, or one that may not answer."""


class EngineDead(RolloutError):
    """The engine cannot generate any more: its process died, or an update failed half way."""
