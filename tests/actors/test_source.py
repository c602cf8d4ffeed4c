"""The source role, called as the plain class it is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.config import ModelConfig
from actors.source import SourceActor
from cluster.context import RankContext
from data.config import DataConfig
from data.errors import DataError, TokenizerError
from experience.schema import COMPARISONS, PROMPTS, check_schema

CONTEXT = RankContext(
    role="source",
    rank=0,
    num_ranks=1,
    local_rank=0,
    master_address="127.0.0.1",
    master_port=0,
    device="cpu",
    num_threads=1,
    log_dir=None,
    seed=0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    words = {word: number for number, word in enumerate(["</s>", "list", "sorted", *map(str, range(40))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture
def preferences(tmp_path: Path) -> str:
    path = tmp_path / "preferences.jsonl"
    rows = [{"prompt": f"list {n}", "chosen": f" {n}", "rejected": " 0 0"} for n in range(1, 31)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_prompts_are_drawn_and_drawn_again_from_a_cursor(model: ModelConfig, preferences: str) -> None:
    source = SourceActor(CONTEXT, DataConfig(train=preferences, max_tokens=8), "prompts", model, seed=3)
    description = pickle.loads(pickle.dumps(source.describe()))
    assert (description.num_rows, description.num_heldout_rows, description.longest) == (30, 0, 2)
    batch, info = source.next_batch(description.first_cursor, 20)
    check_schema(batch, PROMPTS)
    assert (info.num_rows, info.num_tokens, info.ids, info.lengths) == (20, 40, tuple(range(20)), (2,) * 20)
    second, after = source.next_batch(info.next_cursor, 20)
    assert after.ids == tuple(range(20, 40))
    other = SourceActor(CONTEXT, DataConfig(train=preferences, max_tokens=8), "prompts", model, seed=3)
    assert other.next_batch(info.next_cursor, 20)[0].equals(second)
    assert other.describe() == source.describe()
    first_epoch = batch["source"].to_pylist() + second["source"].to_pylist()[:10]
    assert len(set(first_epoch)) == 30


def test_comparisons_count_as_one_row_of_two(model: ModelConfig, preferences: str) -> None:
    config = DataConfig(train=preferences, max_tokens=8, heldout_fraction=0.3)
    source = SourceActor(CONTEXT, config, "comparisons", model, seed=0)
    description = source.describe()
    batch, info = source.next_batch(description.first_cursor, 5)
    check_schema(batch, COMPARISONS)
    assert (batch.num_rows, info.num_rows, len(info.ids), len(info.lengths)) == (10, 5, 5, 10)
    assert info.lengths == (4, 5) * 5
    heldout, heldout_info = source.heldout()
    assert heldout.num_rows == 2 * heldout_info.num_rows == 2 * description.num_heldout_rows > 0
    assert description.num_rows + description.num_heldout_rows == 30
    parts = [source.heldout(start, 4)[0] for start in range(0, description.num_heldout_rows, 4)]
    assert [row for part in parts for row in part.to_pylist()] == heldout.to_pylist()


def test_no_held_out_rows_are_an_empty_batch(model: ModelConfig, preferences: str) -> None:
    source = SourceActor(CONTEXT, DataConfig(train=preferences, max_tokens=8), "comparisons", model, seed=0)
    batch, info = source.heldout()
    assert (batch.num_rows, info.num_rows) == (0, 0)


def test_failures_say_what_is_wrong(model: ModelConfig, preferences: str, tmp_path: Path) -> None:
    config = DataConfig(train=preferences, max_tokens=8)
    with pytest.raises(TokenizerError, match=f"tokenizer {tmp_path}/absent: no such folder"):
        SourceActor(CONTEXT, config, "prompts", ModelConfig(path=str(tmp_path / "absent")), seed=0)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="the folder holds no tokenizer that loads"):
        SourceActor(CONTEXT, config, "prompts", ModelConfig(path=str(tmp_path)), seed=0)
    source = SourceActor(CONTEXT, config, "prompts", model, seed=0)
    with pytest.raises(DataError, match="not a data cursor"):
        source.next_batch("page 3", 1)
