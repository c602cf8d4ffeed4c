"""Two reward models from one file of tagged comparisons, and what a reward model is normalised on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors.source import SourceActor
from data.tokenizer import load_tokenizer
from examples.demo_data import write_base_model
from launch.check_data import check_data
from launch.config import RewardModelRunConfig
from launch.configfile import dump, load
from launch.errors import ConfigError
from launch.paths import resolve_data, resolve_model
from tests.actors.ranks import context

EXAMPLES = Path(__file__).parents[2] / "examples"
TAGS = ("helpfulness", "safety")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a tokenizer, and 60 comparisons in turn judged for helpfulness and safety; each prompt comes for both."""
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
    write_base_model(tmp_path / "base")
    rows = [
        {"prompt": f"sort {n} {m} :", "chosen": f" {m} {n}", "rejected": f" {n} {m}", "tag": tag}
        for n, m in ((n, n + 1 + n % 3) for n in range(1, 31))
        for tag in TAGS
    ]
    rows += [{"prompt": "sort 9 :", "chosen": " 9", "rejected": " 8", "tag": "style"}]
    (tmp_path / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    demonstrations = [{"prompt": f"sort {n} :", "completion": f" {n}"} for n in range(1, 8)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    return tmp_path


@pytest.mark.parametrize("tag", TAGS)
def test_the_shipped_pair_reads_rows_of_its_tag(
    tag: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(models))
    facts: list[tuple[str, str]] = []
    tokenizer = load_tokenizer(str(models / "runs" / "demo-sft" / "model"))
    assert not list(check_data(load(EXAMPLES / "methods" / f"reward_{tag}.yaml"), tokenizer, facts))
    rows = [json.loads(row) for row in (models / "runs" / "demo-data" / "tagged.jsonl").read_text().splitlines()]
    count = sum(row["tag"] == tag for row in rows)
    assert 200 < count < 400 and f"{len(rows) - count} left out by `where`" in dict(facts)["data.train.0"]
    assert f"{count} kept" in dict(facts)["data.train.0"] and "data.heldout.0" in dict(facts)


def written(home: Path, tag: str, *overrides: str) -> RewardModelRunConfig:
    """The run of one model, as its YAML says."""
    words = (
        f"run.name=reward-{tag}",
        "learner.model.path=base",
        f"data={{train: {{path: tagged.jsonl, where: {{tag: {tag}}}}}, heldout_fraction: 0.3, max_tokens: 32}}",
    )
    file = home / f"{tag}.yaml"
    file.write_text(dump(load(EXAMPLES / "reward.yaml", [*words, *overrides])))
    config = load(file)
    assert isinstance(config, RewardModelRunConfig)
    return config


def source(config: RewardModelRunConfig) -> SourceActor:
    data, model = resolve_data(config.data), resolve_model(config.learner.model)
    return SourceActor(context(role="source"), data, "comparisons", model, config.run.seed)


def test_two_reward_models_learn_from_one_file_each_from_its_own_rows(home: Path) -> None:
    prompts: dict[str, list[set[str]]] = {}
    for tag in TAGS:
        config = written(home, tag)
        actor = source(config)
        description = actor.describe()
        (counts,) = description.counts
        assert (counts.read, counts.filtered, counts.train + counts.heldout) == (61, 31, 30)
        assert description.num_rows + description.num_heldout_rows == 30
        tokenizer = AutoTokenizer.from_pretrained(home / "base")
        prompts[tag] = []
        for batch, _ in (actor.next_batch(description.first_cursor, description.num_rows), actor.heldout()):
            tokens, lengths = batch.column("tokens").to_pylist(), batch.column("num_prompt_tokens").to_pylist()
            pairs = zip(tokens[::2], lengths[::2], strict=True)
            prompts[tag].append({tokenizer.decode(row[:length]) for row, length in pairs})
        assert [len(side) for side in prompts[tag]] == [description.num_rows, description.num_heldout_rows]
    # What one model is evaluated on, the other has not learnt from either.
    assert prompts["helpfulness"] == prompts["safety"] and prompts["safety"][1]


def test_normalisation_in_short_and_in_full(home: Path) -> None:
    short = written(home, "safety", "normalise=demonstrations").normalise
    assert short is not None and (short.by, short.data) == ("demonstrations", ())
    full = written(home, "safety", "normalise={by: policy_samples, data: good.jsonl, max_rows: 5}").normalise
    assert full is not None and [part.path for part in full.data] == ["good.jsonl"]
    assert written(home, "safety").normalise is None
    with pytest.raises(ConfigError, match="policy_samples needs data"):
        written(home, "safety", "normalise=policy_samples")
    with pytest.raises(ConfigError, match=r"normalise\.by"):
        written(home, "safety", "normalise=mean")


def test_what_is_measured_are_the_chosen_responses_or_other_data(home: Path) -> None:
    config = written(home, "helpfulness", "normalise={by: demonstrations, data: good.jsonl}")
    actor = source(config)
    chosen, _ = actor.chosen(4)
    assert chosen.column("rank").to_pylist() == [0] * 4
    assert actor.chosen(1000)[0].num_rows == actor.describe().num_rows
    assert config.normalise is not None
    data = resolve_data(config.normalise.data_config(config.data))
    assert actor.examples_of(data, 5)[0].num_rows == 5
    assert actor.examples_of(data, 100)[0].num_rows == 7


def test_check_reads_what_is_measured(home: Path) -> None:
    tokenizer = load_tokenizer(str(home / "base"))
    facts: list[tuple[str, str]] = []
    config = written(home, "safety", "normalise={by: demonstrations, data: good.jsonl}")
    assert list(check_data(config, tokenizer, facts)) == []
    assert [where for where, _ in facts] == ["normalise.data.0", "data.train.0"]
    config = written(home, "safety", "normalise={by: demonstrations, data: gone.jsonl}")
    (problem,) = check_data(config, tokenizer, facts)
    assert problem.where == "normalise.data.0" and "gone.jsonl" in problem.what
