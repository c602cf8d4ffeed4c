"""The digest of a model: the same wherever it lies, another one where it computes something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.config import ModelConfig
from actors.identity import DIGEST_BUCKET_BYTES, configuration_of, model_digest
from actors.models import load_causal_lm
from actors.tuning import weight_sources
from tests.actors import tiny_models


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


def test_other_weights_are_another_model(qwen: Path, tmp_path: Path) -> None:
    assert digest(tiny_models.write(tmp_path / "other", "qwen2", seed=1)) != digest(qwen)
