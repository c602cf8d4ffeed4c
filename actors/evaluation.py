"""What held-out responses are worth, and the file that keeps them. Imports no torch.

Invariants:

- Every prompt counts once. One with a sample that has no score (NaN: its reward failed) is left out of that column's
  numbers, and counted; it is never a zero.
- ``pass_at_k`` and ``best_of_n`` are means over all choices of k or n of a prompt's samples, so they are unbiased.
- Nothing depends on the order of the rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow as pa

from actors.errors import RoleError
from actors.rewards.face import JSON
from actors.rewards.rows import sample_texts
from algorithms.passk import expected_best, pass_at_k
from experience.schema import require_same_rows
from experience.table import join

#: The column of the run's own reward. Metrics of another column begin with its name.
SCORE = "score"
Batches = Sequence[pa.RecordBatch]


@dataclass(frozen=True)
class EvaluationRules:
    """What is computed of a column of scores.

    ``ks`` are the numbers of samples of ``pass_at_k`` and ``best_of_n``. ``thresholds`` says of a column, by name, from
    which score on a response passes; of a column that it does not name no pass is counted.
    """

    ks: tuple[int, ...]
    thresholds: Mapping[str, float]

    def metric_names(self, column: str) -> tuple[str, ...]:
        """The metrics of a column of scores, as ``evaluate`` names them."""
        names = ["score", "score_error"]
        if column in self.thresholds:
            names += [f"pass_at_{k}" for k in self.ks]
        names += [f"best_of_{k}" for k in self.ks if k > 1]
        names.append("unscored_fraction")
        return tuple(names) if column == SCORE else tuple(f"{column}/{name}" for name in names)


#: Of the responses, whatever scores them.
RESPONSE_METRICS = ("response_tokens", "response_tokens_max", "truncated_fraction")


def evaluate(rollouts: Batches, columns: Mapping[str, Batches], rules: EvaluationRules) -> dict[str, float]:
    """The metrics of some responses.

    - ``score``: mean over prompts of the mean over their samples; ``score_error``: the standard error of that mean, by
      the spread between prompts (none with fewer than two);
    - ``pass_at_k``, where the column has a threshold: the chance that one of k samples reaches it;
    - ``best_of_n``: the mean score of the best of n samples;
    - ``unscored_fraction`` of prompts that are left out; where it is 1, it stands alone;
    - ``response_tokens``, its mean, ``response_tokens_max``, ``truncated_fraction`` of samples that did not end.

    Args:
        rollouts: ROLLOUT, with the same number of samples of every prompt.
        columns: SCORES over the same rows in the same order, by name; ``score`` is the run's own.

    Raises:
        SchemaError: a column is not of the rollouts' rows.
        RoleError: there are no rows.
        AlgorithmError: one of ``ks`` is more than the samples of a prompt.
    """
    table = join(rollouts).table
    if not table.num_rows:
        raise RoleError("evaluation was given no responses")
    prompt_ids = table.column("prompt_id").to_pylist()
    lengths = [len(versions) for versions in table.column("policy_versions")]
    reasons = table.column("finish_reason").to_pylist()
    metrics = {
        "response_tokens": fmean(lengths),
        "response_tokens_max": float(max(lengths)),
        "truncated_fraction": fmean(reason == "length" for reason in reasons),
    }
    for name, parts in columns.items():
        of_column = _metrics(prompt_ids, _scores(table, parts), rules.ks, rules.thresholds.get(name))
        metrics |= of_column if name == SCORE else {f"{name}/{key}": value for key, value in of_column.items()}
    return metrics


def samples_table(
    rollouts: Batches, columns: Mapping[str, Batches], tokenizer: Any, facts: Mapping[str, str | int | float]
) -> pa.Table:
    """The responses as text with their scores, one row a sample, for people: pandas and DuckDB read it as it is.

    Special tokens stay in prompts and are left out of responses; a sample without a score has a null.

    Args:
        facts: about the whole, kept as text in the schema's metadata.

    Raises:
        SchemaError: a column is not of the rollouts' rows.
    """
    table = join(rollouts).table
    no_columns: dict[int, dict[str, JSON]] = {prompt: {} for prompt in table.column("prompt_id").to_pylist()}
    texts = sample_texts(rollouts, range(table.num_rows), no_columns, tokenizer)
    versions = table.column("policy_versions").to_pylist()
    arrays: dict[str, pa.Array | pa.ChunkedArray] = {
        "prompt_id": table.column("prompt_id"),
        "sample_id": table.column("sample_id"),
        "prompt": pa.array([text.prompt for text in texts], pa.string()),
        "response": pa.array([text.response for text in texts], pa.string()),
        "response_tokens": pa.array([len(row) for row in versions], pa.int32()),
        "policy_version": pa.array([max(row, default=-1) for row in versions], pa.int32()),
        "finish_reason": table.column("finish_reason"),
    }
    for name, parts in columns.items():
        arrays[name] = pa.array([None if math.isnan(score) else score for score in _scores(table, parts)], pa.float32())
    return pa.table(arrays).replace_schema_metadata({key: str(value) for key, value in facts.items()})


def _scores(table: pa.Table, parts: Batches) -> list[float]:
    column = pa.Table.from_batches(list(parts))
    require_same_rows(table.column("sample_id"), column)
    scores: list[float] = np.asarray(column.column("score"), dtype=np.float64).tolist()
    return scores


def _metrics(
    prompt_ids: Sequence[int], scores: Sequence[float], ks: Sequence[int], threshold: float | None
) -> dict[str, float]:
    groups: dict[int, list[float]] = defaultdict(list)
    for prompt, score in zip(prompt_ids, scores, strict=True):
        groups[prompt].append(score)
    scored = [group for _, group in sorted(groups.items()) if all(map(math.isfinite, group))]
    metrics = {"unscored_fraction": 1 - len(scored) / len(groups)}
    if not scored:
        return metrics
    means = [fmean(group) for group in scored]
    metrics["score"] = fmean(means)
    if len(means) > 1:
        metrics["score_error"] = stdev(means) / math.sqrt(len(means))
    if threshold is not None:
        passed = [(len(group), sum(score >= threshold for score in group)) for group in scored]
        metrics |= {f"pass_at_{k}": fmean(pass_at_k(number, right, k) for number, right in passed) for k in ks}
    return metrics | {f"best_of_{n}": fmean(expected_best(group, n) for group in scored) for n in ks if n > 1}
