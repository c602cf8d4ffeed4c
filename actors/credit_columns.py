"""The columns of an iteration as credit assignment reads them, checked.

Legend: N samples, T response tokens of all of them laid end to end.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from actors.errors import RoleError
from experience.schema import SchemaError
from experience.tensors import list_column, scalar_column
from experience.turns import Turns


class NotFinite(RoleError):
    """A score, value or log-prob is NaN or infinite."""


@dataclass(frozen=True)
class CreditColumns:
    """The columns of N samples with T response tokens in all; numbers in float64. None: that role is not there."""

    sample_ids_N: Tensor
    prompt_ids_N: Tensor
    offsets: Tensor
    turn_offsets: Tensor
    baseline_scores_N: Tensor | None
    finished_N: Tensor
    staleness_T: Tensor
    rollout_logprobs_T: Tensor
    ref_logprobs_T: Tensor | None
    values_T: Tensor | None
    policy_logprobs_T: Tensor | None

    @property
    def behaviour_logprobs_T(self) -> Tensor:
        """What the ratio divides by: recomputed by the policy's ranks where configured, else the engine's own."""
        return self.rollout_logprobs_T if self.policy_logprobs_T is None else self.policy_logprobs_T


def read_columns(table: pa.Table, policy_version: int) -> CreditColumns:
    """A joined table's columns.

    Raises:
        SchemaError: there are no rows, a response is empty or ended for an unknown reason, or a token was drawn by a
            version after ``policy_version``.
        NotFinite: a number is NaN or infinite.
    """
    logprobs, versions = list_column(table, "rollout_logprobs"), list_column(table, "policy_versions")
    sample_ids = table.column("sample_id").to_pylist()
    if not sample_ids:
        raise SchemaError("experience: no rows to assign credit to")
    for sample, length in zip(sample_ids, logprobs.lengths.tolist(), strict=True):
        if length == 0:
            raise SchemaError(f"experience: the response of sample {sample} has no token to carry its score")
    reasons = table.column("finish_reason").to_pylist()
    for sample, reason in zip(sample_ids, reasons, strict=True):
        if reason not in ("stop", "length"):
            raise SchemaError(f"experience: finish_reason of sample {sample} is {reason!r}; it is stop or length")
    staleness_T = policy_version - versions.values
    if bool((ahead := staleness_T < 0).any()):
        row = _row_of(versions.offsets, token := int(ahead.nonzero()[0]))
        drawn = f"sample {sample_ids[row]} has a token of policy version {int(versions.values[token])}"
        raise SchemaError(f"experience: {drawn}, but training starts from version {policy_version}")

    def per_token(name: str) -> Tensor | None:
        return list_column(table, name).values.double() if name in table.column_names else None

    baselines = "baseline_score" in table.column_names
    columns = CreditColumns(
        sample_ids_N=torch.tensor(sample_ids, dtype=torch.int64),
        prompt_ids_N=scalar_column(table, "prompt_id"),
        offsets=logprobs.offsets,
        turn_offsets=Turns.of_rollouts(table).turn_offsets,
        baseline_scores_N=scalar_column(table, "baseline_score").double() if baselines else None,
        finished_N=torch.tensor([reason == "stop" for reason in reasons]),
        staleness_T=staleness_T,
        rollout_logprobs_T=logprobs.values.double(),
        ref_logprobs_T=per_token("ref_logprobs"),
        values_T=per_token("values"),
        policy_logprobs_T=per_token("policy_logprobs"),
    )
    _require_finite(columns)
    return columns


def _row_of(offsets: Tensor, token: int) -> int:
    """The row that a token of the packed values belongs to."""
    return int(torch.searchsorted(offsets, token, right=True)) - 1


def _require_finite(columns: CreditColumns) -> None:
    per_token = {
        "rollout_logprobs": columns.rollout_logprobs_T,
        "ref_logprobs": columns.ref_logprobs_T,
        "values": columns.values_T,
        "policy_logprobs": columns.policy_logprobs_T,
    }
    for name, column_T in per_token.items():
        if column_T is None or not bool((wrong := ~column_T.isfinite()).any()):
            continue
        row = _row_of(columns.offsets, token := int(wrong.nonzero()[0]))
        sample, at = int(columns.sample_ids_N[row]), token - int(columns.offsets[row])
        value = float(column_T[token])
        raise NotFinite(f"sample {sample}: {name} of response token {at} is {value}; it must be a finite number")
    if (column_N := columns.baseline_scores_N) is not None and bool((wrong := ~column_N.isfinite()).any()):
        row = int(wrong.nonzero()[0])
        sample, score = int(columns.sample_ids_N[row]), float(column_N[row])
        raise NotFinite(f"sample {sample}: baseline_score is {score}; a reward model must give a finite number")
