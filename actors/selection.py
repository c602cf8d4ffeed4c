"""Which prompts of a slice are worth learning from, and the rows that are left without the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.rollout import RolloutInfo
from algorithms.group_advantages import groups_without_signal
from experience.schema import BASELINE_SCORES, ROLLOUT, SchemaError, check_schema, make_batch, require_same_rows

Batches = Sequence[pa.RecordBatch]


def prompts_without_signal(table: pa.Table, scores_N: Tensor) -> tuple[int, ...]:
    """Of joined rollouts and their scores (N,), the prompts whose scores are all equal, in order of first samples."""
    prompt_ids = table.column("prompt_id").to_pylist()
    without_N = groups_without_signal(scores_N, torch.tensor(prompt_ids, dtype=torch.int64)).tolist()
    return tuple(dict.fromkeys(prompt for prompt, none in zip(prompt_ids, without_N, strict=True) if none))


def rows_of_prompts(
    columns: Batches, rollouts: Batches, prompt_ids: Sequence[int]
) -> tuple[pa.RecordBatch, RolloutInfo]:
    """The rows of ``columns`` whose samples answer one of some prompts, and what the driver knows of these samples.

    Raises:
        SchemaError: the columns are not of the rollouts' rows, or nothing is left.
    """
    for rollout in rollouts:
        check_schema(rollout, ROLLOUT)
    table, whole = pa.Table.from_batches(list(columns)), pa.Table.from_batches(list(rollouts))
    require_same_rows(whole.column("sample_id"), table)
    mask = np.isin(whole.column("prompt_id").to_numpy(), np.asarray(prompt_ids, dtype=np.int64))
    if not mask.any():
        raise SchemaError(f"none of the {len(mask)} samples answers prompts {list(prompt_ids)[:3]}")
    kept, samples = table.filter(pa.array(mask)), whole.filter(pa.array(mask))
    versions = np.asarray(samples.column("policy_versions").combine_chunks().flatten())
    info = RolloutInfo(
        prompt_ids=tuple(dict.fromkeys(samples.column("prompt_id").to_pylist())),
        num_samples=kept.num_rows,
        num_tokens=len(versions),
        oldest_version=int(versions.min()),
        newest_version=int(versions.max()),
        seconds=0.0,
    )
    (batch,) = kept.combine_chunks().to_batches()
    return batch, info


def baseline_column(
    rollouts: Batches, baseline_prompts: Sequence[int], baseline_scores: Sequence[float]
) -> tuple[pa.RecordBatch, int]:
    """BASELINE_SCORES of the rollouts' rows, each by its prompt, and how many.

    Raises:
        SchemaError: a prompt has no baseline, or two.
    """
    score_of = dict(zip(baseline_prompts, baseline_scores, strict=True))
    if len(score_of) < len(baseline_prompts):
        raise SchemaError(f"{len(baseline_prompts)} baselines of {len(score_of)} prompts; each prompt has one")
    prompts = [prompt for rollout in rollouts for prompt in rollout.column("prompt_id").to_pylist()]
    if missing := [prompt for prompt in prompts if prompt not in score_of]:
        raise SchemaError(f"prompt {missing[0]} has no baseline")
    ids = [sample for rollout in rollouts for sample in rollout.column("sample_id").to_pylist()]
    scores = [score_of[prompt] for prompt in prompts]
    return make_batch(BASELINE_SCORES, {"sample_id": ids, "baseline_score": scores}), len(ids)
