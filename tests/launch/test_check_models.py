"""What ``troupe check`` knows of models without loading their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.config import ModelConfig
from data.tokenizer import Tokenizer
from launch.check import CheckReport, _check_folder
from launch.check_models import ModelKind, WantedModel, check_model, wanted_models
from launch.configfile import load
from tests.actors import families

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TROUPE_HOME", str(home))
    return home / "runs"


def copied(runs: Path, of: str, **changes: object) -> Path:
    """A copy of one of the small models, with changes to its config.json."""
    folder = runs / "changed"
    shutil.copytree(runs / of / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def found(name: str, *overrides: str) -> list[str]:
    """What is wrong with the models of a shipped run."""
    tokenizers: dict[str, Tokenizer] = {}
    config = load(ROOT / name, overrides)
    return [str(problem) for wanted in wanted_models(config) for problem in check_model(wanted, [], tokenizers)]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["ray_config.yaml", "examples/ppo.yaml", "examples/reward.yaml"])
def test_the_small_models_will_do(name: str) -> None:
    assert found(name) == []


@pytest.mark.usefixtures("runs")
def test_each_role_gets_the_kind_of_model_that_it_needs() -> None:
    score, language = "runs/demo-reward/model", "runs/demo-sft/model"
    [policy] = found("ray_config.yaml", f"policy.model.path={score}")
    assert policy == (
        "policy.model: LlamaForSequenceClassification is no language model; a causal language model"
    )
    [reward] = found("ray_config.yaml", f"reward.model.path={language}")
    assert reward.startswith("reward.model: LlamaForCausalLM has no trained head: every reward would be 0; ")
    assert found("ray_config.yaml", f"critic.model.path={language}") == []  # its head begins at 0
    assert len(found("ray_config.yaml", "reward.model.from_scratch=true")) == 1


def test_a_scorer_with_two_labels(runs: Path) -> None:
    two = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    copied(runs, "demo-reward", **two)
    for role in ("critic", "reward"):
        [problem] = found("ray_config.yaml", f"{role}.model.path=runs/changed")
        assert problem == f"{role}.model: the model has 2 labels; a model with one label, which is the score"
    assert "2 labels" in found("examples/reward.yaml", "learner.model.path=runs/changed")[0]


def test_a_context_that_is_too_short(runs: Path) -> None:
    copied(runs, "demo-sft", max_position_embeddings=25)
    [policy] = found("ray_config.yaml", "policy.model.path=runs/changed", "rollout.max_model_tokens=null")
    assert policy.startswith("policy.model: sequences of 26 tokens are longer than the model's context of 25; ")
    [engine] = found("ray_config.yaml", "rollout.max_model_tokens=4096")
    assert engine.startswith("policy.model: sequences of 4096 tokens are longer")


def test_a_reference_that_reads_other_tokens(runs: Path) -> None:
    folder = copied(runs, "demo-sft")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    [problem] = found("ray_config.yaml", "reference.model.path=runs/changed")
    assert problem.startswith("reference.model: its tokenizer is not the policy's, whose tokens it is given; ")
    assert found("ray_config.yaml", "reward.model.tokenizer=runs/changed") == []  # it encodes the text anew


def test_a_tokenizer_without_eos(runs: Path) -> None:
    folder = copied(runs, "demo-sft")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.pop("eos_token", None)
            (folder / name).write_text(json.dumps(settings))
    [problem] = found("ray_config.yaml", "reference.model.path=runs/changed")
    assert problem.startswith("reference.model.tokenizer: ")
    assert "EOS" in problem


def test_weights_that_are_not_there(runs: Path) -> None:
    folder = copied(runs, "demo-sft")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    [problem] = found("ray_config.yaml", "policy.model.path=runs/changed")
    assert problem.endswith("changed lacks model-00002-of-00002.safetensors; all 2 files of the model")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    [problem] = found("ray_config.yaml", "policy.model.path=runs/changed")
    assert "holds no weights; weights, or `from_scratch: true`" in problem
    assert found("ray_config.yaml", "policy.model={path: runs/changed, from_scratch: true}") == []


def test_a_model_that_is_not_there(runs: Path) -> None:
    [problem] = found("ray_config.yaml", "critic.model.path=runs/made/nowhere")
    assert problem.startswith(f"critic.model.path: no model can be read from {runs}/made/nowhere: no such folder; ")


def test_a_config_that_is_no_config(runs: Path) -> None:
    (copied(runs, "demo-sft") / "config.json").write_text('{"model_type": "no_such_architecture"}')
    [problem] = found("ray_config.yaml", "policy.model.path=runs/changed")
    assert problem.startswith("policy.model.path: no model can be read from ")
    assert "no_such_architecture" in problem


@pytest.mark.parametrize(
    "text",
    ['{"model_type": "llama", ', "[]", "\xff", '{"model_type": "llama", "hidden_size": "wide"}'],
    ids=["breaks off", "no object", "no text", "wrong type"],
)
def test_a_corrupt_config(runs: Path, text: str) -> None:
    (copied(runs, "demo-sft") / "config.json").write_text(text, encoding="latin-1")
    problems = found("ray_config.yaml", "reference.model.path=runs/changed")
    assert problems[0].startswith(f"reference.model.path: no model can be read from {runs / 'changed'}: ")


@pytest.mark.usefixtures("runs")
def test_a_model_that_is_not_there_is_told_of_once() -> None:
    [problem] = found("ray_config.yaml", "policy.model.path=/nowhere")
    assert problem.startswith("policy.model.path: no model can be read from /nowhere: no such folder; ")


def test_an_encoder_decoder_is_no_policy(runs: Path) -> None:
    folder = copied(runs, "demo-sft")
    (folder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"], "vocab_size": 9999}')
    assert found("ray_config.yaml", "reference.model.path=runs/changed") == [
        "reference.model: transformers has no t5 that is a causal language model; a decoder such as Llama or Qwen"
    ]


def test_a_vocabulary_that_is_too_small(runs: Path) -> None:
    copied(runs, "demo-sft", vocab_size=5)
    [problem] = found("ray_config.yaml", "reference.model={path: runs/changed, from_scratch: true}")
    assert problem.startswith("reference.model.tokenizer: numbers tokens up to ")
    assert problem.endswith(", and the model has 5 of them; the model's own")


@pytest.mark.parametrize(
    ("name", "content", "damage"),
    [
        ("model.safetensors", b"\x10", "model.safetensors is damaged: "),
        ("pytorch_model.bin", b"", "pytorch_model.bin is damaged: it is empty"),
        ("pytorch_model.bin", b"PK\x03\x04 and no more", "pytorch_model.bin is damaged: its end is missing"),
        ("model.safetensors.index.json", b"{", "model.safetensors.index.json is damaged: "),
        ("model.safetensors.index.json", b"[]", "model.safetensors.index.json is damaged: "),
    ],
)
def test_damaged_files_are_named(runs: Path, name: str, content: bytes, damage: str) -> None:
    (copied(runs, "demo-sft") / name).write_bytes(content)
    [problem] = found("ray_config.yaml", "policy.model.path=runs/changed")
    assert f"{runs / 'changed'}/{damage}" in problem
    assert problem.endswith("the whole file, copied or downloaded again")


def test_a_run_that_was_begun_is_told_of(runs: Path) -> None:
    report = CheckReport()
    config = load(ROOT / "ray_config.yaml")
    assert list(_check_folder(config, report)) == []
    assert report.facts == [("run", str(runs / "ppo"))]
    (runs / "ppo" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert list(_check_folder(config, report)) == []
    assert report.facts[-1] == ("run", f"{runs / 'ppo'}, begun already: --resume goes on with it")


@pytest.mark.parametrize(
    ("family", "settings", "kind", "message"),
    [
        ("gemma2", {}, "language model", "caps its attention's logits, which sdpa leaves out; set attention: eager"),
        ("gemma2", {"attention": "eager"}, "language model", None),
        ("bloom", {}, "language model", "scaled_dot_product_attention yet; set attention: eager"),
        ("bloom", {"attention": "eager"}, "new scorer", None),
        ("glm4", {}, "new scorer", None),
        ("baichuan", {"attention": "eager"}, "language model", "trust_remote_code: true says that it is trusted"),
        ("baichuan", {"attention": "eager", "trust_remote_code": True}, "language model", None),
        ("baichuan", {"attention": "eager", "trust_remote_code": True}, "new scorer", "there is no such class for it"),
        ("chatglm", {"attention": "eager", "trust_remote_code": True}, "new scorer", None),
    ],
)
def test_a_family_is_judged_before_it_is_loaded(
    family: str, settings: dict[str, Any], kind: ModelKind, message: str | None, tmp_path: Path
) -> None:
    write = families.write if family in families.NAMES else families.write_remote
    model = ModelConfig(path=str(write(tmp_path / family, family)), **settings)
    problems = [str(problem) for problem in check_model(WantedModel("policy.model", model, kind, 16), [], {})]
    assert len(problems) == (message is not None), problems
    assert message is None or message in problems[0]


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 16.0}


@pytest.mark.parametrize(
    ("rope", "max_tokens", "wanted", "refused"),
    [
        (LONGROPE | {"original_max_position_embeddings": 64}, 64, {}, False),
        (LONGROPE | {"original_max_position_embeddings": 64}, 65, {}, True),
        (LONGROPE | {"original_max_position_embeddings": 64}, 65, {"packed": False}, False),
        (LONGROPE | {"original_max_position_embeddings": 64}, 32, {"engine_chooses": True}, True),
        (LONGROPE | {"original_max_position_embeddings": 64, "short_factor": [4.0] * 4}, 65, {}, False),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 65, {}, False),
    ],
    ids=["as long as may be", "too long", "only in an engine", "as the engine likes", "one length", "yarn"],
)
def test_a_sequence_that_would_change_its_pack_mates(
    rope: dict[str, Any], max_tokens: int, wanted: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    folder = families.write(tmp_path / "llama", "llama", rope_parameters=rope)
    of = WantedModel("policy.model", ModelConfig(path=str(folder)), "language model", max_tokens, **wanted)
    problems = [str(problem) for problem in check_model(of, [], {})]
    assert len(problems) == refused, problems
    if refused:
        longest = 256 if "engine_chooses" in wanted else max_tokens
        assert problems[0].startswith(f"policy.model: has longrope rotary embeddings: of {longest} tokens, a sequence ")
        assert "lower data.max_tokens, the response's or rollout.max_model_tokens to 64, " in problems[0]


def runners(example: str, *overrides: str) -> dict[str, tuple[bool, bool, bool]]:
    """Of each model of a run: whether packs are run of it, vLLM chooses its longest sequence, activations go."""
    found = wanted_models(load(ROOT / example, overrides))
    return {wanted.where: (wanted.packed, wanted.engine_chooses, wanted.recomputes) for wanted in found}


@pytest.mark.usefixtures("runs")
def test_what_runs_a_model_is_known() -> None:
    ppo = runners("ray_config.yaml", "rollout.max_model_tokens=null", "policy.gradient_checkpointing=true")
    assert ppo.pop("policy.model") == (True, True, True)
    assert ppo == dict.fromkeys(["critic.model", "reference.model", "reward.model"], (True, False, False))
    critic = runners("ray_config.yaml", "rollout.max_model_tokens=64", "critic.gradient_checkpointing=true")
    assert (critic["policy.model"], critic["critic.model"]) == ((True, False, False), (True, False, True))
    assert runners("examples/rewards/judge.yaml")["reward.model"] == (False, False, False)
    learner = runners("examples/dpo.yaml", "learner.gradient_checkpointing=true")
    assert learner["learner.model"] == (True, False, True)


@pytest.mark.parametrize(("family", "can"), [("llama", True), ("baichuan", False)])
def test_gradient_checkpointing_that_a_model_cannot_do(family: str, can: bool, tmp_path: Path) -> None:
    write = families.write if family in families.NAMES else families.write_remote
    model = ModelConfig(path=str(write(tmp_path / family, family)), attention="eager", trust_remote_code=True)
    wanted = WantedModel("policy.model", model, "language model", 16, recomputes=True)
    problems = [str(problem) for problem in check_model(wanted, [], {})]
    expected = [
        "policy.gradient_checkpointing: BaichuanForCausalLM does not support gradient checkpointing; "
        "gradient_checkpointing: false, and a smaller max_tokens_per_pack where memory is short"
    ]
    assert problems == ([] if can else expected)
