"""An exported scorer gives the same scores under plain Transformers, whatever its tokenizer pads with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from actors.config import ModelConfig
from actors.exports import save_model
from actors.models import load_causal_lm, load_scorer
from tests.actors import families, tiny_models
from tests.actors.comparison_programs import pooled_scores

EOS = 1
ROWS = [[5, 9, 33, EOS], [7, EOS, 8, 9, 40, 12, EOS], [3, 4], [EOS], [6, 6, 6, EOS, EOS]]


def tokenizer(names: dict[str, str]) -> Any:
    """One without padding, with these special tokens from the tiny vocabulary, besides EOS."""
    inner = tiny_models.tokenizer().backend_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", **names)


def ours(folder: Path, rows: Sequence[list[int]] = ROWS) -> list[float]:
    model = load_scorer(ModelConfig(path=str(folder), dtype="float32"))
    with torch.no_grad():
        alone = [model(torch.tensor(row), torch.arange(len(row)), torch.tensor([len(row) - 1])) for row in rows]
    return [score.item() for score in alone]


def exported(
    folder: Path, names: dict[str, str], pad_token_id: int | None, eos: Any = EOS, template: str | None = None
) -> Path:
    """``folder`` with such a tokenizer, template and configuration, as it is exported."""
    model = load_scorer(ModelConfig(path=str(folder), dtype="float32"))
    model.config.pad_token_id, model.config.eos_token_id = pad_token_id, eos
    own = tokenizer(names)
    own.chat_template = template
    out = folder.parent / "out"
    weights = {name.removeprefix("network."): weight.detach() for name, weight in model.named_parameters()}
    save_model(model, weights, out, own)
    assert (model.config.pad_token_id, own.pad_token) == (pad_token_id, names.get("pad_token")), "the own one changed"
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("names", "pad_token_id", "eos", "chosen"),
    [
        ({"pad_token": "<pad>"}, 0, EOS, "<pad>"),
        ({"pad_token": "<eos>"}, 1, EOS, "<pad>"),
        ({"pad_token": "<eos>", "unk_token": "!"}, None, EOS, "<pad>"),
        ({"pad_token": "Z"}, 1, EOS, "Z"),
        ({"unk_token": "!", "bos_token": "Z"}, None, EOS, "<pad>"),
        ({"pad_token": "<pad>", "bos_token": "Z"}, 0, [EOS, 0], "Z"),
    ],
    ids=["its own", "EOS", "EOS and none", "EOS in the configuration alone", "none", "another end"],
)
def test_transformers_pools_where_the_score_is(
    names: dict[str, str], pad_token_id: int | None, eos: Any, chosen: str, side: str, tmp_path: Path
) -> None:
    folder = tiny_models.write(tmp_path / "score", "qwen2", head="score")
    out = exported(folder, names, pad_token_id, eos)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    config = transformers.AutoConfig.from_pretrained(out)
    assert (loaded.pad_token, config.pad_token_id) == (chosen, loaded.convert_tokens_to_ids(chosen))
    saved = json.loads((out / "tokenizer.json").read_text())
    assert {token["id"] for token in saved["added_tokens"]} < set(range(tiny_models.VOCAB)), "the vocabulary grew"
    assert pooled_scores(out, ROWS, side) == pytest.approx(ours(folder), rel=1e-4, abs=1e-5)
    assert ours(out) == ours(folder)


def test_where_every_special_token_ends_rows_there_is_no_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As GPT-2's tokenizer, that has one special token: single rows are right, and batches are refused, not wrong."""
    folder = tiny_models.write(tmp_path / "score", "qwen2", head="score")
    out = exported(folder, {"pad_token": "<eos>"}, 1, [EOS, 0])
    assert "has no token for padding besides those that end a row" in caplog.text
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0, 0].item() for row in ROWS]
    assert alone == pytest.approx(ours(folder), rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        model(torch.tensor(ROWS[:1] * 2))


def test_a_language_model_keeps_what_it_pads_with(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "llama", "llama")
    model = load_causal_lm(ModelConfig(path=str(folder), dtype="float32"))
    model.config.pad_token_id = EOS
    save_model(model, {}, tmp_path / "out", tokenizer({"pad_token": "<eos>"}))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == EOS
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<eos>"


Z = 60
ENDS_IN_Z = "{% for m in messages %}{{ m['content'] }}Z\n{% endfor %}"


@pytest.mark.parametrize(
    ("names", "template", "eos", "chosen"),
    [
        ({"pad_token": "Z"}, ENDS_IN_Z, EOS, "<pad>"),
        ({"unk_token": "Z", "bos_token": "Y"}, ENDS_IN_Z, [EOS, 0], "Y"),
        ({"bos_token": "Z", "sep_token": "Y"}, ENDS_IN_Z, [EOS, 0], "Y"),
        ({"pad_token": "<pad>", "unk_token": "Y"}, ENDS_IN_Z + "{# or <pad>, where a tool is called #}", EOS, "Y"),
        ({"pad_token": "Z"}, ENDS_IN_Z.replace("Z", "{{ 'z' | upper }}"), EOS, "<pad>"),
        ({"pad_token": "Z"}, "{{ raise_exception('no') }}Z", EOS, "<pad>"),
        ({"bos_token": "Z"}, "Z{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", [EOS, 0], "Z"),
    ],
    ids=["its own", "unknown", "beginning", "named so", "composed", "refused", "begins every row"],
)
def test_what_a_template_ends_a_turn_with_is_no_padding(
    names: dict[str, str], template: str, eos: Any, chosen: str, tmp_path: Path
) -> None:
    """Rows end in the template's token, which need not be EOS."""
    folder = tiny_models.write(tmp_path / "score", "qwen2", head="score")
    out = exported(folder, names, Z if names.get("pad_token") == "Z" else None, eos, template)
    assert transformers.AutoTokenizer.from_pretrained(out).pad_token == chosen
    end = EOS if "eos_token" in template else Z
    rows = [[5, 9, 33, end], [7, end, 8, 9, 40, 12, end], [end], [6, 6, end, end]]
    for side in ("left", "right"):
        assert pooled_scores(out, rows, side) == pytest.approx(ours(folder, rows), rel=1e-4, abs=1e-5)


def test_buffers_that_a_folder_holds_are_exported(tmp_path: Path) -> None:
    """They are no parameters, so they are not among the weights that leave the trainer."""
    network = transformers.AutoModelForCausalLM.from_config(families.deepseek_v3())
    with torch.no_grad():
        network.get_buffer(families.ROUTER_BIAS).copy_(torch.tensor([0.5, -0.5, 0.25, 1.0]))
    network.save_pretrained(tmp_path / "deepseek")
    model = load_causal_lm(ModelConfig(path=str(tmp_path / "deepseek"), dtype="float32"))
    weights = {name.removeprefix("network."): weight.detach() for name, weight in model.named_parameters()}
    save_model(model, weights, tmp_path / "out", tokenizer({}))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.get_buffer(families.ROUTER_BIAS).tolist() == [0.5, -0.5, 0.25, 1.0]
