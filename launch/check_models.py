"""What a run needs of its models, judged without loading their weights.

A model is judged by its configuration, its tokenizer and the headers of its weight files.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from actors.config import ModelConfig
from actors.errors import ModelError
from actors.models import PackedModel, explained, outline, require_gradient_checkpointing
from actors.positions import FIXED_FREQUENCIES, rotary_limit
from actors.rewards.config import JudgeRewardConfig, ModelRewardConfig
from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer, require_eos
from launch.config import LearnerRunConfig, OnlineRunConfig, ReferredRunConfig, RewardModelRunConfig, RunConfig
from launch.errors import Problem
from launch.paths import resolve_model
from launch.reward_rules import by_place

ModelKind = Literal["language model", "scorer", "new scorer"]
Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class WantedModel:
    """A model that a role needs: where its configuration stands, what it must be, and the longest sequence.

    ``new scorer`` may also start from a language model, whose head is replaced. ``same_tokens`` is for a role that
    reads the policy's tokens as they are. ``recomputes``: with gradient checkpointing. ``packed``: run by a role of
    ours, not by vLLM alone. ``engine_chooses``: vLLM runs it too, and takes its longest sequence from the model.
    """

    where: str
    model: ModelConfig
    kind: ModelKind
    max_tokens: int
    same_tokens: bool = False
    recomputes: bool = False
    packed: bool = True
    engine_chooses: bool = False


def wanted_models(config: RunConfig) -> Iterator[WantedModel]:
    """The models of a run; the first one's tokenizer is the data's."""
    match config:
        case LearnerRunConfig():
            kind: ModelKind = "new scorer" if isinstance(config, RewardModelRunConfig) else "language model"
            longest = config.data.max_tokens
            recomputes = config.learner.gradient_checkpointing
            yield WantedModel("learner.model", config.learner.model, kind, longest, recomputes=recomputes)
            if isinstance(config, ReferredRunConfig) and (referred := config.reference) is not None:
                yield WantedModel("reference.model", referred.model, "language model", longest, same_tokens=True)
        case OnlineRunConfig():
            longest = config.data.max_tokens + config.rollout.max_new_tokens
            lengths = [engines.max_model_tokens for engines in (config.rollout, config.baseline) if engines is not None]
            yield WantedModel(
                "policy.model",
                config.policy.model,
                "language model",
                max(longest, *(length or 0 for length in lengths)),
                recomputes=config.policy.gradient_checkpointing,
                engine_chooses=None in lengths,
            )
            if (critic := config.critic) is not None:
                recomputes = critic.gradient_checkpointing
                yield WantedModel(
                    "critic.model", critic.model, "new scorer", longest, same_tokens=True, recomputes=recomputes
                )
            if (reference := config.reference) is not None:
                yield WantedModel("reference.model", reference.model, "language model", longest, same_tokens=True)
            for where, reward in by_place(config.reward, config.rewards).items():
                if isinstance(reward, ModelRewardConfig):
                    yield WantedModel(f"{where}.model", reward.model, "scorer", longest)
                elif isinstance(reward, JudgeRewardConfig):
                    judged = reward.max_model_tokens or longest
                    yield WantedModel(f"{where}.model", reward.model, "language model", judged, packed=False)


def check_model(wanted: WantedModel, facts: Facts, tokenizers: dict[str, Tokenizer]) -> Iterator[Problem]:
    """What is wrong with one model. Adds what it is to ``facts``, and its tokenizer to ``tokenizers``."""
    model = resolve_model(wanted.model)
    try:
        found = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers, its validators and remote code raise whatever they like
        absent = Path(model.path).is_absolute() and not Path(model.path).exists()
        reason = "no such folder" if absent else explained(error)
        yield Problem(
            f"{wanted.where}.path",
            f"no model can be read from {model.path}: {reason}",
            "a Hugging Face folder with config.json, or a name on the hub",
        )
        found = None
    if found is not None:
        facts.append((wanted.where, f"{_architecture(found)}, {model.path}"))
        yield from _check_kind(wanted, found)
        yield from _check_context(wanted, found)
        yield from _check_rotary(wanted, found)
        yield from _check_weights(wanted, model)
    yield from _check_tokenizer(wanted, model, found, tokenizers)


def _architecture(found: PreTrainedConfig) -> str:
    return str((found.architectures or ["unknown architecture"])[0])


def _check_kind(wanted: WantedModel, found: PreTrainedConfig) -> Iterator[Problem]:
    architecture = _architecture(found)
    scores = architecture.endswith("Classification")
    if wanted.kind == "language model" and scores:
        yield Problem(wanted.where, f"{architecture} is no language model", "a causal language model")
    elif wanted.kind == "scorer" and (not scores or wanted.model.from_scratch):
        right = "a trained model with one label, such as a reward_model run makes"
        yield Problem(wanted.where, f"{architecture} has no trained head: every reward would be 0", right)
    elif wanted.kind != "language model" and scores and found.num_labels != 1:
        yield Problem(
            wanted.where, f"the model has {found.num_labels} labels", "a model with one label, which is the score"
        )
    elif _can_be_built(wanted, found):
        try:
            layers = outline(resolve_model(wanted.model), scores=wanted.kind != "language model")
        except ModelError as error:
            yield Problem(wanted.where, str(error))
        else:
            yield from _check_recomputing(wanted, layers)
    else:
        what = "a causal language model" if wanted.kind == "language model" else "a model that scores"
        yield Problem(
            wanted.where, f"transformers has no {found.model_type} that is {what}", "a decoder such as Llama or Qwen"
        )


def _check_recomputing(wanted: WantedModel, layers: PackedModel) -> Iterator[Problem]:
    if not wanted.recomputes:
        return
    try:
        require_gradient_checkpointing(layers)
    except ModelError as error:
        right = "gradient_checkpointing: false, and a smaller max_tokens_per_pack where memory is short"
        yield Problem(f"{wanted.where.removesuffix('.model')}.gradient_checkpointing", str(error), right)


def _can_be_built(wanted: WantedModel, found: PreTrainedConfig) -> bool:
    if wanted.model.trust_remote_code and getattr(found, "auto_map", None):
        return True  # the repository brings its own classes
    if wanted.kind == "language model":
        return found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if _architecture(found).endswith("ForTokenClassification"):
        return found.model_type in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    return found.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def _check_context(wanted: WantedModel, found: PreTrainedConfig) -> Iterator[Problem]:
    context = getattr(found.get_text_config(), "max_position_embeddings", None)
    if context is not None and wanted.max_tokens > context:
        yield Problem(
            wanted.where,
            f"sequences of {wanted.max_tokens} tokens are longer than the model's context of {context}",
            "lower data.max_tokens, rollout.sampling.max_response_tokens, rollout.max_model_tokens or a judge's own",
        )


def _check_rotary(wanted: WantedModel, found: PreTrainedConfig) -> Iterator[Problem]:
    """Whether a sequence may be so long that it changes what others get, or that vLLM turns positions otherwise.

    vLLM takes a ``longrope``'s long factors for all sequences, short ones too, if its longest may be beyond the limit.
    """
    limit = rotary_limit(found)
    if limit is None or not wanted.packed:
        return
    longest = wanted.max_tokens
    if wanted.engine_chooses and limit.rope_type == "longrope":
        # As vLLM's own default: where the model itself does not name the limit, its whole context.
        named = getattr(found, "original_max_position_embeddings", None)
        context = getattr(found.get_text_config(), "max_position_embeddings", None)
        longest = max(longest, int(named or context or 0))
    if longest > limit.tokens:
        yield Problem(
            wanted.where,
            f"has {limit.rope_type} rotary embeddings: of {longest} tokens, a sequence is beyond the {limit.tokens} up "
            "to which it leaves its pack mates, and vLLM short sequences, as they are",
            f"lower data.max_tokens, the response's or rollout.max_model_tokens to {limit.tokens}, or "
            f"{FIXED_FREQUENCIES}",
        )


def _check_weights(wanted: WantedModel, model: ModelConfig) -> Iterator[Problem]:
    folder = Path(model.path)
    if wanted.model.from_scratch or not folder.is_dir():
        return
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    indices = sorted(folder.glob("*.index.json"))
    if not files and not indices:
        right = "weights, or `from_scratch: true` to draw random ones"
        yield Problem(wanted.where, f"{folder} holds no weights", right)
    for index in indices:
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            yield Problem(wanted.where, f"{index} is damaged: {error}", "the whole file, copied or downloaded again")
            continue
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            yield Problem(wanted.where, f"{folder} lacks {', '.join(missing)}", f"all {len(shards)} files of the model")
    for file in files:
        if damage := _damage(file):
            yield Problem(wanted.where, f"{file} is damaged: {damage}", "the whole file, copied or downloaded again")


def _damage(file: Path) -> str:
    """What the header of a weight file, and its size, tell; empty if nothing."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np") as opened:
                opened.keys()
        else:
            with file.open("rb") as opened:
                start = opened.read(2)
            if not start:
                return "it is empty"
            if start == b"PK" and not zipfile.is_zipfile(file):
                return "its end is missing"
    except (SafetensorError, OSError) as error:
        return str(error)
    return ""


def _check_tokenizer(
    wanted: WantedModel, model: ModelConfig, found: PreTrainedConfig | None, tokenizers: dict[str, Tokenizer]
) -> Iterator[Problem]:
    if found is None and model.tokenizer_path == model.path and not Path(model.path).is_dir():
        return  # the model is not there at all, which has been said
    where = f"{wanted.where}.tokenizer"
    try:
        tokenizer = load_tokenizer(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
        require_eos(tokenizer, f"{wanted.where} ends sequences with it")
    except DataError as error:
        yield Problem(where, str(error))
        return
    tokenizers[wanted.where] = tokenizer
    vocabulary = tokenizer.get_vocab()
    size = None if found is None else getattr(found.get_text_config(), "vocab_size", None)
    if size is not None and max(vocabulary.values(), default=-1) >= size:
        most = max(vocabulary.values())
        yield Problem(where, f"numbers tokens up to {most}, and the model has {size} of them", "the model's own")
    policy = tokenizers.get("policy.model") or tokenizers.get("learner.model")
    if wanted.same_tokens and policy is not None and vocabulary != policy.get_vocab():
        right = "a model of the policy's family"
        yield Problem(wanted.where, "its tokenizer is not the policy's, whose tokens it is given", right)
