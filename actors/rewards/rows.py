"""From a batch of rollouts to the samples that a reward over text is given.

Invariant: prompt and response together are the text of the sample's tokens. A prompt keeps its special tokens, which
are its chat template's; a response loses them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from actors.rewards.face import JSON, RewardSample
from experience.schema import PROMPTS, ROLLOUT, SchemaError, check_schema

Columns = Mapping[int, Mapping[str, JSON]]


def kept_columns(prompts: Sequence[pa.RecordBatch]) -> dict[int, dict[str, JSON]]:
    """The other columns of each prompt's row, by ``prompt_id``.

    Raises:
        SchemaError: a batch is not one of prompts.
    """
    found: dict[int, dict[str, JSON]] = {}
    for batch in prompts:
        check_schema(batch, PROMPTS)
        texts = batch.column("columns").to_pylist()
        found.update(zip(batch.column("prompt_id").to_pylist(), map(json.loads, texts), strict=True))
    return found


def tagged(
    rollouts: Sequence[pa.RecordBatch], prompts: Sequence[pa.RecordBatch], column: str, values: Sequence[JSON]
) -> list[bool]:
    """For each sample whether its prompt's ``column`` holds one of ``values``: the tag of safety prompts, for one.

    Raises:
        SchemaError: a sample's prompt is not there, or its row does not keep that column.
    """
    columns = kept_columns(prompts)
    found = []
    for rollout in rollouts:
        for prompt_id in rollout.column("prompt_id").to_pylist():
            row = _row_of(columns, prompt_id)
            if column not in row:
                raise SchemaError(f"prompt {prompt_id}: no column {column!r} is kept: name it in data.keep_columns")
            found.append(row[column] in values)
    return found


def sample_texts(
    rollouts: Sequence[pa.RecordBatch], own: range, columns: Columns, tokenizer: Any
) -> list[RewardSample]:
    """The samples of the rows ``own`` of all rollouts, decoded. An episode's response is all behind its prompt.

    Args:
        columns: of each prompt's row, by its id.
        tokenizer: the policy's.

    Raises:
        SchemaError: a batch is not one of rollouts, or a sample's prompt is not there.
    """
    for rollout in rollouts:
        check_schema(rollout, ROLLOUT)
    table = pa.Table.from_batches(rollouts, ROLLOUT).slice(own.start, len(own))
    special = set(tokenizer.all_special_ids)
    names = ("prompt_id", "tokens", "num_prompt_tokens", "finish_reason")
    samples = []
    for prompt_id, tokens, num_prompt, reason in zip(*(table.column(name).to_pylist() for name in names), strict=True):
        answered = [token for token in tokens[num_prompt:] if token not in special]
        prompt, response = _texts(tokenizer, tokens[:num_prompt], answered)
        samples.append(RewardSample(prompt, response, reason == "stop", _row_of(columns, prompt_id)))
    return samples


def _texts(tokenizer: Any, prompt: list[int], response: list[int]) -> tuple[str, str]:
    """Both texts. The response's begins as it does behind the prompt: decoded alone it may lose a leading blank."""

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, whole = decoded(prompt), decoded(prompt + response)
    return before, whole[len(before) :] if whole.startswith(before) else decoded(response)


def _row_of(columns: Columns, prompt_id: int) -> Mapping[str, JSON]:
    if prompt_id not in columns:
        raise SchemaError(f"prompt {prompt_id} of a sample is not among the prompts that were given with it")
    return columns[prompt_id]
