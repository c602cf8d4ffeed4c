"""Positions of a pack: where its sequences begin, and how far rotary ones turn alike whatever else is in the pack.

Two kinds of rotary embeddings take their frequencies from the longest sequence of a forward, and give them to all the
others there. Transformers and most code that repositories bring (``modeling_rope_utils.dynamic_rope_update``):

- ``longrope`` (Phi-3, Phi-3.5, Phi-4-mini, MiniCPM; ``su`` in older files): ``short_factor`` up to the length that the
  model was first trained at, ``long_factor`` where a sequence is longer.
- ``dynamic``: frequencies fall as a sequence grows beyond the model's context.

Legend: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import ModelError

#: What there is to do about it, once lengths have been lowered as far as they may be.
FIXED_FREQUENCIES = (
    "give the model frequencies that are the same at every length, by rope_parameters of its config.json (with "
    "longrope: the same short_factor and long_factor)"
)


@dataclass(frozen=True)
class RotaryLimit:
    """Up to how many tokens a sequence leaves the frequencies of the others in a forward as they are."""

    rope_type: str
    tokens: int


def rotary_limit(network_config: Any) -> RotaryLimit | None:
    """The limit of a model by its Hugging Face configuration (untyped); none where every length turns alike."""
    config = network_config.get_text_config()
    limits = [limit for rope in _ropes(config) if (limit := _limit(config, rope)) is not None]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def require_apart(limit: RotaryLimit | None, position_ids_T: Tensor) -> None:
    """Refuse a pack with a sequence that changes what the others get. Without a limit it costs nothing.

    Raises:
        ModelError: there is one.
    """
    if limit is None:
        return
    longest = int(position_ids_T.max()) + 1
    if longest > limit.tokens:
        raise ModelError(
            f"the model has {limit.rope_type} rotary embeddings: a sequence of more than {limit.tokens} tokens changes "
            f"what all others of its pack get, and one here has {longest}; lower data.max_tokens and "
            f"rollout.max_model_tokens to {limit.tokens}, or {FIXED_FREQUENCIES}"
        )


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Its rotary embeddings: one, or one for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):  # the second in code that repositories bring
        rope = getattr(config, key, None)
        if isinstance(rope, Mapping):
            yield rope
            yield from (part for part in rope.values() if isinstance(part, Mapping))


def _limit(config: Any, rope: Mapping[str, Any]) -> RotaryLimit | None:
    kind = rope.get("rope_type") or rope.get("type")
    context = getattr(config, "max_position_embeddings", None)
    tokens = None
    if kind in ("longrope", "su"):
        # Mscales: of Phi-3.5-MoE.
        same = [rope.get(f"short_{what}") == rope.get(f"long_{what}") for what in ("factor", "mscale")]
        if not all(same):
            # The model's own goes before its embedding's, as in Transformers.
            name = "original_max_position_embeddings"
            named = (getattr(config, name, None), rope.get(name), context)
            tokens = next((number for number in named if number is not None), None)
    elif isinstance(kind, str) and "dynamic" in kind:
        tokens = context
    return None if tokens is None else RotaryLimit(str(kind), int(tokens))


def flash_boundaries(position_ids_T: Tensor) -> dict[str, object]:
    """Flash attention's own description of a pack, once for all layers (each would look for the borders again)."""
    starts = (position_ids_T == 0).nonzero()[:, 0]
    ends = starts.new_full((1,), len(position_ids_T))
    boundaries = torch.cat([starts, ends]).to(torch.int32)
    longest = int(position_ids_T.max()) + 1
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
