"""The pages of the methods name nothing that is not there: keys, metrics, examples and losses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

from actors.objectives import NextToken
from algorithms import kto, losses, policy_losses, preferences, ranking
from algorithms.config import PreferenceConfig, PreferenceLoss, RewardModelConfig, SupervisedConfig
from algorithms.needs import BUILT_IN
from launch.config import (
    FeedbackRunConfig,
    OnlineRunConfig,
    PreferenceRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)
from launch.configfile import load
from launch.fields import models_of

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
ON_TOP_OF = re.compile(r"# on top of (\S+\.yaml)\n")
#: What the engine adds to the metrics of every loss.
OF_EVERY_UPDATE = {"loss", "grad_norm", "learning_rate", "tokens_per_second"}
#: Names with an underscore that are neither keys nor their values.
OTHER_NAMES = {"troupe_score_bias", "pad_token_id", "from_pretrained", "kl_coefficient", "next_token_loss"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def marked(page: Path) -> list[str]:
    """What stands between backticks, outside blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


YAML_BLOCKS = [(page, block) for page in PAGES for block in blocks(page, "yaml")]
COMMANDS = [
    (page, shlex.split(line, comments=True))
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.splitlines()
    if line.startswith("troupe")
]


def merged(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: merged(base.get(key), value) for key, value in over.items()}


@pytest.mark.parametrize(("page", "block"), YAML_BLOCKS, ids=lambda value: getattr(value, "name", ""))
def test_every_block_of_yaml_is_a_configuration(page: Path, block: str, tmp_path: Path) -> None:
    found = ON_TOP_OF.match(block)
    assert found, f"{page.name}: a block begins with `# on top of FILE`"
    base = yaml.safe_load((ROOT / found[1]).read_text())
    whole = tmp_path / "whole.yaml"
    whole.write_text(yaml.safe_dump(merged(base, yaml.safe_load(block))))
    assert load(whole).run.name


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: getattr(value, "name", ""))
def test_every_command_names_a_configuration_and_changes_what_is_there(page: Path, words: list[str]) -> None:
    assert words[:2] == ["troupe", "train"], page.name
    load(ROOT / words[2], words[3:])


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for info in model.model_fields.values():
        for inner in models_of(info.annotation):
            yield from models(inner)


def literals(annotation: object) -> Iterator[str]:
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        yield from literals(part)


def known_names() -> set[str]:
    """Every key of every configuration, and every value that is one of a few words."""
    names: set[str] = set()
    for kind in (OnlineRunConfig, PreferenceRunConfig, FeedbackRunConfig, RewardModelRunConfig, SupervisedRunConfig):
        for model in models(kind):
            for name, info in model.model_fields.items():
                names |= {name, *literals(info.annotation)}
    names |= set(BUILT_IN)
    for config in (PreferenceConfig, RewardModelConfig, SupervisedConfig):
        names |= set(literals(config.model_fields["name"].annotation))
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_is_there(page: Path) -> None:
    names = known_names()
    for mark in marked(page):
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+(=[a-z_]+)?", mark) and not re.search(r"\.(jsonl?|yaml|svg)$", mark):
            unknown = [part for part in re.split(r"[.=]", mark) if part not in names]
        elif re.fullmatch(r"[a-z]+_[a-z_]+", mark):
            unknown = [mark] if mark not in names | OTHER_NAMES else []
        else:
            continue
        assert not unknown, f"{page.name}: `{mark}`"


def learner_metrics() -> set[str]:
    """What the losses that learn from a data set report, by calling them."""
    one, two, offsets, ranks = torch.zeros(1), torch.zeros(2), torch.tensor([0, 2]), torch.tensor([0, 1])
    lengths = torch.ones(1, dtype=torch.int64)
    reported: list[Mapping[str, Any]] = [
        losses.next_token_loss(one, one, 1)[1],
        NextToken().evaluation({"loss": 1.0}),
        ranking.kwise_loss(two, ranks, offsets, denominator=1)[1],
        ranking.soft_pairwise_loss(one, one, one, denominator=1)[1],
        ranking.best_of_loss(two, ranks, offsets, denominator=1)[1],
        ranking.kwise_centring_term(two, ranks, offsets, coefficient=1.0, denominator=1)[1],
        preferences.dpo_loss(one, one, one, one, beta=1.0, denominator=1)[1],
        preferences.simpo_loss(one, one, lengths, lengths, beta=1.0, gamma=0.0, denominator=1)[1],
        preferences.orpo_loss(one - 1, one - 1, lengths, lengths, coefficient=1.0, denominator=1)[1],
        preferences.nll_term(one, lengths, coefficient=1.0, denominator=1)[1],
        kto_metrics(),
    ]
    return {name for metrics in reported for name in metrics}


def kto_metrics() -> Mapping[str, Any]:
    two = torch.zeros(2)
    return kto.kto_loss(two, two, torch.tensor([True, False]), 0.0, beta=1.0, num_desirable=1, denominator=2)[1]


def online_metrics() -> dict[str, set[str]]:
    one = torch.zeros(1)
    policy = policy_losses.clip_higher_loss(one, one, one, clip_low=0.2, clip_high=0.2, weights_T=one, denominator=1)[1]
    critic = losses.clipped_value_loss(one, one, one, clip_value=None, denominator=1)[1]
    first = {"first_ratio_max_deviation", "first_logprob_gap"}
    assert all(f'"{name}"' in (ROOT / "actors" / "policy.py").read_text() for name in first)
    added = {"clip_fraction", "entropy"}
    assert all(f'"{name}"' in (ROOT / "actors" / "policy_loss.py").read_text() for name in added - {"entropy"})
    credit = (ROOT / "actors" / "credit.py").read_text().partition("def _metrics(")[2]
    return {
        "policy": {*policy, *first, *added, *OF_EVERY_UPDATE},
        "critic": {*critic, *OF_EVERY_UPDATE},
        "experience": set(re.findall(r'"([a-z_]+)": ', credit)),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_is_there(page: Path) -> None:
    learner = learner_metrics() | OF_EVERY_UPDATE
    heldout = learner | {"bits_per_byte", "calibration_error", "accuracy_<rating>"}
    known = {"learner": learner, "heldout": heldout, **online_metrics()}
    named = [re.fullmatch(r"(learner|heldout|policy|critic|experience)/(\S+)", mark) for mark in marked(page)]
    for found in named:
        if found is not None:
            assert found[2] in known[found[1]], f"{page.name}: {found[0]}"
    assert page.name == "README.md" or any(named)


def test_every_metric_of_the_preference_losses_and_of_ppo_is_explained() -> None:
    texts = {name: (ROOT / "docs" / "methods" / name).read_text() for name in ("preference.md", "ppo.md")}
    one, lengths = torch.full((1,), -1.0), torch.ones(1, dtype=torch.int64)
    orpo = preferences.orpo_loss(one, one, lengths, lengths, coefficient=1.0, denominator=1)[1]
    dpo = preferences.dpo_loss(one, one, one, one, beta=1.0, denominator=1)[1]
    for name in {*orpo, *dpo, "chosen_nll"}:
        assert f"`learner/{name}`" in texts["preference.md"]
    for name in kto_metrics():
        assert f"`learner/{name}`" in (ROOT / "docs" / "methods" / "kto.md").read_text()
    for name in online_metrics()["experience"]:
        assert f"`experience/{name}`" in texts["ppo.md"]


def test_every_preference_loss_and_every_example_has_its_place() -> None:
    page = (ROOT / "docs" / "methods" / "preference.md").read_text()
    index = (ROOT / "docs" / "methods" / "README.md").read_text()
    for name in get_args(PreferenceLoss):
        assert f"| `{name}` | " in page
        assert f"`{name}`" in index
    for example in EXAMPLES:
        assert f"../../{example.relative_to(ROOT)})" in index, example.name
    for other in PAGES:
        assert other.name == "README.md" or f"({other.name}" in index


def test_there_are_pages_blocks_and_commands() -> None:
    assert len(PAGES) >= 8
    assert len(YAML_BLOCKS) >= 10
    assert len(COMMANDS) >= 10
