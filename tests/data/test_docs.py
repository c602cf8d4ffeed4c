"""Every example in docs/data.md does what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.config import DataConfig
from data.dataset import Dataset
from data.formats import Kind
from data.order import Cursor
from tests.data.decoding import DecodingTokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


EXAMPLES, PAIRS, RANKED, FEEDBACK, PROMPTS = (
    [json.loads(line) for line in block.splitlines()] for block in blocks("jsonl")
)
CASES = [
    *(("examples", row) for row in EXAMPLES),
    *(("comparisons", row) for row in [*PAIRS, *RANKED]),
    *(("feedback", row) for row in [*PAIRS, *FEEDBACK]),
    *(("prompts", row) for row in [*EXAMPLES, *PAIRS, *RANKED, *FEEDBACK, *PROMPTS]),
]


@pytest.mark.parametrize(("kind", "row"), CASES, ids=[f"{kind}-{'+'.join(row)}" for kind, row in CASES])
def test_every_row_is_read(
    plain: DecodingTokenizer, chatml: DecodingTokenizer, jsonl: Callable[..., str], kind: Kind, row: dict[str, Any]
) -> None:
    for tokenizer in (plain, chatml):
        data = Dataset.from_config(DataConfig(train=jsonl(row), max_tokens=128), kind, tokenizer, seed=0)
        text = tokenizer.decode(data.draw(Cursor(), 1).batch["tokens"][0].as_py())
        assert any(word in text for word in ("Sort", "Hi", "1 + 2", "A document", "A prompt"))


def test_configurations_parse() -> None:
    for block in blocks("yaml"):
        DataConfig.model_validate(yaml.safe_load(block)["data"])


def test_python_runs(
    jsonl: Callable[..., str], plain: DecodingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(plain.name_or_path)
    jsonl({"prompt": "a", "completion": "b"}, name="data/ours.jsonl")
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(block, {})


def test_every_option_is_explained() -> None:
    missing = [name for name in DataConfig.model_fields if name not in PAGE]
    assert not missing
