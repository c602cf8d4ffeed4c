"""What a resume asks of its data and of the models that it stands on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.source import SourceDescription
from algorithms.kl import KLController
from data.build import Counts
from experience.ledger import Ledger
from launch.config import OnlineRunConfig
from launch.configfile import load
from launch.errors import CheckpointError
from launch.online_state import OnlineState
from launch.reference_pass import kept_as
from launch.resuming import require_same_data, require_same_models
from tests.launch.test_online_driver import Run

EXAMPLES = Path(__file__).parents[2] / "examples"


def described(fingerprint: str) -> SourceDescription:
    return SourceDescription(
        kind="prompts",
        num_rows=3,
        num_heldout_rows=0,
        num_rows_in_all=3,
        num_sequences=3,
        num_heldout_sequences=0,
        num_tokens=9,
        longest=3,
        longest_row=3,
        most_responses=1,
        num_heldout_learnt=0,
        num_heldout_bytes=0,
        counts=(Counts("a.jsonl", read=3, train=3),),
        fingerprint=fingerprint,
        digest="d",
        first_cursor="{}",
    )


def test_a_resume_needs_the_data_it_began_with() -> None:
    require_same_data("abc", described("abc"), Path("step-2"))
    with pytest.raises(CheckpointError, match=r"the data are not those of step-2: .*a\.jsonl: 3 rows read"):
        require_same_data("abc", described("abd"), Path("step-2"))


def test_a_resume_needs_the_models_it_began_with() -> None:
    """A base or a reference that has changed is named, with its place; so is an adapter that is there no more."""
    config = load(EXAMPLES / "dpo.yaml", ["learner.model.path=/models/one", "learner.tuning.method=lora"])
    saved = {"learner": "a" * 32, "reference": "b" * 32}
    checkpoint = Path("step-2")
    require_same_models(saved, dict(saved), config, checkpoint)
    with pytest.raises(CheckpointError, match=r"the base of the adapter of learner .*step-2 .*path \(/models/one\)"):
        require_same_models(saved, saved | {"learner": "c" * 32}, config, checkpoint)
    with pytest.raises(CheckpointError, match=r"the reference .*learner\.model\.path.*bbbbbbbbbbbb then, cccc"):
        require_same_models(saved, saved | {"reference": "c" * 32}, config, checkpoint)
    with pytest.raises(CheckpointError, match=r"with an adapter, and learner\.tuning\.method now asks for none"):
        require_same_models(saved, {"reference": "b" * 32}, config, checkpoint)
    with pytest.raises(CheckpointError, match=r"trained with no adapter, .* asks for one"):
        require_same_models({}, saved, config, checkpoint)
    # Whether there is a reference is the configuration's to say.
    require_same_models({"learner": "a" * 32}, saved, config, checkpoint)


async def test_a_resume_has_the_kl_coefficient_that_was_steered_to_or_the_one_that_was_changed(tmp_path: Path) -> None:
    """A fixed one is the configuration's. One that was steered goes on, unless where steering begins was changed."""
    run = Run(tmp_path, "dr_grpo", lambda prompt: False)
    nothing: Any = {"version": 1, "batch_rows": 8, "chunks": []}

    def told(kl: str) -> OnlineRunConfig:
        config = load(EXAMPLES / "ppo.yaml", [f"algorithm.kl={{{kl}}}"])
        assert isinstance(config, OnlineRunConfig)
        return config

    async def resumed(before: str, steered: float, now: str) -> float:
        begun = told(before)
        kl = begun.algorithm.kl
        state = OnlineState(
            begun, run.store, iteration=1, cursor="0", fingerprint="", ledger=Ledger(),
            kl=KLController(steered, kl.target, kl.horizon_samples),
        )
        await state.save(run.roles, nothing, [])
        found = OnlineState.read(told(now), run.store, run.store.latest() or tmp_path)
        return found.kl.coefficient

    fixed, steering = "coefficient: 0.1", "coefficient: 0.1, target: 6"
    assert await resumed(fixed, 0.1, fixed) == 0.1
    assert await resumed(fixed, 0.1, "coefficient: 0.2") == 0.2
    assert await resumed(steering, 0.07, steering) == 0.07
    assert await resumed(steering, 0.07, "coefficient: 0.1, target: 9") == 0.07
    assert await resumed(steering, 0.07, "coefficient: 0.2, target: 6") == 0.2
    assert await resumed(steering, 0.07, fixed) == 0.1
    assert await resumed(fixed, 0.1, "coefficient: 0.2, target: 6") == 0.2


def test_what_is_kept_of_a_reference_is_of_data_model_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = described("abc")
    feedback = replace(comparisons, kind="feedback")
    names = {kept_as(comparisons, "m full"), kept_as(comparisons, "n full"), kept_as(feedback, "m full")}
    names.add(kept_as(replace(comparisons, digest="e"), "m full"))
    assert len(names) == 4
    monkeypatch.setattr("launch.reference_pass.MISMATCH_VERSION", 0)
    assert kept_as(comparisons, "m full") in names
    assert kept_as(feedback, "m full") not in names
    monkeypatch.setattr("launch.reference_pass.SCORING_VERSION", 0)
    assert kept_as(comparisons, "m full") not in names
