"""What a model computes, in one digest.

Invariant: two models with the same digest give the same outputs, but for rounding: weights, the configuration that says
what is done with them, attention, precision, and code that a model brings are all in it. Where the model lies is not,
nor what only training or generation asks for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from actors.exports import persistent_buffers
from actors.models import PackedModel

DIGEST_BUCKET_BYTES = 256 << 20
#: Keys of a config.json, at any depth, that change no output: where it came from, and what the caller says anyway.
_OF_NO_CONSEQUENCE = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)
#: Those that Transformers' own decoders read in training or generation alone; code of others may read any of them.
_NOT_OF_A_FORWARD = frozenset({"eos_token_id", "bos_token_id", "initializer_range"})


def configuration_of(model: PackedModel) -> str:
    """What a model does with its weights, as text: its whole configuration, defaults too, attention and precision.

    To be called before an engine takes the model apart.
    """
    network: Any = model.network
    kind = type(network)
    files = _files_of_its_own(model)
    left_out = _OF_NO_CONSEQUENCE.__contains__ if files else _left_out(network)
    facts = {
        "class": kind.__name__,
        "config": _normalised(model.config.to_dict(), left_out),
        "attention": model.config._attn_implementation,
        "dtype": str(network.dtype),
    }
    if files:
        # A set: Transformers may keep copies of a file.
        facts["code"] = sorted({(file.name, xxhash.xxh3_128(file.read_bytes()).hexdigest()) for file in files})
    if buffers := persistent_buffers(model):  # no parameters, so not among the weights
        facts["buffers"] = model_digest("", [sorted(buffers.items())])
    return json.dumps(facts, sort_keys=True, default=str)


def _files_of_its_own(model: PackedModel) -> set[Path]:
    """The files of code that came with the model: of its classes, and what these import of the same repository."""
    found: set[Path] = set()
    for kind in (type(model.network), type(model.config)):
        if kind.__module__.startswith("transformers_modules"):
            file = str(sys.modules[kind.__module__].__file__)
            # Not what happens to be loaded: a process that has the tokenizer's code too must find the same.
            found.update(map(Path, (file, *get_relative_import_files(file))))
    return found


def _left_out(network: nn.Module) -> Callable[[str], bool]:
    """Which keys change no output of one of Transformers' own decoders."""
    # Some count positions from the padding's number on (RoBERTa); what merely embeds gives it a vector like any other.
    counts = any(
        hasattr(module, "padding_idx") and not isinstance(module, (nn.Embedding, PreTrainedModel))
        for module in network.modules()
    )

    def left_out(key: str) -> bool:
        if key == "pad_token_id":
            return not counts
        drops = "dropout" in key or key.endswith(("pdrop", "layerdrop"))
        return drops or key in _NOT_OF_A_FORWARD or key in _OF_NO_CONSEQUENCE

    return left_out


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


def _normalised(value: Any, left_out: Callable[[str], bool]) -> Any:
    if isinstance(value, dict):
        return {str(key): _normalised(held, left_out) for key, held in value.items() if not left_out(str(key))}
    if isinstance(value, (list, tuple)):
        return [_normalised(held, left_out) for held in value]
    return value
