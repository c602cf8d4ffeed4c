"""The rollout role: one vLLM engine that answers prompts with the policy's weights.

Invariants:

- An engine that has not been given a whole set of weights generates nothing. That holds for one that was started
  anew: what it booted from is not the policy of now.
- A response is a function of (seed, sample id, weights): not of the engine, nor of what else it was generating.
- Every response token carries its log-prob as sampled and the version of the weights that drew it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pyarrow as pa

from actors.config import ModelConfig, RolloutConfig, SamplingConfig
from actors.environments.episodes import Episodes, Prompt, whole_groups
from actors.errors import EngineDead, RolloutError
from actors.models import load_tokenizer
from actors.rollout_rows import Answer, rollout_rows
from actors.weight_channels import Endpoint, Meeting, SharedBucket, Transfer, WeightMeta, broadcast_info, shared_info
from actors.weights import SharedSegment, Tally, WeightBucket, WeightManifest, WeightPart, WeightsRefused
from cluster.context import RankContext
from experience.schema import PROMPTS, check_schema

if TYPE_CHECKING:
    from actors.vllm_engine.engine import Completion

_MASK = (1 << 64) - 1
#: Added to the engine's seed where held-out prompts are answered: their samples have the numbers of others.
EVALUATION_SEED = 2_000_003
#: The same, for what an environment draws.
ENVIRONMENT_SEED = 3_000_017


@dataclass(frozen=True)
class RolloutInfo:
    """What the driver knows of a slice. Tokens are response tokens; versions are over all of them."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    num_tokens: int
    oldest_version: int
    newest_version: int
    seconds: float
    #: Prompts that were not answered, and why: their episodes failed. They are in no count.
    dropped: Mapping[int, str] = field(default_factory=dict)


def engine_environment(on_gpu: bool) -> dict[str, str]:
    """Environment that an engine's process must be started with: vLLM reads it when it is imported."""
    shared = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_gpu:
        return shared
    # Compiling the sampler's helpers takes 20 s on CPU and gains nothing there; threads are bound by Ray, not by vLLM.
    return {**shared, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def transfer_environment(transfer: Transfer) -> dict[str, str]:
    """What an engine needs besides to take weights in one way: vLLM takes CUDA-IPC handles pickled, and only so.

    They come from the policy's ranks alone.
    """
    return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if transfer == "ipc" else {}


class RolloutActor:
    """One engine. Its methods are coroutines: many slices are under way at a time."""

    def __init__(
        self,
        context: RankContext,
        config: RolloutConfig,
        model: ModelConfig,
        seed: int,
        adapter_rank: int | None = None,
    ) -> None:
        """Start the engine, which loads ``model`` and waits for weights.

        With ``adapter_rank`` they are those of the frozen base, once, and the policy's adapter of that rank.

        Raises:
            RolloutError: the engine cannot start, weights cannot reach it as configured, or there is no such
                environment.
        """
        on_gpu = context.device == "cuda"
        auto: Transfer = "nccl" if on_gpu else "shared_memory"
        self._transfer: Transfer = auto if config.weight_transfer == "auto" else config.weight_transfer
        if self._transfer != "shared_memory" and not on_gpu:
            raise RolloutError(
                f"rollout.weight_transfer {self._transfer} goes from GPU to GPU, and this engine is on CPU: use auto "
                "or shared_memory"
            )
        # The engine's own process inherits it.
        os.environ.update(transfer_environment(self._transfer))
        # Here, so that the driver, which imports this class to name it, does not import vLLM.
        from actors.vllm_engine import engine, worker

        self._context = context
        self._config = config
        self._seed = seed
        self._sampling_params = engine.sampling_params
        self._bucket_info = worker.shared_memory_update
        args = engine.engine_args(
            config, model, self._transfer, on_gpu=on_gpu, seed=seed, adapter_rank=adapter_rank
        )
        self._engine = engine.Engine(args)
        self._segment = SharedSegment(f"{context.role}-{context.rank}")
        self._tally = Tally()
        self._parts: tuple[WeightPart, ...] = ("merged",) if adapter_rank is None else ("base", "adapter")
        self._version: int | None = None
        self._num_calls = 0
        self._episodes: Episodes | None = None
        if config.environment is not None:
            self._episodes = Episodes(
                config.environment, load_tokenizer(model), context_tokens=self._engine.max_model_tokens,
                max_turn_tokens=config.sampling.max_response_tokens,
            )

    async def generate(
        self, prompts: pa.RecordBatch, rows: list[int], greedy: bool = False
    ) -> tuple[pa.RecordBatch, RolloutInfo]:
        """Answer some rows of a PROMPTS batch: ROLLOUT of ``samples_per_prompt`` rows each, in their order.

        In an environment an answer is an episode. Prompts whose episodes failed are left out, and told in the info.

        Args:
            greedy: give the most probable response to each prompt instead, one row each. Samples are numbered as their
                prompts then: such a rollout is a baseline, and never part of experience.

        Raises:
            RolloutError: no weights yet, no rows, or a prompt that is empty, leaves no room for a response, or holds
                a token that the model does not know. Nothing of the slice goes on generating then.
            EngineDead: the engine died.
        """
        sampling = _greedy(self._config.sampling) if greedy else self._config.sampling
        return await self._answers(prompts, rows, sampling, self._seed)

    async def evaluate(
        self, prompts: pa.RecordBatch, rows: list[int], samples_per_prompt: int, temperature: float
    ) -> tuple[pa.RecordBatch, RolloutInfo]:
        """Answer held-out prompts: ROLLOUT of ``samples_per_prompt`` rows each, in their order.

        Their numbers, like their prompts', are apart from those of experience, and so are their seeds, which are the
        same each time. Temperature 0 gives the most probable response.

        Raises:
            RolloutError, EngineDead: as ``generate``.
        """
        ours = self._config.sampling
        sampling = (ours if temperature else _greedy(ours)).model_copy(
            update={"temperature": temperature, "samples_per_prompt": samples_per_prompt}
        )
        return await self._answers(prompts, rows, sampling, self._seed + EVALUATION_SEED)

    async def _answers(
        self, prompts: pa.RecordBatch, rows: list[int], sampling: SamplingConfig, seed: int
    ) -> tuple[pa.RecordBatch, RolloutInfo]:
        began = time.perf_counter()
        check_schema(prompts, PROMPTS)
        if self._version is None:
            raise RolloutError("the engine has not been given the policy's weights; publish them first")
        if not rows:
            raise RolloutError("generate was given no rows of its prompts; give it one at least")
        wanted = [_prompt(prompts, row) for row in rows]
        for prompt in wanted:
            self._require_room(prompt.prompt_id, len(prompt.tokens))
        self._num_calls += 1
        num_each = sampling.samples_per_prompt
        samples = [
            replace(prompt, sample_id=prompt.prompt_id * num_each + k) for prompt in wanted for k in range(num_each)
        ]
        answer = self._answer if self._episodes is None else self._play
        pairs = [(prompt.prompt_id, answer(sampling, seed, prompt)) for prompt in samples]
        answers, failed = await whole_groups(pairs)
        versions = [
            version for answer in answers for done in answer.completions for version, _, _ in done.versions
        ]
        info = RolloutInfo(
            prompt_ids=tuple(prompt.prompt_id for prompt in wanted if prompt.prompt_id not in failed),
            num_samples=len(answers),
            num_tokens=sum(answer.num_drawn for answer in answers),
            oldest_version=min(versions, default=self._version),
            newest_version=max(versions, default=self._version),
            seconds=time.perf_counter() - began,
            dropped=failed,
        )
        return rollout_rows(answers), info

    async def endpoint(self) -> Endpoint:
        """How this engine takes weights."""
        return Endpoint(self._transfer, self._config.tensor_parallel_size, self._engine.is_open, self._parts)

    async def join(self, meeting: Meeting) -> None:
        """Connect with the policy over NCCL, while it connects."""
        await self._engine.open(meeting.init_info(self._context.rank))

    async def begin_update(self) -> None:
        """Freeze generation and make ready for new weights.

        Raises:
            RolloutError: weights come over NCCL, and ``join`` was not called.
        """
        self._tally = Tally()
        if not self._engine.is_open:
            if self._transfer == "nccl":
                raise RolloutError("the engine is not connected with the policy; join comes before an update")
            await self._engine.open({"packed": True} if self._transfer == "ipc" else {})
        await self._engine.begin_update()

    async def receive(self, bucket: WeightBucket) -> None:
        """Load one bucket of weights.

        Raises:
            EngineDead: it could not be loaded, so that the engine holds old weights and new ones.
        """
        try:
            self._segment.write(bucket.payload)
        except OSError as error:
            self._engine.fail_update(f"no memory for a bucket of {bucket.payload.nbytes} bytes of weights: {error}")
            raise
        await self._engine.load(self._bucket_info(bucket, self._segment.path))
        self._tally.add(bucket)

    async def receive_broadcast(self, parameters: Sequence[WeightMeta]) -> None:
        """Take all weights as the policy broadcasts them over NCCL."""
        await self._engine.load(broadcast_info(parameters))
        self._tally.add_layout(parameters)

    async def receive_shared(self, bucket: SharedBucket) -> None:
        """Copy weights that the policy shares on this engine's GPU."""
        await self._engine.load(shared_info(bucket))
        self._tally.add_layout(bucket.parameters)

    async def finish_update(self, manifest: WeightManifest) -> None:
        """Go on generating, with the weights that came.

        Raises:
            WeightsRefused: they are not all that was sent. The engine is dead then.
        """
        came = self._tally.manifest(manifest.version)
        if came != manifest:
            why = f"the update was {manifest}, what came was {came}"
            self._engine.fail_update(why)
            raise WeightsRefused(why)
        await self._engine.finish_update(manifest.version)
        self._version = manifest.version
        if "base" in self._parts:
            self._parts = ("adapter",)

    async def shutdown(self) -> None:
        """End the engine's processes and give their memory back; an actor that is killed leaves nothing either."""
        self._engine.shutdown()
        self._segment.close()

    def _require_room(self, prompt_id: int, num_tokens: int) -> None:
        if num_tokens == 0:
            raise RolloutError(f"prompt {prompt_id} is empty; a prompt is one token at least")
        context, response = self._engine.max_model_tokens, self._config.sampling.max_response_tokens
        if self._episodes is not None:
            response = 1  # an episode takes what room there is
        if num_tokens > context - response:
            raise RolloutError(
                f"prompt {prompt_id} has {num_tokens} tokens; with responses of up to {response} the engine's "
                f"{context} take prompts of {context - response}: lower data.max_tokens or raise "
                "rollout.max_model_tokens"
            )

    async def _answer(self, sampling: SamplingConfig, seed: int, prompt: Prompt) -> Answer:
        sampling_seed = sample_seed(seed, prompt.sample_id)
        name = f"{prompt.sample_id}-{self._call(sampling)}"
        done = await self._complete(prompt, name, prompt.tokens, sampling, sampling_seed)
        return Answer.of_one_turn(prompt.sample_id, prompt.prompt_id, prompt.tokens, done)

    async def _play(self, sampling: SamplingConfig, seed: int, prompt: Prompt) -> Answer:
        assert self._episodes is not None, "asked where there is an environment"
        name, first = f"{prompt.sample_id}-{self._call(sampling)}", sample_seed(seed, prompt.sample_id)

        async def take_turn(tokens: Sequence[int], turn: int, max_tokens: int) -> Completion:
            shorter = sampling.model_copy(update={"max_response_tokens": max_tokens})
            return await self._complete(prompt, f"{name}-{turn}", tokens, shorter, sample_seed(first, turn))

        game = sample_seed(seed + ENVIRONMENT_SEED, prompt.prompt_id)
        return await self._episodes.play(replace(prompt, seed=game), take_turn)

    def _call(self, sampling: SamplingConfig) -> str:
        return f"{self._num_calls}-greedy" if sampling.temperature == 0 else str(self._num_calls)

    async def _complete(
        self, prompt: Prompt, name: str, tokens: Sequence[int], sampling: SamplingConfig, seed: int
    ) -> Completion:
        try:
            return await self._engine.generate(name, tokens, self._sampling_params(sampling, seed))
        except EngineDead:
            raise
        except RolloutError as error:
            raise RolloutError(f"prompt {prompt.prompt_id}: {error}") from error


def _greedy(sampling: SamplingConfig) -> SamplingConfig:
    """One response a prompt at temperature 0, which no configuration may ask for: its log-probs mean nothing."""
    return sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0, "top_k": 0, "samples_per_prompt": 1})


def _prompt(prompts: pa.RecordBatch, row: int) -> Prompt:
    """A row of PROMPTS, for no sample yet."""
    prompt_id, tokens = prompts.column("prompt_id")[row].as_py(), prompts.column("tokens")[row].values
    columns = json.loads(prompts.column("columns")[row].as_py())
    return Prompt(-1, prompt_id, tokens.to_numpy().tolist(), columns, seed=0)


def sample_seed(seed: int, sample_id: int) -> int:
    """The seed of one response, 63 bits: SplitMix64 (Steele et al. 2014) of the run's seed and the sample's id."""
    state = (seed * 0x9E3779B97F4A7C15 + sample_id + 1) & _MASK
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1
