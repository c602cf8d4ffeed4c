"""A configuration is read whole or refused with every problem in it, in the user's terms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from algorithms.config import PreferenceConfig
from launch.config import OnlineRunConfig, SupervisedRunConfig
from launch.configfile import ALGORITHMS, dump, load
from launch.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([ROOT / "ray_config.yaml", *(ROOT / "examples").glob("*.yaml")])
NAMES = ", ".join(ALGORITHMS)
SFT, PPO = ROOT / "examples" / "sft.yaml", ROOT / "examples" / "ppo.yaml"


def problems(text: str, tmp_path: Path, *overrides: str) -> list[str]:
    """What is wrong with a YAML text, one string a problem."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def refused(path: Path, *overrides: str) -> list[str]:
    """What is wrong with a shipped file under overrides."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_parses_and_survives_being_written_out(path: Path, tmp_path: Path) -> None:
    config = load(path)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


def test_the_algorithm_says_of_which_kind_a_run_is() -> None:
    assert isinstance(load(PPO), OnlineRunConfig)
    assert isinstance(load(SFT), SupervisedRunConfig)


def test_adams_epsilon_is_larger_where_samples_are_learnt_from() -> None:
    learner, online = load(SFT), load(PPO, ["critic.optimizer.eps=3e-6"])
    assert isinstance(learner, SupervisedRunConfig) and isinstance(online, OnlineRunConfig)
    assert learner.learner.optimizer.eps == 1e-8
    assert online.policy.optimizer.eps == 1e-5
    assert online.critic is not None and online.critic.optimizer.eps == 3e-6


def test_simpo_has_a_scale_of_its_own() -> None:
    """That of a mean over tokens. A key that is given stays, as it does in a configuration that is written out."""
    scales = {name: PreferenceConfig.model_validate({"name": name, "batch_size": 8}) for name in ("dpo", "simpo")}
    assert [config.beta for config in scales.values()] == [0.1, 2.0]
    assert PreferenceConfig.model_validate({"name": "simpo", "batch_size": 8, "beta": 0.1}).beta == 0.1
    assert PreferenceConfig.model_validate(scales["simpo"].model_dump()) == scales["simpo"]


def test_reading_needs_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from launch.configfile import load; load(sys.argv[1]); "
        "print([name for name in ('torch', 'ray', 'transformers', 'vllm', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(PPO)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_check_begins_with_neither_torch_nor_ray() -> None:
    """A mistake in the configuration or the run's folder is told at once."""
    program = (
        "import sys, launch.check, launch.cli; "
        "print([name for name in ('torch', 'ray', 'vllm', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_overrides_are_typed_and_the_last_one_wins() -> None:
    config = load(
        PPO,
        [
            "run.seed=1",
            "run.seed=7",
            "policy.optimizer.learning_rate=1e-5",
            "policy.optimizer.betas=[0.8, 0.9]",
            "data.train=[{path: a.jsonl}, {path: b.jsonl}]",
            "data.train.1.path=c.jsonl",
            "data.train.2=d.jsonl",
            "algorithm.kl.target=6",
            "rollout.sampling.stop=['###', 'a=b']",
            "run.keep_experience=true",
            "cluster.address=head:6379",
        ],
    )
    assert isinstance(config, OnlineRunConfig)
    assert config.run.seed == 7
    assert config.policy.optimizer.learning_rate == 1e-5
    assert config.policy.optimizer.betas == (0.8, 0.9)
    assert [source.path for source in config.data.train] == ["a.jsonl", "c.jsonl", "d.jsonl"]
    assert config.algorithm.kl.target == 6.0
    assert config.rollout.sampling.stop == ("###", "a=b")
    assert config.run.keep_experience is True
    assert config.cluster.address == "head:6379"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "override 'seed': is not of the form key.sub=value; e.g. run.seed=1"),
        ("run.seed=[1", "override 'run.seed=[1': '[1' is not a YAML value; put it in quotes"),
        (
            "run.seed.x=1",
            "override 'run.seed.x=1': run.seed is 0 and has no keys; set it as a whole: run.seed=VALUE",
        ),
        ("run.sede=1", "run.sede (override run.sede=1): unknown key; did you mean 'seed'?"),
        ("run.seed=-1", "run.seed (override run.seed=-1): -1 is not right; it should be greater than or equal to 0"),
        ("learner.optimizer.learning_rate=.nan", "learner.optimizer.learning_rate (override "
         "learner.optimizer.learning_rate=.nan): nan is not right; it should be a finite number"),
    ],
)
def test_a_wrong_override_is_named(override: str, problem: str) -> None:
    assert refused(SFT, override) == [problem]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.train=5", "5 is not a list; e.g. [a, b]"),
        ("data.train=[]", "has 0 items; at least 1"),
        ("learner.optimizer.betas=[0.1, 0.2, 0.3]", "has 3 items; at most 2"),
    ],
)
def test_a_list_is_a_list(override: str, problem: str) -> None:
    assert refused(SFT, override) == [f"{override.partition('=')[0]} (override {override}): {problem}"]


def test_a_name_that_looks_like_a_number_survives_being_written_out(tmp_path: Path) -> None:
    config = load(SFT, ["run.name='1e5'"])
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config
    assert load(SFT, ["run.name=2026-11-21"]).run.name == "2026-11-21"


def test_a_list_takes_indices() -> None:
    changes = ("data.train=[{path: a.jsonl}]", "data.train.3.path=b")
    assert refused(SFT, *changes) == [
        "override 'data.train.3.path=b': data.train is a list and '3' not one of it; "
        "an index from 0 to 1, the last to append"
    ]


def test_everything_wrong_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
run: {name: a b}
algorithm:
  name: sft
  batch_size: 0
  num_epoch: 2
data:
  train: [{pth: a.jsonl}]
  max_tokens: many
  bad_rows: skpi
learner:
  model: {path: 12}
  learning_rate: 1e-5
"""
    assert problems(text, tmp_path) == [
        "run.name (run.yaml:1): 'a b' is not right; it should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'",
        "data.train.0.path (run.yaml:7): is missing; A file, a glob, any fsspec URL, or `hub:NAME` for a data set on "
        "the Hugging Face hub. JSONL, JSON, Parquet, Arrow/Feather, CSV, plain text; .gz is read through",
        "data.train.0.pth (run.yaml:7): unknown key; did you mean 'path'?",
        "data.max_tokens (run.yaml:8): 'many' is not right; it should be a valid integer",
        "data.bad_rows (run.yaml:9): 'skpi' is none of refuse, skip; did you mean 'skip'?",
        "algorithm.batch_size (run.yaml:4): 0 is not right; it should be greater than 0",
        "algorithm.num_epoch (run.yaml:5): unknown key; did you mean 'num_epochs'?",
        "learner.model.path (run.yaml:11): 12 is not text; put it in quotes",
        "learner.optimizer (run.yaml:10): is missing; How it learns: at least learner.optimizer.learning_rate",
        "learner.learning_rate (run.yaml:12): unknown key; did you mean learner.optimizer.learning_rate?",
    ]


def test_a_mistake_in_one_section_does_not_hide_rules_between_others() -> None:
    assert refused(PPO, "run.sede=1", "online.batch_size=30", "algorithm.num_minibatches=4") == [
        "run.sede (override run.sede=1): unknown key; did you mean 'seed'?",
        "online.batch_size (override online.batch_size=30): 30 is not a multiple of algorithm.num_minibatches = 4; "
        "28 or 32 would be",
    ]


def test_a_critic_under_sft() -> None:
    assert refused(SFT, "critic.model.path=x") == [
        "critic (override critic.model.path=x): sft trains one model, the learner, and has no critic; remove the "
        "section (the model that is trained is `learner`), or set algorithm.name to ppo"
    ]


def test_ppo_without_critic(tmp_path: Path) -> None:
    before, _, rest = PPO.read_text().partition("critic:\n")
    text = before + "reference:" + rest.partition("reference:")[2]
    assert problems(text, tmp_path) == [
        "critic (run.yaml): the section is missing, and ppo needs it (the model that estimates what a prefix is "
        "worth); add it with at least critic.model.path, critic.optimizer.learning_rate"
    ]


def test_a_learner_under_ppo() -> None:
    [problem] = refused(PPO, "learner={}")
    assert problem.endswith("ppo trains `policy` and `critic` and has no learner; call it `policy`, or set "
                            "algorithm.name to pretrain, sft, reward_model, dpo ...")


def test_a_key_that_belongs_elsewhere() -> None:
    assert refused(PPO, "algorithm.batch_size=4") == [
        "algorithm.batch_size (override algorithm.batch_size=4): unknown key; did you mean online.batch_size?"
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("algorithm.name=dpop", f"there is no algorithm 'dpop'; one of {NAMES}"),
        ("algorithm={}", f"is missing; one of {NAMES}"),
    ],
)
def test_no_such_algorithm(change: str, problem: str) -> None:
    assert refused(SFT, change) == [f"algorithm.name (override {change}): {problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run: {name: a", "run.yaml:1: not YAML: expected ',' or '}', but got '<stream end>'; mend the line"),
        ("- a\n- b\n", "is not a mapping of keys to values; sections such as run:, data:, algorithm:"),
        ("run: 1\ndata: 2\nrun: 3\n", "run (run.yaml:3): stands twice, it is also on line 1; keep one"),
        ("run: !!python/object:os.system {}\n", "run.yaml:1: not YAML: could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/object:os.system'; mend the line"),
    ],
)
def test_what_is_not_yaml(text: str, problem: str, tmp_path: Path) -> None:
    assert problems(text, tmp_path) == [problem]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory; give a YAML file"):
        load(tmp_path / "none.yaml")


def test_an_anchor_may_be_merged_and_overridden(tmp_path: Path) -> None:
    text = SFT.read_text().replace("run:\n", "run: &run\n").replace("  name: demo-sft\n", "  name: demo-sft\n")
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("algorithm:\n", "algorithm:\n  <<: {num_epochs: 9, evaluate_every: 3}\n"))
    config = load(path)
    assert isinstance(config, SupervisedRunConfig)
    assert config.algorithm.num_epochs == 3  # the file's own key, not the merged one
