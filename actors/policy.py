"""The policy: the causal language model that PPO trains.

Invariants:

- All ranks are given the same batch and plan it alike, so they agree on minibatches and micro-batches without talking.
- Log-probs are of the distribution that was sampled from: logits are divided by the sampling temperature.
- The policy is blind to rewards: it sees advantages and the log-probs to divide by, as columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import PolicyConfig, SamplingConfig
from actors.deepspeed_engine import MAX_SUFFIX, TrainEngine
from actors.models import load_causal_lm, load_tokenizer
from actors.packed import ResponsePack, Samples, response_logprobs
from actors.reports import ColumnInfo, TrainReport
from actors.scoring import score_responses
from actors.updates import ScheduledUpdates, all_ids, summarise, train_minibatches
from actors.weight_channels import Meeting, SharedBucket, WeightMeta
from actors.weight_sender import WeightSender, layout_of
from actors.weights import WeightBucket, WeightManifest, WeightPart
from algorithms.config import OnlineConfig
from algorithms.logprobs import entropy, token_logprobs
from algorithms.losses import clipped_policy_loss
from cluster.context import RankContext
from experience.schema import CREDIT, POLICY_LOGPROBS, REF_LOGPROBS, check_schema, require_same_rows
from experience.tensors import list_column

_DEVIATION = f"ratio_deviation{MAX_SUFFIX}"
_GAP = "logprob_gap"


@dataclass(frozen=True)
class _PolicyPack:
    """A micro-batch with its credit, each (S,)."""

    samples: ResponsePack
    advantages_S: Tensor
    behaviour_logprobs_S: Tensor


class PolicyActor:
    """One rank of the policy."""

    def __init__(
        self,
        context: RankContext,
        config: PolicyConfig,
        algorithm: OnlineConfig,
        sampling: SamplingConfig,
        seed: int,
        num_iterations: int,
    ) -> None:
        """Load the model and shard it over the ranks. Collective.

        Raises:
            ModelError: model or tokenizer cannot be loaded.
        """
        self._context = context
        self._config = config
        self._algorithm = algorithm
        self._temperature = sampling.temperature
        self._updates = ScheduledUpdates(config.optimizer, algorithm, seed, num_iterations)
        self._tokenizer = load_tokenizer(config.model)
        model = load_causal_lm(config.model, seed=seed)
        # Before the engine takes the model apart.
        layout = layout_of(model)
        self._engine = TrainEngine(model, context, config)
        self._sender = WeightSender(self._engine, context, layout, sharded=config.zero.stage == 3)

    def score(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Log-probs of the response tokens under the current weights: POLICY_LOGPROBS of this rank's rows."""
        return self._logprobs(rollouts, POLICY_LOGPROBS)

    def score_reference(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Log-probs under the base, with the adapter off: REF_LOGPROBS of this rank's rows, as a reference role's.

        With ``qlora`` the base is the one in 4 bits.

        Raises:
            RoleError: the policy is tuned in full, so it holds no base.
        """
        with self._engine.adapter_off():
            return self._logprobs(rollouts, REF_LOGPROBS)

    def train(
        self, iteration: int, rollouts: Sequence[pa.RecordBatch], credit: Sequence[pa.RecordBatch]
    ) -> TrainReport:
        """All epochs and minibatches of one iteration. Collective; same arguments, and same report, on every rank.

        Metrics are means over the iteration's updates, but for ``first_ratio_max_deviation``: the largest distance
        of a ratio from 1 on the first minibatch, which is numerical noise where nothing is wrong.

        Raises:
            SchemaError: credit is not of the rollouts' rows.
            TrainingDiverged: loss or gradient of an update is not finite; that update was not applied.
        """
        started = time.perf_counter()
        ids = all_ids(rollouts)
        for batch in credit:
            check_schema(batch, CREDIT)
        require_same_rows(ids, pa.Table.from_batches(list(credit)))
        samples = Samples(rollouts)
        advantages, behaviour = list_column(credit, "advantages"), list_column(credit, "behaviour_logprobs")
        device = self._engine.device

        def make_pack(rows: Sequence[int]) -> _PolicyPack:
            return _PolicyPack(
                samples.pack(rows, device), advantages.gather(rows).to(device), behaviour.gather(rows).to(device)
            )

        reports = train_minibatches(
            self._engine,
            self._updates.of_iteration(iteration, samples.num_rows),
            samples,
            self._context,
            self._config.max_tokens_per_pack,
            make_pack,
            self._loss,
        )
        num_tokens = sum(samples.lengths) * self._algorithm.num_epochs
        report = summarise(reports, num_tokens, time.perf_counter() - started)
        # Only before the first update is the policy the one that sampled.
        first = {"first_ratio_max_deviation": reports[0][_DEVIATION], "first_logprob_gap": reports[0][_GAP]}
        metrics = {name: value for name, value in report.metrics.items() if name not in (_DEVIATION, _GAP)}
        return TrainReport(metrics | first, report.num_tokens, report.seconds)

    def weight_buckets(
        self, bucket_bytes: int, parts: Sequence[WeightPart] = ("merged",)
    ) -> Iterator[WeightBucket]:
        """The weights for the rollout engines, bucket by bucket, by Hugging Face's names; an adapter's by PEFT's.

        Called on the first rank. Where weights are sharded (stage 3) it is collective: the other ranks take part by
        ``join_gather``, at the same time.
        """
        return self._sender.buckets(bucket_bytes, parts)

    def join_gather(self, bucket_bytes: int, parts: Sequence[WeightPart] = ("merged",)) -> None:
        """Take part in the first rank's ``weight_buckets``; without sharded weights there is nothing to do."""
        self._sender.join_gather(bucket_bytes, parts)

    def weight_manifest(self, version: int) -> WeightManifest:
        """What was last sent makes up together, as ``version``."""
        return self._sender.manifest(version)

    def weight_layout(self) -> list[WeightMeta]:
        """The weights in the order they are sent, without their values."""
        return self._sender.layout()

    def meeting_point(self) -> tuple[str, int]:
        """Where engines can reach this rank."""
        return self._sender.meeting_point()

    def open_broadcast(self, meeting: Meeting) -> None:
        """Connect with the engines over NCCL, while they connect. Collective."""
        self._sender.open_broadcast(meeting)

    def broadcast_weights(self) -> None:
        """Send all weights over NCCL, while the engines receive. Collective."""
        self._sender.broadcast()

    def begin_sharing(self, bucket_bytes: int) -> None:
        """Make ready to share weights with engines on the same GPUs."""
        self._sender.begin_sharing(bucket_bytes)

    def share_next(self) -> SharedBucket | None:
        """The next weights, on this rank's GPU until this is called again; none after the last. Collective."""
        return self._sender.share_next()

    def save(self, folder: Path) -> None:
        """Write everything that training goes on from. Collective."""
        self._engine.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote. Collective."""
        self._engine.load(folder)

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, tokenizer included. Collective."""
        self._engine.export(folder, self._tokenizer)

    def export_adapter(self, folder: Path) -> None:
        """Write the adapter alone, for PEFT. Collective.

        Raises:
            RoleError: the policy is tuned in full.
        """
        self._engine.export_adapter(folder)

    def _logprobs(
        self, rollouts: Sequence[pa.RecordBatch], schema: pa.Schema
    ) -> tuple[pa.RecordBatch, ColumnInfo]:
        return score_responses(
            self._engine,
            lambda model, pack: response_logprobs(model, pack, self._temperature),
            rollouts,
            context=self._context,
            device=self._engine.device,
            collective=self._config.zero.stage == 3,
            max_tokens=self._config.max_tokens_per_pack,
            schema=schema,
        )

    def _loss(self, model: nn.Module, pack: _PolicyPack, num_tokens: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        samples = pack.samples
        logits_SV = model(samples.packed.tokens, samples.packed.position_ids, samples.positions_S)
        logprobs_S = token_logprobs(logits_SV, samples.targets_S, self._temperature)
        coefficient = self._algorithm.entropy_coefficient
        with torch.set_grad_enabled(coefficient > 0):
            entropy_S = entropy(logits_SV, self._temperature)
        loss, metrics = clipped_policy_loss(
            logprobs_S,
            pack.behaviour_logprobs_S,
            pack.advantages_S,
            clip_ratio=self._algorithm.clip_ratio,
            denominator=num_tokens,
            entropy_T=entropy_S,
            entropy_coefficient=coefficient,
        )
        with torch.no_grad():
            difference_S = logprobs_S.detach() - pack.behaviour_logprobs_S
            deviation = difference_S.exp().sub(1).abs()
            extra = {
                _DEVIATION: deviation.max() if len(deviation) else deviation.sum(),
                _GAP: difference_S.abs().sum() / num_tokens,
            }
        return loss, {**metrics, **extra}
