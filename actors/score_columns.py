"""The scores of all rewards over the same samples: how they travel, and what they come to.

Invariants:

- Scores travel as one list of SCORES batches, reward after reward in the order of their names; those of each reward
  laid end to end have the rows of the rollouts.
- A run whose only reward is called ``reward`` has a column ``score``. Else each has ``score_NAME``, and ``score`` is
  what they were combined to.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import torch
from torch import Tensor

from actors.credit_columns import NotFinite
from actors.rewards.combination import COMBINED, Responses, Total, total_scores
from actors.rewards.combination_config import LinearConfig, PiecewiseConfig, RepetitionConfig, TotalConfig
from actors.rewards.rows import tagged
from algorithms.moments import RunningMoments
from experience.schema import SCORES, SchemaError, check_schema, make_batch, require_same_rows
from experience.tensors import list_column, scalar_column

Batches = Sequence[pa.RecordBatch]

#: The only reward of a run, where the configuration gives it no name.
UNNAMED = "reward"
#: The sum of what an environment gave stands among the rewards under this name.
ENVIRONMENT = "environment"
#: Stands among the rewards where prompts of safety are tagged: 1 for a sample of such a prompt, else 0.
SAFETY_PROMPTS = "safety_prompts"


def score_names(rewards: Sequence[str], total: TotalConfig) -> tuple[str, ...]:
    """What scores travel under, in order: the rewards, and the tag of safety prompts where one is wanted."""
    return (*rewards, SAFETY_PROMPTS) if wants_tag(total) else tuple(rewards)


def wants_tag(total: TotalConfig) -> bool:
    """Whether the combination looks at a column of the prompts' rows."""
    return isinstance(total.combine, PiecewiseConfig) and total.combine.tag_column is not None


def safety_prompts(rollouts: Batches, prompts: Batches, total: TotalConfig) -> pa.RecordBatch:
    """SCORES of the rollouts' rows that say which prompts are of safety.

    Raises:
        SchemaError: a prompt's row is not there, or keeps no such column.
    """
    rule = total.combine
    assert isinstance(rule, PiecewiseConfig) and rule.tag_column is not None, "wants_tag says so"
    tags = tagged(rollouts, prompts, rule.tag_column, rule.tag_values)
    ids = [sample for rollout in rollouts for sample in rollout.column("sample_id").to_pylist()]
    return make_batch(SCORES, {"sample_id": ids, "score": [float(tag) for tag in tags]})


class Totals:
    """Takes the scores of some rewards to one score a sample."""

    def __init__(self, rewards: Sequence[str], total: TotalConfig, max_response_tokens: int) -> None:
        self._names = score_names(rewards, total)
        self._config = total
        self._max_response_tokens = max_response_tokens

    def read(self, scores: Batches, sample_ids: pa.ChunkedArray, *, finite: bool = True) -> dict[str, Tensor]:
        """The scores (N,) of each name, in float64; with ``finite`` every one of them must be.

        Raises:
            SchemaError: they are of other rows.
            NotFinite: a score is NaN or infinite.
        """
        found = self._read(scores, sample_ids)
        for name, scores_N in found.items():
            if finite and bool((wrong := ~scores_N.isfinite()).any()):
                row = int(wrong.nonzero()[0])
                raise NotFinite(
                    f"sample {sample_ids[row].as_py()}: {self.column_of(name)} is {float(scores_N[row])}; a reward "
                    "model must give a finite number"
                )
        return found

    def combined_or_nan(self, table: pa.Table, scores: Batches) -> Tensor:
        """``combined`` (N,), NaN where a reward has no score, of joined rollouts and their scores.

        Raises:
            SchemaError: the scores are of other rows.
        """
        found = self._read(scores, table.column("sample_id"))
        scored_N = torch.stack([scores_N.isfinite() for scores_N in found.values()]).all(0)
        combined_N = self.combined(table, {name: scores_N.nan_to_num() for name, scores_N in found.items()})
        return combined_N.where(scored_N, torch.nan)

    def _read(self, scores: Batches, sample_ids: pa.ChunkedArray) -> dict[str, Tensor]:
        found = _by_name(scores, self._names, len(sample_ids))
        for batches in found.values():
            require_same_rows(sample_ids, pa.Table.from_batches(batches, SCORES))
        return {name: scalar_column(batches, "score").double() for name, batches in found.items()}

    def column_of(self, name: str) -> str:
        """The column of kept experience that holds the scores of a name."""
        return "score" if self._names == (UNNAMED,) else f"score_{name}"

    def of(
        self, table: pa.Table, scores: Mapping[str, Tensor], moments: Mapping[str, RunningMoments] | None = None
    ) -> Total:
        """One score for each sample of joined rollouts, shaped.

        Raises:
            AlgorithmError: the configuration is of other rewards.
        """
        return _total(self._config, table, scores, self._max_response_tokens, moments)

    def weights(
        self,
        name: str,
        table: pa.Table,
        scores: Mapping[str, Tensor],
        moments: Mapping[str, RunningMoments] | None = None,
    ) -> Tensor:
        """What one more of a reward adds to each sample's shaped score (N,): the score's derivative by it.

        With rewards that are added up it is the reward's weight, over the deviation where scores are normalised, and 0
        where a clip or a truncation puts another number in the score's place. Without: 0.

        Args:
            moments: as ``of`` was given them.
        """
        own_N = scores[name].detach().clone().requires_grad_()
        if not isinstance(self._config.combine, LinearConfig):
            return torch.zeros_like(own_N)
        shaped_N = self.of(table, {**scores, name: own_N}, moments).scores_N
        return torch.autograd.grad(shaped_N.sum(), own_N)[0]

    def combined(self, table: pa.Table, scores: Mapping[str, Tensor]) -> Tensor:
        """What the rewards come to (N,) before anything looks at length, form, or other samples."""
        rule = self._config.combine
        if isinstance(rule, PiecewiseConfig):
            rule = rule.model_copy(update={"whiten": False})
        return _total(TotalConfig(combine=rule), table, scores, self._max_response_tokens, None).scores_N

    def with_scores(self, table: pa.Table, scores: Mapping[str, Tensor], total: Total) -> pa.Table:
        """A table with each reward's scores, and what they were combined to."""
        columns = {self.column_of(name): scores_N for name, scores_N in scores.items()}
        columns.setdefault("score", total.terms[COMBINED])
        for name, scores_N in columns.items():
            field = pa.field(name, pa.float32(), nullable=False)
            table = table.append_column(field, pa.array(scores_N.float().numpy(), pa.float32()))
        return table


def _total(
    config: TotalConfig,
    table: pa.Table,
    scores: Mapping[str, Tensor],
    max_response_tokens: int,
    moments: Mapping[str, RunningMoments] | None,
) -> Total:
    tokens: list[list[int]] = []
    if any(isinstance(step, RepetitionConfig) for step in config.shaping.values()):
        tokens = _drawn(table)
    rewards = {name: scores_N for name, scores_N in scores.items() if name != SAFETY_PROMPTS}
    responses = Responses(
        finished_N=torch.tensor([reason == "stop" for reason in table.column("finish_reason").to_pylist()]),
        tokens=tokens,
        lengths_N=list_column(table, "rollout_logprobs").lengths,
        max_tokens=max_response_tokens,
        safety_prompts_N=scores[SAFETY_PROMPTS].bool() if SAFETY_PROMPTS in scores else None,
    )
    return total_scores(config, rewards, responses, moments)


def _drawn(table: pa.Table) -> list[list[int]]:
    """What the policy said in each sample: its turns laid end to end, without an environment's words between them."""
    columns = (table.column(name).to_pylist() for name in ("tokens", "turn_starts", "turn_ends"))
    return [
        [token for start, end in zip(starts, ends, strict=True) for token in sample[start:end]]
        for sample, starts, ends in zip(*columns, strict=True)
    ]


def _by_name(scores: Batches, names: Sequence[str], num_rows: int) -> dict[str, list[pa.RecordBatch]]:
    """Which batches are whose, by counting rows."""
    found: dict[str, list[pa.RecordBatch]] = {name: [] for name in names}
    left, counts = list(scores), dict.fromkeys(names, 0)
    for name in names:
        while left and (counts[name] < num_rows or not left[0].num_rows):
            check_schema(left[0], SCORES)
            counts[name] += left[0].num_rows
            found[name].append(left.pop(0))
    if left or any(count != num_rows for count in counts.values()):
        rows = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise SchemaError(f"scores: {rows}, and {sum(batch.num_rows for batch in left)} more, for {num_rows} samples")
    return found
