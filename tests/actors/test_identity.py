"""The digest of a model: the same wherever it lies, another one where it computes something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from actors.config import ModelConfig
from actors.identity import DIGEST_BUCKET_BYTES, configuration_of, model_digest
from actors.models import load_causal_lm
from actors.tuning import weight_sources
from tests.actors import families, tiny_models

#: How a model with code of its own is loaded.
BROUGHT: dict[str, Any] = {"attention": "eager", "trust_remote_code": True}


def digest(folder: Path, bucket: int = DIGEST_BUCKET_BYTES, **model: Any) -> str:
    loaded = load_causal_lm(ModelConfig(path=str(folder), **({"dtype": "float32"} | model)))
    weights = [(source.name, source.value()) for source in weight_sources(loaded, None)]
    buckets = [weights] if bucket > 1 else [[weight] for weight in weights]
    return model_digest(configuration_of(loaded), buckets)


def changed(folder: Path, place: Path, **keys: Any) -> Path:
    """A copy of a model with other keys in its config.json."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | keys))
    return place


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("identity") / "qwen2", "qwen2")


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {"rms_norm_eps": 1e-3},
    ],
    ids=["rope_theta", "rope_scaling", "window", "norm_eps"],
)
def test_another_configuration_of_the_same_weights_is_another_model(
    keys: dict[str, Any], qwen: Path, tmp_path: Path
) -> None:
    assert digest(changed(qwen, tmp_path / "changed", **keys)) != digest(qwen)


def test_attention_and_precision_are_told_apart(qwen: Path) -> None:
    assert len({digest(qwen), digest(qwen, attention="eager"), digest(qwen, dtype="bfloat16")}) == 3


def test_what_changes_no_output_changes_no_digest(qwen: Path, tmp_path: Path) -> None:
    """Nor does writing out a default, or how the weights are cut into buckets."""
    elsewhere = changed(
        qwen, tmp_path / "elsewhere", use_cache=False, transformers_version="4.0.0", rms_norm_eps=1e-6, dtype="bfloat16"
    )
    assert digest(elsewhere) == digest(qwen) == digest(qwen, bucket=1)


def test_what_only_training_and_generation_ask_for_changes_no_digest(qwen: Path, tmp_path: Path) -> None:
    """Tokens that end, begin and pad, how weights would be drawn, and what is dropped in training."""
    ids = {"eos_token_id": [1, 2], "pad_token_id": None, "bos_token_id": 5}
    rates = {"attention_dropout": 0.1, "classifier_dropout": 0.1}
    assert digest(changed(qwen, tmp_path / "changed", **ids, **rates, initializer_range=0.5)) == digest(qwen)
    gpt2 = tiny_models.write(tmp_path / "gpt2", "gpt2")
    rates = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    assert digest(changed(gpt2, tmp_path / "dropping", **rates)) == digest(gpt2)


def test_padding_that_positions_are_counted_by_is_part_of_the_model(tmp_path: Path) -> None:
    """XGLM's first position is the one behind the padding's number."""
    config = transformers.XGLMConfig(
        vocab_size=64, d_model=32, ffn_dim=64, num_layers=1, attention_heads=2, max_position_embeddings=64
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "xglm")
    other = changed(tmp_path / "xglm", tmp_path / "changed", pad_token_id=3)
    assert digest(other, attention="eager") != digest(tmp_path / "xglm", attention="eager")


@pytest.fixture(scope="module")
def baichuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with code, of which a part is in a helper's file, and a part in a helper's helper."""
    place = tmp_path_factory.mktemp("identity")
    # A copy: Transformers loads the code of one folder once in a process.
    folder = changed(families.write_remote(place / "baichuan", "baichuan"), place / "with_helpers")
    code = folder / "modeling_baichuan.py"
    code.write_text(code.read_text().replace("\nimport ", "\nfrom .helper import SCALE  # noqa\nimport ", 1))
    (folder / "helper.py").write_text("from .inner import SCALE\n")
    (folder / "inner.py").write_text("SCALE = 1.0\n")
    return folder


@pytest.mark.parametrize("file", ["modeling_baichuan.py", "configuration_baichuan.py", "helper.py", "inner.py"])
def test_every_file_of_the_code_that_a_model_brings_is_in_its_digest(file: str, baichuan: Path, tmp_path: Path) -> None:
    same, other = changed(baichuan, tmp_path / "same"), changed(baichuan, tmp_path / "other")
    (other / file).write_text((other / file).read_text() + "\n# other code\n")
    (same / "tokenization_baichuan.py").write_text("# not of the model\n")
    assert digest(other, **BROUGHT) != digest(baichuan, **BROUGHT) == digest(same, **BROUGHT)


def test_code_that_a_model_brings_may_read_any_key(baichuan: Path, tmp_path: Path) -> None:
    assert digest(changed(baichuan, tmp_path / "changed", bos_token_id=7), **BROUGHT) != digest(baichuan, **BROUGHT)


def test_buffers_that_a_folder_holds_are_part_of_the_model(tmp_path: Path) -> None:
    """DeepSeek-V3 chooses its experts by a bias that no gradient moves."""
    folder = tmp_path / "deepseek"
    network = transformers.AutoModelForCausalLM.from_config(families.deepseek_v3())
    network.save_pretrained(folder)
    before = digest(folder)
    assert digest(folder) == before
    with torch.no_grad():
        network.get_buffer(families.ROUTER_BIAS).fill_(0.5)
    network.save_pretrained(folder)
    assert digest(folder) != before


def test_other_weights_are_another_model(qwen: Path, tmp_path: Path) -> None:
    assert digest(tiny_models.write(tmp_path / "other", "qwen2", seed=1)) != digest(qwen)
