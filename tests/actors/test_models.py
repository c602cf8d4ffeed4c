"""Hugging Face models, packed: each token gets what it would get alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actors.config import ModelConfig
from actors.errors import ModelError
from actors.models import PackedModel, enable_gradient_checkpointing, load_causal_lm, load_scorer, load_tokenizer
from tests.actors import tiny_models


def rows() -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randint(2, 64, (length,), generator=source) for length in (5, 9, 1, 30, 7)]


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat(rows()), torch.cat([torch.arange(len(row)) for row in rows()])


def gradients(model: PackedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["causal", "score", "token_score"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "bloom"])
def test_packed_equals_alone(kind: str, head: str, tmp_path: Path) -> None:
    """Outputs and gradients; BLOOM, which takes no positions, by way of a padded batch."""
    folder = tiny_models.write(tmp_path / kind, kind, head)
    config = ModelConfig(path=str(folder), dtype="float32", attention="eager" if kind == "bloom" else "sdpa")
    model: PackedModel = load_causal_lm(config) if head == "causal" else load_scorer(config)
    assert model.padded == (kind == "bloom")
    together = model(*packed())
    torch.autograd.backward(together.square().mean())
    found = gradients(model)
    model.zero_grad()
    alone = torch.cat([model(row, torch.arange(len(row))) for row in rows()])
    torch.autograd.backward(alone.square().mean())
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    chosen = torch.tensor([0, 3, 6, 40])
    torch.testing.assert_close(model(*packed(), chosen), together[chosen], rtol=1e-4, atol=1e-5)
    assert model(*packed(), chosen[:0]).shape[0] == 0


def test_a_model_that_leaks_across_the_border_is_padded(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that sees the whole pack is noticed at load, and the outputs are right all the same."""
    config = ModelConfig(path=str(models / "llama"), dtype="float32")
    expected = load_causal_lm(config)(*packed())
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    model = load_causal_lm(config)
    assert model.padded
    torch.testing.assert_close(model(*packed()), expected, rtol=1e-4, atol=1e-5)
    model.padded = False
    assert not torch.allclose(model(*packed()), expected, atol=1e-2)


def test_dropout_is_off_even_with_gradient_checkpointing(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = load_causal_lm(ModelConfig(path=str(folder), dtype="float32"))
    expected = model(*packed())
    assert torch.equal(model(*packed()), expected)
    enable_gradient_checkpointing(model)
    torch.testing.assert_close(model(*packed()), expected)
    model.train()
    torch.testing.assert_close(model(*packed()), expected)
    assert json.loads((folder / "config.json").read_text())["resid_pdrop"] == 0.5


def test_weights_from_scratch_are_those_of_the_seed(models: Path) -> None:
    config = ModelConfig(path=str(models / "llama"), from_scratch=True, dtype="float32")
    torch.manual_seed(5)
    one, other, third = load_causal_lm(config, seed=1), load_causal_lm(config, seed=1), load_causal_lm(config, seed=2)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state), "the process's own random state moved"
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    assert not torch.equal(one.get_parameter("network.lm_head.weight"), third.get_parameter("network.lm_head.weight"))
    half = load_causal_lm(config.model_copy(update={"dtype": "bfloat16"}), seed=1)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter.bfloat16(), half.get_parameter(name))


def test_an_untrained_model_gives_every_token_the_same_chance(models: Path) -> None:
    """A scorer from scratch starts at 0; a language model near the logarithm of its vocabulary."""
    config = ModelConfig(path=str(models / "llama"), from_scratch=True, dtype="float32")
    assert torch.equal(load_scorer(config)(*packed()), torch.zeros(52))
    logits = load_causal_lm(config)(*packed())
    nats = nn.functional.cross_entropy(logits, packed()[0])
    assert nats.item() == pytest.approx(torch.tensor(64.0).log().item(), abs=0.1)


def test_what_is_wrong_with_a_model_folder_is_said(models: Path, tmp_path: Path) -> None:
    def config(path: Path) -> ModelConfig:
        return ModelConfig(path=str(path), dtype="float32")

    with pytest.raises(ModelError, match="nowhere does not exist"):
        load_causal_lm(config(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty has no config\.json"):
        load_causal_lm(config(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no tokenizer could be loaded from"):
        load_tokenizer(config(tmp_path / "empty"))

    broken = tiny_models.write(tmp_path / "broken", "llama")
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json of model .*broken could not be read"):
        load_causal_lm(config(broken))

    torn = tiny_models.write(tmp_path / "torn", "llama")
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="torn could not be loaded"):
        load_causal_lm(config(torn))

    other = tiny_models.write(tmp_path / "other", "llama")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"do not fit its config\.json: missing .*model\.layers\.2"):
        load_causal_lm(config(other))
    (other / "config.json").write_text(json.dumps(settings | {"intermediate_size": 32}))
    with pytest.raises(ModelError, match=r"other could not be loaded|of another shape"):
        load_causal_lm(config(other))

    with pytest.raises(ModelError, match="score is a Qwen2ForSequenceClassification, not a causal language model"):
        load_causal_lm(config(models / "score"))


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no EOS token: set eos_token"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("head", ["score", "token_score"])
def test_two_labels_are_refused(head: str, tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "two", "qwen2", head=head, num_labels=2)
    with pytest.raises(ModelError, match=r"has 2 labels \(LABEL_0, LABEL_1\); a reward model or critic has one"):
        load_scorer(ModelConfig(path=str(folder)))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    """A BERT pools its first token: its score is not one of each token."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="decoder"):
        load_scorer(ModelConfig(path=str(tmp_path), dtype="float32"))


def test_scores_of_a_bfloat16_model_are_not_rounded_to_bfloat16(models: Path) -> None:
    """The head computes in float32, from hidden states and weights in bfloat16; gradients have the weights' type."""
    model = load_scorer(ModelConfig(path=str(models / "score"), dtype="bfloat16"))
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 64, (2000,), generator=source)
    positions = torch.arange(2000) % 20
    scores = model(tokens, positions)
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 1900 > 1000 > len(scores.bfloat16().unique())
    with torch.no_grad():
        states = model.hidden_states(model.network.base_model, tokens, positions)  # type: ignore[arg-type]
    weight = model.get_parameter("network.score.weight")
    expected = states.double() @ weight.double().T
    torch.testing.assert_close(scores.double(), expected[:, 0], rtol=1e-5, atol=1e-6)
    scores.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, states.double().sum(0, keepdim=True).bfloat16())


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 16.0}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16}},
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ],
    ids=["longrope", "longrope by the model", "dynamic"],
)
@pytest.mark.parametrize("head", ["causal", "score"])
def test_a_sequence_that_would_change_its_pack_mates_is_refused(
    head: str, changes: dict[str, Any], padded: bool, tmp_path: Path
) -> None:
    """Some rotary embeddings take their frequencies from the longest sequence of a forward."""
    folder = tiny_models.write(tmp_path / "llama", "llama", head)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    config = ModelConfig(path=str(folder), dtype="float32")
    model: PackedModel = load_causal_lm(config) if head == "causal" else load_scorer(config)
    model.padded = padded
    row, long = torch.arange(2, 12), torch.arange(60) % 50 + 2
    alone = model(row, torch.arange(10))
    together = model(torch.cat([row, long[:16]]), torch.cat([torch.arange(10), torch.arange(16)]))
    torch.testing.assert_close(together[:10], alone, rtol=1e-4, atol=1e-5)
    refusal = r"rotary embeddings: a sequence of more than 16 tokens .* one here has 60; lower data\.max_tokens"
    with pytest.raises(ModelError, match=refusal):
        model(torch.cat([row, long]), torch.cat([torch.arange(10), torch.arange(60)]))
    with pytest.raises(ModelError, match="one here has 17"):
        model(long[:17], torch.arange(17))
    torch.testing.assert_close(model(row, torch.arange(10)), alone, msg="what came before is remembered")


@pytest.mark.parametrize(
    "rope",
    [
        LONGROPE | {"short_factor": [4.0] * 4, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16},
    ],
    ids=["longrope at its long factors", "yarn"],
)
def test_frequencies_that_are_the_same_at_every_length_have_no_limit(rope: dict[str, Any], tmp_path: Path) -> None:
    model = load_causal_lm(
        ModelConfig(path=str(tiny_models.write(tmp_path / "llama", "llama", rope_parameters=rope)), dtype="float32")
    )
    row, long = torch.arange(2, 12), torch.arange(60) % 50 + 2
    together = model(torch.cat([row, long]), torch.cat([torch.arange(10), torch.arange(60)]))
    torch.testing.assert_close(together[:10], model(row, torch.arange(10)), rtol=1e-4, atol=1e-5)
