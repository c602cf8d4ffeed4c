"""The one file that knows DeepSpeed: a model sharded over a role's ranks, trained or run forward.

Invariants:

- ``deepspeed`` is imported, and the process group begun, only when an engine is constructed; the driver, which
  imports role classes to name their methods, pays for neither.
- Every method that touches weights is collective: all ranks call it, in the same order, with as many micro-batches.
- Losses come already divided by the global token or sequence count, so the gradient is the plain sum over ranks and
  micro-batches, whatever their number. DeepSpeed averages over ranks; ``step`` undoes that.
- An update whose loss or gradient is not finite is refused on all ranks, and leaves the weights as they were.
- A rank waits for the device once per update, not per micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from actors.config import ScorerConfig, TrainedRoleConfig
from actors.errors import RoleError, TrainingDiverged
from actors.exports import save_model
from actors.metric_totals import accumulate, over_ranks
from actors.models import PackedModel, TokenScorer, enable_gradient_checkpointing
from actors.moving_average import MovingAverage
from actors.normalisation import ScoreMap, fold
from actors.process_group import join_ranks, prepare_device
from actors.tuning import Adapters, WeightSource, tune, weight_sources
from actors.weights import WeightPart
from actors.zero_settings import forward_settings, parameter_groups, training_settings
from cluster.context import RankContext

logger = logging.getLogger(__name__)

M = TypeVar("M")
#: Maps a model and a micro-batch to a loss and metrics, both already divided by their global denominators.
LossFunction = Callable[[nn.Module, M], tuple[Tensor, Mapping[str, Tensor]]]

_CHECKPOINT_TAG = "engine"


class TrainEngine:
    """One rank's share of a model in training."""

    def __init__(
        self, model: PackedModel, context: RankContext, config: TrainedRoleConfig, ema_decay: float | None = None
    ) -> None:
        """Tune ``model`` (the same on every rank) as ``config`` says, and shard it over the ranks. Collective.

        With ``ema_decay`` a moving average of the weights is kept.

        Raises:
            RoleError: the ranks did not meet.
            ModelError: the model cannot be tuned so.
        """
        self._context = context
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._device = join_ranks(context)
        self._num_updates = 0
        self._refused: str | None = None
        self._grad_norm = 0.0
        # Of all stages only this one leaves clipping and the check of the norm to the caller.
        self._plain = config.zero.stage == 0 and config.model.dtype == "float32"
        self._adapters = tune(model, config, self._device, context.seed)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if config.tuning.has_adapter and config.tuning.lora.dropout > 0:
            # Dropout draws from this process's random state, which starts out the same on every rank.
            torch.manual_seed(context.seed * context.num_ranks + context.rank)
        settings = training_settings(config, context)
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self._engine = _start_engine(model, settings, config.zero.stage == 3, groups)
        self._model = model
        self._optimizer: Any = self._engine.optimizer
        self._sharded = config.zero.stage == 3
        if self._plain:
            self._optimizer.register_step_pre_hook(self._clip)
        self._average: MovingAverage | None = None
        if ema_decay is not None:
            self._average = MovingAverage(model, context, ema_decay, self._device, sharded=self._sharded)

    @property
    def device(self) -> torch.device:
        """Where micro-batches must be."""
        return self._device

    @property
    def num_updates(self) -> int:
        """Optimizer updates so far, those before a resume included."""
        return self._num_updates

    def step(
        self, micro_batches: Sequence[M], loss_function: LossFunction[M], learning_rate: float, where: str = ""
    ) -> dict[str, float]:
        """One optimizer update over this rank's micro-batches. Collective; every rank gives equally many.

        Args:
            micro_batches: one forward and backward each; all their gradients add up.
            loss_function: gives loss and metrics of one, both already divided by the global denominator.
            learning_rate: of this update.
            where: the place in the run, for the error ("iteration 3, minibatch 1").

        Returns:
            The metrics over all ranks (see ``actors.metric_totals``), with ``loss``, ``grad_norm`` (before clipping)
            and ``learning_rate``.

        Raises:
            TrainingDiverged: loss or gradient is not finite; on all ranks, with the weights unchanged.
        """
        if self._refused:
            raise TrainingDiverged(f"no update after the one that was refused: {self._refused}")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        totals: dict[str, Tensor] = {}
        with self._dropping():
            for micro_batch in micro_batches:
                loss, metrics = loss_function(self._engine, micro_batch)
                # DeepSpeed divides the sum over ranks by their number; the losses are of the whole batch already.
                self._engine.backward(loss * self._context.num_ranks, scale_wrt_gas=False)
                accumulate(totals, {"loss": loss.detach(), **metrics})
        results = over_ranks(totals, self._context.num_ranks, self._device)
        if not math.isfinite(results["loss"]):
            self._refuse(f"the loss is {results['loss']}", where)
        try:
            self._engine.step()
        except _GradientNotFinite:
            self._refuse("the gradient holds values that are not finite", where)
        if not self._engine.was_step_applied():
            self._refuse("the gradient holds values that are not finite", where)
        grad_norm = self._grad_norm if self._plain else float(self._engine.get_global_grad_norm())
        self._num_updates += 1
        if self._average is not None:
            self._average.update()
        return results | {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def forward(self, micro_batches: Sequence[M], function: Callable[[nn.Module, M], Tensor]) -> list[Tensor]:
        """``function(model, micro_batch)`` of each, without gradients. Collective where weights are sharded."""
        with torch.no_grad():
            return [function(self._engine, micro_batch) for micro_batch in micro_batches]

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, ``forward`` runs the frozen base: the reference of a policy that is tuned by LoRA or QLoRA.

        Raises:
            RoleError: the model is tuned in full, so what it started from is gone.
        """
        with self._require_adapters().off():
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, ``forward`` runs the moving average of the weights: the reference of a policy held close to its past.

        Afterwards the weights are what they were, to the bit, whether or not something was raised. Collective: all
        ranks enter and leave. Neither an update nor ``weights`` may come in between.

        Raises:
            RoleError: none is kept.
        """
        average = self._require_average()
        try:
            with average.in_place():
                self._gather_anew()
                yield
        finally:
            self._gather_anew()

    def reduce_sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over all ranks. Collective; every rank gives the same names in the same order."""
        totals = {name: torch.tensor(value, device=self._device) for name, value in values.items()}
        return over_ranks(totals, self._context.num_ranks, self._device)

    def weights(
        self, bucket_bytes: int, parts: Sequence[WeightPart] = ("merged",)
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """All weights of some parts of the model, by name, a list of about ``bucket_bytes`` at a time.

        Without ``parts`` all of it under Hugging Face's names, adapters merged into the weights beside them.
        Collective with sharded weights: every rank goes through all of them. The tensors of a list may be the model's
        own, and with sharded weights exist only until the next list is asked for: copy what is to be kept.
        """
        wanted = chain.from_iterable(weight_sources(self._model, self._adapters, part) for part in parts)
        for sources in _buckets(wanted, bucket_bytes):
            with self._gathered([parameter for source in sources for parameter in source.parameters]):
                yield [(source.name, source.value()) for source in sources]

    def save(self, folder: Path) -> None:
        """Write weights, optimizer states, counters and this rank's random states into ``folder``. Collective."""
        folder.mkdir(parents=True, exist_ok=True)
        # What is frozen is where it was loaded from.
        frozen = self._adapters is not None
        self._engine.save_checkpoint(
            str(folder), tag=_CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=frozen
        )
        state: dict[str, object] = {
            "num_ranks": self._context.num_ranks,
            "num_updates": self._num_updates,
            "torch": torch.get_rng_state(),
        }
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        if self._average is not None:
            state["average"] = self._average.state()
        torch.save(state, folder / f"rank-{self._context.rank}.pt")
        self.barrier()

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote. Collective.

        Raises:
            RoleError: there is no checkpoint, or it is of another number of ranks.
        """
        own = folder / f"rank-{self._context.rank}.pt"
        if not own.is_file():
            raise RoleError(f"{self._context.role}: no checkpoint of rank {self._context.rank} in {folder}")
        state = torch.load(own, weights_only=True)
        if state["num_ranks"] != self._context.num_ranks:
            raise RoleError(
                f"{self._context.role}: the checkpoint in {folder} is of {state['num_ranks']} ranks, "
                f"this run has {self._context.num_ranks}; resume with as many"
            )
        whole = self._adapters is None
        path, _ = self._engine.load_checkpoint(str(folder), tag=_CHECKPOINT_TAG, load_module_strict=whole)
        if path is None:
            raise RoleError(f"{self._context.role}: DeepSpeed found no checkpoint in {folder}")
        if self._average is not None:
            self._average.load(state.get("average"), folder)
        self._num_updates = state["num_updates"]
        torch.set_rng_state(state["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])

    def export(self, folder: Path, tokenizer: Any, mapped: ScoreMap | None = None) -> None:
        """Write the model and its tokenizer as a Hugging Face folder. Collective; the first rank writes.

        With ``mapped`` the folder's model, a ``TokenScorer``, gives mapped scores; this one stays as it is.
        """
        weights: dict[str, Tensor] = {}
        for bucket in self.weights(256 << 20):
            if self._context.rank == 0:
                weights |= {name: tensor.to("cpu", copy=True) for name, tensor in bucket}
        if self._context.rank == 0:
            if mapped is not None and isinstance(self._model, TokenScorer):
                fold(self._model, weights, mapped)
            save_model(self._model, weights, folder, tokenizer)
        self.barrier()

    def export_average(self, folder: Path, tokenizer: Any) -> None:
        """Write the moving average as a Hugging Face folder. Collective; the first rank writes.

        Raises:
            RoleError: none is kept.
        """
        whole = self._require_average().whole()
        weights = {name: average.cpu() for name, average in whole if self._context.rank == 0}
        if self._context.rank == 0:
            save_model(self._model, weights, folder, tokenizer)
        self.barrier()

    def export_adapter(self, folder: Path) -> None:
        """Write adapter and head alone, as ``PeftModel.from_pretrained`` loads them. Collective; the first rank writes.

        Raises:
            RoleError: the model is tuned in full.
        """
        adapters = self._require_adapters()
        trained = adapters.trained()
        with self._gathered(list(trained.values())):
            if self._context.rank == 0:
                adapters.save({name: p.detach().to("cpu", copy=True) for name, p in trained.items()}, folder)
        self.barrier()

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier()

    def _require_adapters(self) -> Adapters:
        if self._adapters is None:
            raise RoleError(f"{self._context.role}: tuning.method is full: there is no adapter; choose lora or qlora")
        return self._adapters

    def _require_average(self) -> MovingAverage:
        if self._average is None:
            raise RoleError(f"{self._context.role}: no moving average is kept; set ema_decay")
        return self._average

    def _gather_anew(self) -> None:
        """After a change of the shards: let go of what stage 3 holds gathered of them, and gather what it always holds.

        As DeepSpeed does around a checkpoint. Small parameters stay gathered between forwards, and after a forward
        that was broken off any may be.
        """
        if self._sharded:
            self._optimizer.checkpoint_event_prologue()
            self._optimizer.checkpoint_event_epilogue()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Inside, adapters drop out as configured."""
        if self._adapters is None:
            yield
            return
        self._adapters.set_training(True)
        try:
            yield
        finally:
            self._adapters.set_training(False)

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        return _gathered(parameters, self._sharded)

    def _refuse(self, what: str, where: str) -> NoReturn:
        self._refused = f"{self._context.role}: {what} ({where}); the update was not applied"
        raise TrainingDiverged(self._refused)

    def _clip(self, *_: object) -> None:
        """Before the plain optimizer's step: clip the gradient, and refuse one that is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_grad_norm)
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            raise _GradientNotFinite


class ForwardEngine:
    """One rank's share of a model that only runs forward: the whole of it, or a ZeRO-3 shard."""

    def __init__(self, model: PackedModel, context: RankContext, config: ScorerConfig) -> None:
        """Shard ``model`` over the ranks where ``config.sharding`` says so; replicas load no DeepSpeed. Collective."""
        self.collective = config.sharding == "zero3"
        self.device = join_ranks(context) if self.collective else prepare_device(context)
        self._model = model
        self._module: nn.Module = model
        if self.collective:
            self._module = _start_engine(model, forward_settings(config, context), sharded=True, groups=None)
        else:
            model.to(self.device)

    def forward(self, micro_batches: Sequence[M], function: Callable[[nn.Module, M], Tensor]) -> list[Tensor]:
        """``function(model, micro_batch)`` of each, without gradients. Collective where ``collective``."""
        with torch.no_grad():
            return [function(self._module, micro_batch) for micro_batch in micro_batches]

    def weights(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """As a ``TrainEngine``'s. Collective where ``collective``."""
        for sources in _buckets(weight_sources(self._model, None), bucket_bytes):
            with _gathered([parameter for source in sources for parameter in source.parameters], self.collective):
                yield [(source.name, source.value()) for source in sources]


class _GradientNotFinite(Exception):
    """Leaves the plain optimizer's step before it moves a weight."""


def _start_engine(
    model: PackedModel, settings: dict[str, Any], sharded: bool, groups: list[dict[str, Any]] | None
) -> Any:
    import deepspeed  # here and not above: see the module's first invariant

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a C++ all-reduce for inference on one CPU node, which nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    if sharded:
        # Takes the model to the device and apart one parameter at a time, so no device ever holds it whole.
        deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)
    return engine


def _gathered(parameters: Sequence[nn.Parameter], sharded: bool) -> AbstractContextManager[object]:
    if not sharded:
        return nullcontext()
    import deepspeed  # loaded already, with the engine

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(parameters)
    return gathered


def _buckets(sources: Iterable[WeightSource], bucket_bytes: int) -> Iterator[list[WeightSource]]:
    """Weights in groups of at most ``bucket_bytes``; a larger one stands alone."""
    group: list[WeightSource] = []
    held = 0
    for source in sources:
        if group and held + source.num_bytes > bucket_bytes:
            yield group
            group, held = [], 0
        group.append(source)
        held += source.num_bytes
    if group:
        yield group
