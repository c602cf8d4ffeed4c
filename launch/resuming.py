"""What a resume asks: that data and models are still those that the checkpoint was made with.

A checkpoint holds what was trained. What an adapter stands on, what the learner is compared with, and the initial model
that a baseline answers with, it names by digests (see ``actors.identity``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actors.source import SourceDescription
from launch.config import BaseRunConfig
from launch.errors import CheckpointError

#: The role whose model others are compared with; the other roles are trained, and named where they have an adapter.
REFERENCE = "reference"
#: The role whose engines keep the weights that the policy begins with, which a resume reads anew.
BASELINE = "baseline"


def require_same_data(fingerprint: str, description: SourceDescription, checkpoint: Path) -> None:
    """Refuse to go on where the cursor of a checkpoint would mean other rows.

    Raises:
        CheckpointError: the data are not those that the checkpoint was made with.
    """
    if description.fingerprint != fingerprint:
        sources = "; ".join(str(counts) for counts in description.counts)
        raise CheckpointError(
            f"the data are not those of {checkpoint}: rows, order, tokenizer, data.* or run.seed have changed (now "
            f"{sources}); give back what was there, or start a new run"
        )


def require_same_models(
    saved: Mapping[str, str], found: Mapping[str, str], config: BaseRunConfig, checkpoint: Path
) -> None:
    """Refuse to go on upon another base, or compared with another reference.

    Args:
        saved: digests of the models that the checkpoint was made with, by role: of the reference, of the initial
            model that a baseline answers with, and of the base of each trained role that has an adapter.
        found: of those that there are now.

    Raises:
        CheckpointError: a model is another one now, or a trained role had an adapter and has none, or the reverse.
    """
    for role in sorted(saved.keys() | found.keys()):
        require_same_model(role, saved.get(role), found.get(role), config, checkpoint)


def require_same_model(role: str, before: str | None, now: str | None, config: BaseRunConfig, checkpoint: Path) -> None:
    """As ``require_same_models``, of one role.

    Raises:
        CheckpointError: as there.
    """
    if before == now or (role in (REFERENCE, BASELINE) and None in (before, now)):
        return
    if before is None or now is None:
        had, wanted = ("an adapter", "none") if now is None else ("no adapter", "one")
        raise CheckpointError(
            f"{checkpoint}: {role} was trained with {had}, and {role}.tuning.method now asks for {wanted}; set it "
            "back, or start a new run"
        )
    section = "policy" if role == BASELINE else role
    if getattr(config, section, None) is None:  # a learner that refers to its own start has no section `reference`
        section = "learner"
    path = getattr(config, section).model.path
    compared = {REFERENCE: "the reference", BASELINE: "the initial model, which baseline answers with,"}
    what = compared.get(role, f"the base of the adapter of {role}")
    raise CheckpointError(
        f"{what} is not the one that {checkpoint} was made with: what is at {section}.model.path ({path}) has changed "
        f"since, or its dtype, attention or tuning.method has (digest {before[:12]} then, {now[:12]} now); give back "
        "what was there, or start a new run"
    )
