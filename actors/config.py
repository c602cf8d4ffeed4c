"""Configuration of the roles. Imports no torch: the driver and `troupe check` read it in milliseconds.

Each model here configures the class of the same stem in this folder: ``PolicyConfig`` the ``PolicyActor``,
``RolloutConfig`` the ``RolloutActor``, and so on; ``ZeroConfig`` and ``OptimizerConfig`` the DeepSpeed engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import FrozenConfig, PlacementConfig, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]
#: The largest rank of an adapter that vLLM takes.
MAX_ADAPTER_RANK = 512


class ModelConfig(FrozenConfig):
    """A Hugging Face model."""

    path: str = Field(description="A folder in Hugging Face form, or a name on the Hugging Face hub.")
    tokenizer: str | None = Field(None, description="Where the tokenizer is; none means beside the model.")
    from_scratch: bool = Field(
        False, description="Take only config.json and the tokenizer from `path` and draw random weights."
    )
    dtype: Dtype = Field("bfloat16", description="Precision of the weights in forward and backward.")
    attention: Literal["sdpa", "flash_attention_2", "eager"] = Field(
        "sdpa",
        description="Transformers' attention implementation; flash_attention_2 needs a GPU and the package flash-attn.",
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that the model's repository carries.")

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is read from."""
        return self.tokenizer or self.path


class ZeroConfig(FrozenConfig):
    """DeepSpeed ZeRO of a trained role."""

    stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="What is sharded over ranks: 1 optimizer states, 2 also gradients, 3 also weights; 0 nothing "
        "(in bfloat16, 0 also sums gradients in bfloat16, the others in float32).",
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer states in CPU memory.")
    offload_params: bool = Field(False, description="Keep sharded weights in CPU memory (stage 3 only).")

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> ZeroConfig:
        if self.offload_params and self.stage != 3:
            raise ValueError(f"offload_params needs stage 3, not stage {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, not stage 0")
        return self


class ScheduleConfig(FrozenConfig):
    """Learning-rate schedule over a run's optimizer updates."""

    shape: Literal["constant", "linear", "cosine"] = Field("constant", description="How the rate falls after warm-up.")
    warmup_fraction: Fraction = Field(0.0, description="Share of all updates over which the rate rises linearly.")
    final_fraction: Fraction = Field(0.1, description="The last rate as a share of the peak (linear and cosine).")


class OptimizerConfig(FrozenConfig):
    """AdamW."""

    learning_rate: PositiveFloat = Field(description="Peak learning rate.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="Adam's decay rates.")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Global gradient norm above which gradients are scaled down.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="How the learning rate moves.")


class OnlineOptimizerConfig(OptimizerConfig):
    """AdamW, of a role that learns from samples."""

    eps: PositiveFloat = Field(
        1e-5, description="Adam's epsilon. Larger than a learner's, as OpenAI's PPO and Llama 2 have it: gradients of "
        "samples are noisy, and this keeps weights that get hardly any from moving by a whole learning rate."
    )

    @model_validator(mode="before")
    @classmethod
    def _of_any_kind(cls, given: object) -> object:
        """A plain ``OptimizerConfig`` stands for what it was given."""
        return given.model_dump(exclude_unset=True) if type(given) is OptimizerConfig else given


class LoRAConfig(FrozenConfig):
    """Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021): W x becomes W x + scale * B A x."""

    rank: PositiveInt = Field(
        16, description="Rows of A and columns of B: what an adapter can express, and what it costs. The same default "
        "for `qlora`, whose authors' code has rank 64 with alpha 16."
    )
    alpha: PositiveFloat = Field(
        32.0, description="The scale of B A is alpha / rank; twice the rank is common practice. QLoRA's authors have a "
        "quarter of it: set both as they do, and the learning rate with them."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of an adapter's inputs dropped in training, never in scoring. For "
        "learners: policy and critic, whose updates are held against their scoring, take 0 alone."
    )
    targets: Literal["all_linear"] | tuple[str, ...] = Field(
        "all_linear",
        description="Linear layers that get an adapter: `all_linear`, which QLoRA found is needed to match full "
        "tuning, or ends of their names (`q_proj`). The output layer, a scorer's head and the stacked experts of a "
        "mixture are never among all.",
    )
    use_rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank) (rsLoRA), so that large ranks learn as fast as small ones."
    )
    use_dora: bool = Field(False, description="Train the length of each output's weights apart (DoRA). Slower.")

    @field_validator("targets")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("targets is empty: name linear layers (`q_proj`), or write `all_linear`")
        return value

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return float(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))


class QLoRAConfig(FrozenConfig):
    """4-bit storage of the frozen weights (NF4 in blocks of 64; QLoRA, Dettmers et al. 2023).

    They are de-quantised to ``model.dtype`` to compute with.
    """

    double_quantisation: bool = Field(
        True, description="Store the blocks' scales in 8 bits as well: saves 0.37 bits a weight."
    )


class TuningConfig(FrozenConfig):
    """Which weights of a trained role learn."""

    method: Literal["full", "lora", "qlora"] = Field(
        "full",
        description="`full`: all; `lora`: adapters beside frozen weights; `qlora`: the same beside frozen weights in 4 "
        "bits. The head of a critic or reward model always learns in full.",
    )
    lora: LoRAConfig = Field(LoRAConfig(), description="The adapters of `lora` and `qlora`.")
    qlora: QLoRAConfig = Field(QLoRAConfig(), description="How `qlora` stores the frozen weights.")

    @model_validator(mode="after")
    def _blocks_are_used(self) -> TuningConfig:
        # Compared by value: a resolved configuration writes out blocks that nobody set.
        if self.method == "full" and self.lora != LoRAConfig():
            raise ValueError("tuning.lora is set, but tuning.method is full: choose lora or qlora, or remove it")
        if self.method != "qlora" and self.qlora != QLoRAConfig():
            raise ValueError(f"tuning.qlora is set, but tuning.method is {self.method}: choose qlora, or remove it")
        return self

    @property
    def has_adapter(self) -> bool:
        """The base is frozen, and can be had by leaving the adapter off."""
        return self.method != "full"


def cannot_be_tuned(model: ModelConfig, zero: ZeroConfig, tuning: TuningConfig) -> str | None:
    """Why a role's model cannot be trained so, and what would do; none where it can."""
    if tuning.method == "full":
        return None
    if model.from_scratch:
        return (
            f"tuning.method {tuning.method} trains adapters beside weights that stay, and model.from_scratch draws "
            "those at random: use full"
        )
    if tuning.method == "qlora" and tuning.lora.use_dora and zero.stage == 3:
        return (
            "tuning.method qlora with lora.use_dora does not run under zero.stage 3: PEFT then puts new parameters in "
            "place of those that DeepSpeed sharded. Use a lower stage, lora, or leave use_dora off"
        )
    return None


class TrainedRoleConfig(PlacementConfig):
    """A role whose model DeepSpeed trains."""

    model: ModelConfig = Field(description="The model it starts from.")
    zero: ZeroConfig = Field(ZeroConfig(), description="How its state is sharded over its ranks.")
    tuning: TuningConfig = Field(TuningConfig(), description="Which of its weights learn.")
    optimizer: OptimizerConfig = Field(description="How it learns.")
    max_tokens_per_pack: PositiveInt = Field(
        8192, description="Token budget of one packed micro-batch on one rank: the lever on memory. Gradients "
        "accumulate over as many packs as the batch needs. On CPU about twice the longest sequence is fastest."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")

    @model_validator(mode="after")
    def _can_be_tuned(self) -> TrainedRoleConfig:
        if reason := cannot_be_tuned(self.model, self.zero, self.tuning):
            raise ValueError(reason)
        return self


class PolicyConfig(TrainedRoleConfig):
    """The policy: any causal language model."""

    optimizer: OnlineOptimizerConfig = Field(description="How it learns.")
    ema_decay: float | None = Field(
        None, ge=0, lt=1, description="Keep a moving average of the weights, in float32 and sharded over the ranks: "
        "after each update, average = decay * average + (1 - decay) * weights (InstructGPT: 0.992). Exported as "
        "`ema/`. None: none is kept."
    )
    ema_is_reference: bool = Field(
        False, description="Hold the policy close to its own moving average, not to a model that stays: the average, "
        "as it is when an iteration's training begins, is the reference. Needs ema_decay, and no section `reference`. "
        "It bounds how fast the policy moves, not how far."
    )

    @model_validator(mode="after")
    def _average_is_of_weights(self) -> PolicyConfig:
        if self.ema_is_reference and self.tuning.has_adapter:
            raise ValueError(
                f"ema_is_reference needs tuning.method full, not {self.tuning.method}: no average of adapters "
                "is kept, and the reference of an adapter is its base; leave it out"
            )
        if self.ema_is_reference and self.ema_decay is None:
            raise ValueError("ema_is_reference needs the moving average that it names: set ema_decay, as 0.992")
        if self.ema_decay is not None and self.tuning.has_adapter:
            raise ValueError(
                f"ema_decay needs tuning.method full, not {self.tuning.method}: the average of adapters is not the "
                "adapter of the averaged weights, since A and B are multiplied"
            )
        return self


class CriticConfig(TrainedRoleConfig):
    """The critic: a sequence-classification model with one label, usually the reward model."""

    optimizer: OnlineOptimizerConfig = Field(description="How it learns.")


class ScorerConfig(PlacementConfig):
    """A role that only runs forward: the reference (a causal LM) or a reward model (one label)."""

    model: ModelConfig = Field(description="The model it scores with.")
    sharding: Literal["replicas", "zero3"] = Field(
        "replicas", description="Each rank holds the whole model, or DeepSpeed ZeRO-3 spreads it over the ranks."
    )
    max_tokens_per_pack: PositiveInt = Field(8192, description="Token budget of one packed forward on one rank.")


class ReferenceConfig(ScorerConfig):
    """The reference: the model that the policy is held close to, usually the SFT model."""


class RewardConfig(ScorerConfig):
    """The reward model."""


class SamplingConfig(FrozenConfig):
    """How responses are drawn."""

    max_response_tokens: PositiveInt = Field(description="Longest response; longer ones end with reason `length`.")
    temperature: PositiveFloat = Field(1.0, description="Softmax temperature, in sampling and in every log-prob.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus truncation; 1 keeps the distribution whole. What is trained on needs "
        "algorithm.recompute_logprobs, or a correction, with less."
    )
    top_k: int = Field(
        0, ge=0, description="Keep the k most probable tokens; 0 keeps all. What is trained on needs the same."
    )
    stop: tuple[str, ...] = Field((), description="Strings that end a response, besides EOS.")
    samples_per_prompt: PositiveInt = Field(1, description="Responses drawn for each prompt.")


class EnvironmentConfig(FrozenConfig):
    """What the policy acts upon in turns, instead of giving one response; and what rewards each turn."""

    path: str = Field(
        description="`package.module:Class` or `path/to/file.py:Class`, a subclass of "
        "`actors.environments.face.Environment`. It must be found wherever engines run."
    )
    options: dict[str, Any] = Field({}, description="Keywords that the class is made with, once for each episode.")
    max_turns: PositiveInt = Field(description="Turns of the policy in an episode; then it ends with reason `length`.")
    max_tokens: PositiveInt = Field(
        description="Longest episode behind the prompt, turns and the environment's words together; one that would "
        "grow longer ends with reason `length`. A turn alone has at most sampling.max_response_tokens."
    )
    timeout_s: PositiveFloat = Field(30.0, description="The longest that one answer of the environment may take.")

    @field_validator("path")
    @classmethod
    def _is_path(cls, value: str) -> str:
        where, colon, name = value.rpartition(":")
        if not (where and colon and name):
            raise ValueError(f"path is {value!r}; write package.module:Class or path/to/file.py:Class")
        return value


class RolloutConfig(PlacementConfig):
    """vLLM engines that generate with the policy's weights: num_nodes * ranks_per_node engines, data parallel."""

    sampling: SamplingConfig = Field(description="How responses are drawn.")
    environment: EnvironmentConfig | None = Field(
        None, description="Episodes of several turns: `sampling` is then of each turn. None: one response is all."
    )
    dtype: Dtype | None = Field(None, description="Precision in the engine; none means the policy's.")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs that one engine is spread over.")
    max_model_tokens: PositiveInt | None = Field(
        None, description="Longest prompt plus response that an engine takes; none means the model's context."
    )
    max_concurrent_sequences: PositiveInt = Field(256, description="Sequences that one engine decodes at a time.")
    kv_cache_bytes: PositiveInt | None = Field(
        None, description="Size of an engine's KV cache; none means 90 % of the GPU, or 256 MiB on CPU."
    )
    gpu_memory_fraction: Fraction = Field(0.9, description="Share of a GPU's memory that an engine takes.")
    enforce_eager: bool = Field(False, description="Run without compilation and CUDA graphs; always so on CPU.")
    prompts_in_flight_per_engine: PositiveInt = Field(
        64, description="Prompts an engine holds at a time; the rest wait in the driver for the least loaded engine."
    )
    bucket_bytes: PositiveInt = Field(256 << 20, description="Weights travel to the engines in buckets of this size.")
    weight_transfer: Literal["auto", "shared_memory", "nccl", "ipc"] = Field(
        "auto",
        description="How weights reach the engines: `shared_memory` on CPU, `nccl` between GPUs, `ipc` where policy "
        "and engine share a GPU; `auto` chooses.",
    )
    lora: Literal["merged", "adapter"] = Field(
        "merged",
        description="What engines run of a policy with an adapter: `merged`, its weights with the adapter in them, all "
        "of which travel at each publication; or `adapter`, its frozen weights, sent once, and by vLLM's own LoRA the "
        "adapter, which alone travels then, through shared memory. Sampling is slower with it.",
    )

    @property
    def max_new_tokens(self) -> int:
        """The longest that a sample is behind its prompt."""
        return self.sampling.max_response_tokens if self.environment is None else self.environment.max_tokens

    @property
    def max_drawn_tokens(self) -> int:
        """The most tokens of a sample that the policy draws, in all its turns."""
        longest = self.sampling.max_response_tokens
        return longest if self.environment is None else min(longest * self.environment.max_turns, self.max_new_tokens)

    @property
    def sample_sampling(self) -> SamplingConfig:
        """``sampling`` of whole samples: their longest response is all that the policy draws, in all turns."""
        return self.sampling.model_copy(update={"max_response_tokens": self.max_drawn_tokens})

    @field_validator("tensor_parallel_size")
    @classmethod
    def _power(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"tensor_parallel_size must be a power of two, not {value}")
        return value
