"""A model in the form of ChatGLM's repositories: fused matrices with biases, half of a head turned, tokens before rows.

Hidden states are (L, B, width), the output layer is part of the decoder, and a scorer's head is ``classifier_head``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from .configuration_chatglm import ChatGLMConfig


def _half_rotated(states: Tensor, positions: Tensor) -> Tensor:
    """(L, B, heads, width): neighbours in the first half of the width turned by the position (B, L)."""
    turning, still = states.chunk(2, -1)
    pairs = turning.reshape(*turning.shape[:-1], -1, 2)
    rates = 10_000.0 ** (-torch.arange(pairs.shape[-2], device=states.device) / pairs.shape[-2])
    angles = (positions.T[..., None] * rates)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], -1
    )
    return torch.cat([turned.flatten(-2), still], -1)


class SelfAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        query, key, value = self.query_key_value(states).unflatten(-1, (self.num_heads, -1)).chunk(3, -1)
        query, key = _half_rotated(query, positions), _half_rotated(key, positions)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.dense(mixed.permute(2, 0, 1, 3).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(states).chunk(2, -1)
        out: Tensor = self.dense_4h_to_h(nn.functional.silu(gate) * up)
        return out


class GLMBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, states: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        states = states + self.self_attention(self.input_layernorm(states), mask, positions)
        out: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out


class Embedding(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.word_embeddings(input_ids)
        return states.transpose(0, 1)


class GLMTransformer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config) for _ in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)


class ChatGLMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]  # untyped in transformers
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def get_masks(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, 1, L, L): causal; in two dimensions all of the prefix, which the BOS token ends, sees all of it."""
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None]
        if self.config.position_encoding_2d:
            mask = mask.repeat(len(input_ids), 1, 1)
            for row, tokens in enumerate(input_ids.tolist()):
                mask[row, :, : tokens.index(self.config.bos_token_id)] = True
        if attention_mask is not None:
            mask = mask & attention_mask[:, None].bool()
        return mask[:, None]

    def get_position_ids(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).repeat(len(input_ids), 1)
        if not self.config.position_encoding_2d:
            return positions
        ends = torch.tensor([row.index(self.config.bos_token_id) for row in input_ids.tolist()])[:, None]
        return torch.stack([positions.minimum(ends), (positions - ends).clamp(min=0)], 1)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        if position_ids is None:
            position_ids = self.get_position_ids(input_ids)
        mask = self.get_masks(input_ids, attention_mask)
        turns = position_ids.sum(1) if self.config.position_encoding_2d else position_ids
        states = self.embedding(input_ids)
        for layer in self.encoder.layers:
            states = layer(states, mask, turns)
        return BaseModelOutputWithPast(last_hidden_state=self.encoder.final_layernorm(states))


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        states = self.transformer(input_ids, position_ids, attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.transformer.output_layer(states).transpose(0, 1))


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        states = self.transformer(input_ids, position_ids).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.classifier_head(states[-1]))
