"""Real engines over tiny models, the weights to give them, and the slow way to what they should have answered."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers

from actors.config import ModelConfig, RolloutConfig, SamplingConfig
from actors.rollout import RolloutActor, engine_environment
from actors.weights import Tally, WeightBucket, WeightManifest
from experience.schema import PROMPTS, make_batch
from tests.actors import tiny_models
from tests.actors.ranks import context

#: What vLLM and what it imports warn of is not ours to mend.
IGNORED_WARNINGS = "ignore::Warning"
BUCKET_BYTES = 20_000


def environment() -> dict[str, str]:
    return {**engine_environment(on_gpu=False), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def config(sampling: Mapping[str, Any] | None = None, **changes: Any) -> RolloutConfig:
    drawn = SamplingConfig(**({"max_response_tokens": 24} | dict(sampling or {})))
    return RolloutConfig(**({"sampling": drawn, "kv_cache_bytes": 32 << 20} | changes))


def actor(
    folder: Path, settings: RolloutConfig | None = None, seed: int = 5, adapter_rank: int | None = None
) -> RolloutActor:
    """An engine that has no weights yet. Called in a running loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ModelConfig(path=str(folder), dtype="float32")
        return RolloutActor(context(role="rollout"), settings or config(), model, seed, adapter_rank)


def write_model(folder: Path, tied: bool, seed: int = 0) -> Path:
    """A random model that vLLM's attention on CPU takes: its heads are 32 wide."""
    torch.manual_seed(seed)
    shape = transformers.Qwen2Config(
        vocab_size=tiny_models.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def network(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def changed(folder: Path, seed: int) -> Any:
    """The folder's model with other weights, as if it had been trained."""
    model = network(folder)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source) * 0.3 * parameter.std().nan_to_num(1.0))
    return model


def buckets(model: Any, version: int, bucket_bytes: int = BUCKET_BYTES) -> tuple[list[WeightBucket], WeightManifest]:
    """All weights of a model, as the policy sends them."""
    tally, sent, held = Tally(), [], []
    size = 0
    for name, parameter in model.named_parameters():
        held.append((name, parameter))
        size += parameter.numel() * parameter.element_size()
        if size >= bucket_bytes:
            sent.append(WeightBucket.of(held))
            held, size = [], 0
    if held:
        sent.append(WeightBucket.of(held))
    for bucket in sent:
        tally.add(bucket)
    return sent, tally.manifest(version)


async def publish(engine: RolloutActor, model: Any, version: int, pause_s: float = 0.0) -> None:
    sent, manifest = buckets(model, version)
    await engine.begin_update()
    for bucket in sent:
        await engine.receive(bucket)
        await asyncio.sleep(pause_s)
    await engine.finish_update(manifest)


def prompts(lengths: Sequence[int], first_id: int = 0, seed: int = 0) -> pa.RecordBatch:
    """Random prompts; which tokens one has depends on its id alone."""
    rows = []
    for prompt_id, length in enumerate(lengths, first_id):
        source = torch.Generator().manual_seed(seed * 1000 + prompt_id)
        rows.append(torch.randint(2, 64, (length,), generator=source).tolist())
    ids = list(range(first_id, first_id + len(lengths)))
    more = {"source": ["test"] * len(ids), "columns": ["{}"] * len(ids)}
    return make_batch(PROMPTS, {"prompt_id": ids, "tokens": rows, **more})


def rows(batch: pa.RecordBatch) -> dict[int, dict[str, Any]]:
    """Samples by their id."""
    return {row["sample_id"]: row for row in batch.to_pylist()}


def response(row: Mapping[str, Any]) -> list[int]:
    return list(row["tokens"][row["num_prompt_tokens"] :])


@torch.no_grad()
def logprobs(model: Any, row: Mapping[str, Any], temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """Log-probs of a sample's response, one forward without a cache; truncation by hand, token by token."""
    given: torch.Tensor = model(torch.tensor([row["tokens"]])).logits[0, row["num_prompt_tokens"] - 1 : -1]
    logits = given.double() / temperature
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for place, line in enumerate(logits.softmax(-1)):
        total = 0.0
        for token in line.argsort(descending=True).tolist():
            kept[place, token] = True
            total += float(line[token])
            if total >= top_p:
                break
    logits[~kept] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(response(row))[:, None])[:, 0].float()


def worst(model: Any, batch: pa.RecordBatch, **how: float) -> float:
    """The largest distance of a batch's log-probs from the slow way's."""
    return max(
        float((torch.tensor(row["rollout_logprobs"]) - logprobs(model, row, **how)).abs().max())
        for row in batch.to_pylist()
    )
