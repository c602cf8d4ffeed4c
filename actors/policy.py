"""The policy: the causal language model that learns from scores of its own responses.

Invariants:

- All ranks are given the same batch and plan it alike, so they agree on minibatches and micro-batches without talking.
- Log-probs are at the sampling temperature, of the whole distribution. Where sampling cuts that (top_p, top_k) they are
  not the engine's, and the run recomputes them (``launch.online_rules``).
- The policy is blind to rewards and to how credit is assigned: it sees advantages, the log-probs to divide by and
  the weights of the loss, as columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from torch import Tensor, nn

from actors.config import PolicyConfig, SamplingConfig
from actors.deepspeed_engine import TrainEngine
from actors.identity import DIGEST_BUCKET_BYTES, configuration_of, model_digest
from actors.models import load_causal_lm, load_tokenizer
from actors.packed import Samples, response_logprobs
from actors.policy_loss import DEVIATION, GAP, PolicyBatch, PolicyObjective, PolicyPack
from actors.pretraining import PretrainingMix
from actors.reports import ColumnInfo, TrainReport
from actors.scoring import score_responses
from actors.updates import ScheduledUpdates, Size, all_ids, summarise, train_minibatches
from actors.weight_channels import Meeting, SharedBucket, WeightMeta
from actors.weight_sender import WeightSender, layout_of
from actors.weights import WeightBucket, WeightManifest, WeightPart
from algorithms.config import OnlineConfig
from cluster.context import RankContext
from experience.schema import POLICY_LOGPROBS, REF_LOGPROBS


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
            AlgorithmError: the algorithm is one of the user's own, and cannot be imported here.
        """
        self._context = context
        self._config = config
        self._num_epochs = algorithm.num_epochs
        self._pretraining_coefficient = algorithm.pretraining.coefficient
        self._objective = PolicyObjective(algorithm, sampling)
        self._temperature = sampling.temperature
        # While the critic warms up the policy has no updates.
        first_iteration = algorithm.critic_warmup_iterations
        self._updates = ScheduledUpdates(config.optimizer, algorithm, seed, num_iterations, first_iteration)
        self._tokenizer = load_tokenizer(config.model)
        model = load_causal_lm(config.model, seed=seed)
        # Before the engine takes the model apart.
        layout = layout_of(model)
        self._configuration = configuration_of(model)
        self._engine = TrainEngine(model, context, config, config.ema_decay)
        self._sender = WeightSender(self._engine, model, context, layout, sharded=config.zero.stage == 3)

    def score(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Log-probs of the response tokens under the current weights: POLICY_LOGPROBS of this rank's rows."""
        return self._logprobs(rollouts, POLICY_LOGPROBS)

    def score_reference(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Log-probs under the policy's own reference: REF_LOGPROBS of this rank's rows, as a reference role's.

        With ``ema_is_reference`` it is the moving average as of now; collective then. Else it is the base, with the
        adapter off; with ``qlora`` the one in 4 bits.

        Raises:
            RoleError: the policy is tuned in full and is not its own reference, so it holds none.
        """
        own = self._engine.averaged() if self._config.ema_is_reference else self._engine.adapter_off()
        with own:
            return self._logprobs(rollouts, REF_LOGPROBS)

    def train(
        self,
        iteration: int,
        rollouts: Sequence[pa.RecordBatch],
        credit: Sequence[pa.RecordBatch],
        ref_logprobs: Sequence[pa.RecordBatch] = (),
        kl_coefficient: float = 0.0,
        pretraining: Sequence[pa.RecordBatch] = (),
    ) -> TrainReport:
        """All epochs and minibatches of one iteration. Collective; same arguments, and same report, on every rank.

        Args:
            ref_logprobs: by the reference, where the KL is in the loss; else no batch.
            kl_coefficient: of that KL.
            pretraining: EXAMPLES that are learnt in the same updates, an even share in each; or no batch.

        Metrics are means over the iteration's updates, but for ``first_ratio_max_deviation``: the largest distance
        of a ratio from 1 on the first minibatch, which is numerical noise where nothing is wrong.

        Raises:
            SchemaError: credit or the reference's log-probs are not of the rollouts' rows.
            TrainingDiverged: loss or gradient of an update is not finite; that update was not applied.
        """
        started = time.perf_counter()
        samples = Samples(rollouts)
        batch = PolicyBatch(all_ids(rollouts), samples, credit, ref_logprobs)
        device = self._engine.device

        def make_pack(rows: Sequence[int]) -> PolicyPack:
            return batch.pack(rows, device)

        def loss(model: nn.Module, pack: PolicyPack, size: Size) -> tuple[Tensor, Mapping[str, Tensor]]:
            return self._objective.loss(model, pack, size, kl_coefficient)

        reports = train_minibatches(
            self._engine,
            self._updates.of_iteration(iteration, samples.num_rows),
            samples,
            self._context,
            self._config.max_tokens_per_pack,
            make_pack,
            loss,
            self._mix(pretraining) if pretraining else None,
        )
        num_tokens = sum(samples.lengths) * self._num_epochs
        report = summarise(reports, num_tokens, time.perf_counter() - started)
        # Only before the first update is the policy the one that sampled.
        first = {"first_ratio_max_deviation": reports[0][DEVIATION], "first_logprob_gap": reports[0][GAP]}
        metrics = {name: value for name, value in report.metrics.items() if name not in (DEVIATION, GAP)}
        return TrainReport(metrics | first, report.num_tokens, report.seconds)

    def _mix(self, examples: Sequence[pa.RecordBatch]) -> PretrainingMix:
        return PretrainingMix(
            examples,
            self._updates.per_iteration,
            self._pretraining_coefficient,
            self._context,
            self._engine.device,
            self._config.max_tokens_per_pack,
        )

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

    def model_digest(self) -> str:
        """A digest of the model, with an adapter of the base alone; the same on every rank. Collective."""
        return model_digest(self._configuration, self._engine.weights(DIGEST_BUCKET_BYTES, ("base",)))

    def save(self, folder: Path) -> None:
        """Write everything that training goes on from. Collective."""
        self._engine.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote. Collective."""
        self._engine.load(folder)

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, tokenizer included. Collective."""
        self._engine.export(folder, self._tokenizer)

    def export_average(self, folder: Path) -> None:
        """Write the moving average of the weights as a Hugging Face folder, tokenizer included. Collective.

        Raises:
            RoleError: none is kept.
        """
        self._engine.export_average(folder, self._tokenizer)

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
