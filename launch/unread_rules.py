"""The rules that refuse keys which a run would not read, where they are set to anything else than what holds anyway.

Imports no torch. Who reads a key is said once, here; ``launch.rules`` puts these rules among those of each kind of run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actors.config import ScorerConfig
from algorithms.config import LearningConfig, OnlineConfig, RewardModelConfig
from data.config import DataConfig, SourceConfig
from launch.errors import Problem
from launch.settings import NormaliseSettings, RunSettings

#: Keys of data that one way of learning reads, by its ``algorithm.name``, and how that is called.
_READ_BY_ONE = {"learn_from": ("sft", "SFT"), "documents": ("pretrain", "pre-training")}


def columns_are_of_prompts(data: DataConfig) -> Iterator[Problem]:
    """Rewards alone are given further columns, and prompts alone get rewards."""
    if data.keep_columns:
        yield Problem("data.keep_columns", "are what rewards are given, and this run has none", "leave it out")


def experience_is_generated(run: RunSettings) -> Iterator[Problem]:
    """What learns from a data set generates nothing."""
    if run.keep_experience:
        yield Problem(
            "run.keep_experience", "true keeps what an online run generates, and this run has none", "leave it out"
        )


def text_is_learnt_as_said(data: DataConfig, algorithm: LearningConfig) -> Iterator[Problem]:
    """What is learnt of demonstrations is for SFT to say, what becomes of documents for pre-training."""
    yield from _unread_keys("data", data, algorithm.name)


def prompts_are_no_text(
    data: DataConfig, pretraining_data: DataConfig | None, algorithm: OnlineConfig
) -> Iterator[Problem]:
    """Of prompts nothing is learnt; text beside them is learnt as in pre-training."""
    yield from _unread_keys("data", data, algorithm.name)
    if pretraining_data is not None:
        yield from _unread_keys("pretraining_data", pretraining_data, "pretrain")


def _unread_keys(where: str, data: DataConfig, reader: str) -> Iterator[Problem]:
    for key, (name, called) in _READ_BY_ONE.items():
        value = getattr(data, key)
        if reader != name and value != DataConfig.model_fields[key].default:
            what = f"{value}, which {called} alone reads, and this is {reader}"
            yield Problem(f"{where}.{key}", what, "leave it out")


def margins_are_read(data: DataConfig, algorithm: LearningConfig) -> Iterator[Problem]:
    """Only one loss asks for a margin."""
    if isinstance(algorithm, RewardModelConfig):
        loss, what = algorithm.loss, f"algorithm.loss {algorithm.loss}"
    else:
        loss, what = None, algorithm.name
    if loss != "ranking":
        yield from _unread_margins("data.margins", data, what)


def margins_are_of_comparisons(
    data: DataConfig, pretraining_data: DataConfig | None, algorithm: OnlineConfig
) -> Iterator[Problem]:
    """What samples are drawn for, and text beside them, has none."""
    yield from _unread_margins("data.margins", data, algorithm.name)
    if pretraining_data is not None:
        yield from _unread_margins("pretraining_data.margins", pretraining_data, algorithm.name)


def _unread_margins(where: str, data: DataConfig, reader: str) -> Iterator[Problem]:
    if data.margins != "none":
        yield Problem(
            where, f"are asked for by a reward model's loss `ranking` alone, and this is {reader}", "leave it out"
        )


def weights_are_of_a_mixture(data: DataConfig) -> Iterator[Problem]:
    """Held-out rows are no mixture to draw from."""
    yield from _unread_weights("data.heldout", data.heldout, "every held-out row is taken once")


def normalised_rows_have_no_weights(normalise: NormaliseSettings | None) -> Iterator[Problem]:
    """Nor are the rows that a reward model is normalised on."""
    if normalise is not None:
        how = "the first normalise.max_rows rows are taken, one source behind the other"
        yield from _unread_weights("normalise.data", normalise.data, how)


def _unread_weights(where: str, sources: Sequence[SourceConfig], how: str) -> Iterator[Problem]:
    for number, source in enumerate(sources):
        if source.weight is not None:
            yield Problem(f"{where}.{number}.weight", f"{source.weight:g}, and {how}", "leave it out")


def reference_has_learnt(reference: ScorerConfig | None) -> Iterator[Problem]:
    """A model of random weights is nothing to be held close to."""
    if reference is not None and reference.model.from_scratch:
        yield Problem(
            "reference.model.from_scratch",
            "true, and random weights are nothing to be compared with",
            "leave it out, or the section: the reference is then the learner's model as it starts",
        )


#: Of what learns from a data set.
LEARNER_RULES = (
    columns_are_of_prompts,
    experience_is_generated,
    text_is_learnt_as_said,
    margins_are_read,
    weights_are_of_a_mixture,
    normalised_rows_have_no_weights,
    reference_has_learnt,
)
#: Of online runs.
PROMPT_RULES = (prompts_are_no_text, margins_are_of_comparisons, weights_are_of_a_mixture)
