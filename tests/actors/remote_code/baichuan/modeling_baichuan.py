"""A model in the form of Baichuan's repositories: query, key and value in one matrix, a mask of its own, no scorer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_baichuan import BaichuanConfig


def _rotated(states: Tensor, positions: Tensor) -> Tensor:
    """(B, heads, L, width) turned by its position (B, L)."""
    half = states.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=states.device) / half)
    angles = (positions[..., None] * rates)[:, None].repeat(1, 1, 1, 2)
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * angles.cos() + turned * angles.sin()


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        parts = self.W_pack(states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _rotated(parts[0], positions), _rotated(parts[1], positions)
        mixed = nn.functional.scaled_dot_product_attention(query, key, parts[2], attn_mask=mask)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, states: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), mask, positions)
        out: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out


class BaichuanPreTrainedModel(PreTrainedModel):  # type: ignore[misc]  # untyped in transformers
    config_class = BaichuanConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012  # the form that transformers asks for


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """Its mask knows of padding, and not of positions that restart."""
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        states = self.embed_tokens(input_ids)
        for layer in self.layers:
            states = layer(states, mask, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states))


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):  # type: ignore[misc]  # untyped in transformers
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        states = self.model(input_ids, attention_mask, position_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(states))
