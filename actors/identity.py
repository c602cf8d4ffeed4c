"""What a model computes, in one digest.

Invariant: two models with the same digest give the same outputs, but for rounding: weights, the configuration that says
what is done with them, attention, precision, and code that a model brings are all in it. Where the model lies is not,
nor what only training or generation asks for.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from actors.models import PackedModel

DIGEST_BUCKET_BYTES = 256 << 20
#: Keys of a config.json, at any depth, that change no output: where it came from, and what the caller says anyway.
_OF_NO_CONSEQUENCE = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)


def configuration_of(model: PackedModel) -> str:
    """What a model does with its weights, as text: its whole configuration, defaults too, attention and precision.

    To be called before an engine takes the model apart.
    """
    network: Any = model.network
    kind = type(network)
    facts = {
        "class": kind.__name__,
        "config": _normalised(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "dtype": str(network.dtype),
    }
    if kind.__module__.startswith("transformers_modules"):  # code that came with the model
        facts["code"] = xxhash.xxh3_128(inspect.getsource(sys.modules[kind.__module__]).encode()).hexdigest()
    return json.dumps(facts, sort_keys=True, default=str)


def model_digest(configuration: str, buckets: Iterable[Sequence[tuple[str, Tensor]]]) -> str:
    """A digest of a model.

    Args:
        configuration: as ``configuration_of`` gives it.
        buckets: the weights by name, in buckets of any size.
    """
    digest = xxhash.xxh3_128(configuration.encode())
    for bucket in buckets:
        for name, weight in bucket:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def _normalised(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _normalised(held) for key, held in value.items() if key not in _OF_NO_CONSEQUENCE}
    if isinstance(value, (list, tuple)):
        return [_normalised(held) for held in value]
    return value
