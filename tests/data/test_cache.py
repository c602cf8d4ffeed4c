"""Tokenised data in files: what is drawn from them is what is drawn from memory, and what is damaged is built anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache import DESCRIPTION
from data.config import DataConfig
from data.dataset import Dataset, list_offsets
from data.errors import DataError, RowError
from data.formats import Kind
from data.order import Cursor
from tests.data.decoding import DecodingTokenizer

RESPONSES = [" cat", " dog", " log on the mat"]
ROWS: dict[Kind, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"{n} the", "answer": "é" * n} for n in range(30)],
    "examples": [{"prompt": f"{n} the", "completion": " cat" * (1 + n % 5)} for n in range(30)],
    "comparisons": [
        {"prompt": f"{n} the", "responses": RESPONSES[: 2 + n % 2], "scores": [n, 3, 9][: 2 + n % 2], "margin": n / 4}
        | ({"rating": "bétter"} if n % 4 else {})
        for n in range(30)
    ],
    "feedback": [{"prompt": f"{n} the", "completion": " cat" * (1 + n % 3), "label": n % 3 == 0} for n in range(30)],
}
KINDS = list(ROWS)


def make(
    tokenizer: DecodingTokenizer,
    kind: Kind,
    path: str,
    cache: Path | None,
    whole_document: bool = False,
    **more: Any,
) -> Dataset:
    kept = {"keep_columns": ("answer",)} if kind == "prompts" else {}
    folder = None if cache is None else str(cache)
    config = DataConfig(train=path, max_tokens=32, heldout_fraction=0.3, cache_dir=folder, **kept, **more)
    return Dataset.from_config(config, kind, tokenizer, seed=1, whole_document=whole_document)


def require_same(found: Dataset, wanted: Dataset) -> None:
    assert found.draw(Cursor(1, 3), 40).batch.equals(wanted.draw(Cursor(1, 3), 40).batch)
    assert found.in_order().batch.equals(wanted.in_order().batch)
    assert found.heldout(1, 4).batch.equals(wanted.heldout(1, 4).batch) and wanted.num_heldout_rows > 2
    assert (found.digest(), found.fingerprint()) == (wanted.digest(), wanted.fingerprint())
    assert (found.train_facts, found.heldout_facts) == (wanted.train_facts, wanted.heldout_facts)
    assert found.counts == wanted.counts


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_memory_holds(
    kind: Kind, plain: DecodingTokenizer, jsonl: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, cache = jsonl(*ROWS[kind]), tmp_path / "cache"
    wanted = make(plain, kind, path, None)
    with caplog.at_level("INFO"):
        for again in (False, True):  # as written, and as found again
            caplog.clear()
            require_same(make(plain, kind, path, cache), wanted)
            assert any("tokenised before" in message for message in caplog.messages)
            assert any("columns not used" in message for message in caplog.messages) is not again, "read again"
    assert [place.name for place in cache.iterdir() if place.name.startswith(".")] == []


def test_documents_in_files(plain: DecodingTokenizer, tmp_path: Path) -> None:
    """Sequences that are packed, or pieces, of many documents."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} the cat sat on the mat\n" * (1 + n % 7) for n in range(40)))
    for documents in ("packed", "pieces", "separate"):
        settings: dict[str, Any] = {"documents": documents, "whole_document": True}
        wanted = make(plain, "examples", str(path), None, **settings)
        require_same(make(plain, "examples", str(path), tmp_path / "cache", **settings), wanted)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def described(place: Path, text: str) -> None:
    (place / DESCRIPTION).write_text(text)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "tokens cut": lambda place: cut(place / "train" / "tokens"),
    "ranks cut": lambda place: cut(place / "train" / "rank"),
    "rating gone": lambda place: (place / "heldout" / "rating").unlink(),
    "description cut": lambda place: cut(place / DESCRIPTION),
    "description gone": lambda place: (place / DESCRIPTION).unlink(),
    "another description": lambda place: described(place, json.dumps({"train": {}})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_built_anew(
    damage: str,
    plain: DecodingTokenizer,
    jsonl: Callable[..., str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, cache = jsonl(*ROWS["comparisons"]), tmp_path / "cache"
    wanted = make(plain, "comparisons", path, None)
    make(plain, "comparisons", path, cache)
    (place,) = cache.iterdir()
    DAMAGES[damage](place)
    found = make(plain, "comparisons", path, cache)
    assert any(f"{place}: damaged, and built anew" in message for message in caplog.messages)
    require_same(found, wanted)
    caplog.clear()
    make(plain, "comparisons", path, cache)
    assert not any("damaged" in message for message in caplog.messages)


def test_other_files_settings_and_kinds_are_other_tables(
    plain: DecodingTokenizer, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    path = jsonl(*ROWS["examples"])
    make(plain, "examples", path, cache)
    make(plain, "examples", path, cache, learn_from="everything")
    make(plain, "prompts", jsonl(*ROWS["prompts"], name="p.jsonl"), cache)
    assert len(list(cache.iterdir())) == 3
    assert make(plain, "examples", jsonl(*ROWS["examples"][:20]), cache).counts[0].read == 20
    assert len(list(cache.iterdir())) == 4


def test_lists_of_a_batch_end_where_an_offset_can_say() -> None:
    """Beyond it a 32-bit offset would begin again below zero."""
    lengths = np.array([3, 0, 4], np.int64)
    assert list_offsets(lengths, most=7).to_pylist() == [0, 3, 3, 7]
    with pytest.raises(DataError, match="3 sequences of 7 tokens in one batch, which takes 6: draw fewer at once"):
        list_offsets(lengths, most=6)
    huge = np.array([2**30, 2**30], np.int64)
    with pytest.raises(DataError, match="2 sequences of 2,147,483,648 tokens in one batch, which takes 2,147,483,647"):
        list_offsets(huge)


def test_the_first_rows_are_read_and_no_more(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    """A row that would end the run stands behind them; rows that are left out do not count."""
    long = {"prompt": "the", "completion": " cat" * 40}
    first = jsonl(*ROWS["examples"][:3], long, name="a.jsonl")
    second = jsonl(*ROWS["examples"][3:6], "broken", name="b.jsonl")
    config = DataConfig(train=[first, second, "/none.jsonl"], max_tokens=32)
    data = Dataset.first_rows(config, "examples", plain, 6)
    assert [(counts.read, counts.too_long, counts.train) for counts in data.counts] == [(4, 1, 3), (3, 0, 3)]
    wanted = Dataset.from_config(DataConfig(train=jsonl(*ROWS["examples"]), max_tokens=32), "examples", plain, seed=0)
    assert data.in_order().batch.equals(wanted.in_order(0, 6).batch)
    with pytest.raises(RowError, match=r"b\.jsonl:4: not JSON"):
        Dataset.first_rows(config, "examples", plain, 7)
