"""Responses behind the prompts of others: whose they are, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from data.config import DataConfig
from data.dataset import Dataset
from data.mismatch import MOST_STEPS
from data.order import Cursor
from experience.schema import FEEDBACK, check_schema
from tests.data.decoding import DecodingTokenizer

NUM_ROWS = 40


def rows(count: int, start: int = 0) -> list[dict[str, object]]:
    """Each response names its prompt; some of them are longer."""
    return [
        {"prompt": f"prompt {n}", "completion": f" answer {n}" + " cat" * (n % 3), "label": n % 3 == 0}
        for n in range(start, start + count)
    ]


def make(tokenizer: DecodingTokenizer, train: str, seed: int = 0, **more: Any) -> Dataset:
    config = DataConfig(train=train, max_tokens=64, **more)
    return Dataset.from_config(config, "feedback", tokenizer, seed=seed)


def by_row(batch: pa.RecordBatch) -> dict[int, list[int]]:
    return dict(zip(batch["sequence_id"].to_pylist(), batch["mismatched_tokens"].to_pylist(), strict=True))


def parts(batch: pa.RecordBatch) -> dict[int, tuple[list[int], list[int]]]:
    """Prompt and response of each row."""
    taken = zip(batch["sequence_id"], batch["tokens"], batch["num_prompt_tokens"], strict=True)
    return {row.as_py(): (t.as_py()[: n.as_py()], t.as_py()[n.as_py() :]) for row, t, n in taken}


def partner_of(row: int, batch: pa.RecordBatch) -> int:
    """The row whose response, perhaps cut, stands behind the prompt of ``row``."""
    both, mismatched = parts(batch), by_row(batch)
    prompt = both[row][0]
    response = mismatched[row][len(prompt) :]
    assert mismatched[row][: len(prompt)] == prompt and response
    (found,) = (other for other, (_, whole) in both.items() if whole[: len(response)] == response)
    return found


def test_each_prompt_has_the_response_of_another_row_and_each_response_one_prompt(
    plain: DecodingTokenizer, jsonl: Callable[..., str]
) -> None:
    batch = make(plain, jsonl(*rows(NUM_ROWS))).in_order().batch
    check_schema(batch, FEEDBACK)
    partners = [partner_of(row, batch) for row in range(NUM_ROWS)]
    assert sorted(partners) == list(range(NUM_ROWS))
    assert all(row != partner for row, partner in enumerate(partners))
    assert max(map(len, batch["mismatched_tokens"].to_pylist())) <= max(map(len, batch["tokens"].to_pylist()))


def test_it_depends_on_the_data_alone(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    """Not on seed, epoch, batch or the order of a draw; nor on what is held out."""
    path, heldout = jsonl(*rows(NUM_ROWS)), jsonl(*rows(9, 100), name="heldout.jsonl")
    expected = by_row(make(plain, path).in_order().batch)
    other = make(plain, path, seed=5, heldout=heldout)
    cursor = Cursor()
    for size in (7, 33, 40):
        drawn = other.draw(cursor, size)
        cursor = drawn.next_cursor
        assert by_row(drawn.batch).items() <= expected.items()
    assert by_row(other.in_order(0, NUM_ROWS).batch) == expected
    own = by_row(other.heldout().batch)
    assert own == by_row(other.in_order(NUM_ROWS).batch)
    assert all(partner_of(row, other.heldout().batch) in own for row in own)


def test_another_answer_to_the_same_prompt_is_passed_over(
    plain: DecodingTokenizer, jsonl: Callable[..., str]
) -> None:
    """As of pairs, each of which counts as two responses to one prompt."""
    pairs = [{"prompt": f"prompt {n}", "chosen": f" cat {n}", "rejected": f" dog {n}"} for n in range(6)]
    batch = make(plain, jsonl(*pairs)).in_order().batch
    assert batch["desirable"].to_pylist() == [True, False] * 6
    for row in range(12):
        assert partner_of(row, batch) // 2 != row // 2


def test_rows_that_all_have_one_prompt_are_left_with_it(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    same = [{"prompt": "the", "completion": f" answer {n}", "label": True} for n in range(MOST_STEPS + 3)]
    batch = make(plain, jsonl(*same)).in_order().batch
    assert np.all([row != partner_of(row, batch) for row in range(len(same))])
    alone = make(plain, jsonl(*same[:1])).in_order().batch
    assert by_row(alone)[0] == batch["tokens"][0].as_py()
