"""The configuration that a repository of ChatGLM's kind carries."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class ChatGLMConfig(PreTrainedConfig):  # type: ignore[misc]  # untyped in transformers
    """``position_encoding_2d`` is the first ChatGLM's: a prefix that sees all of itself, and positions in two rows."""

    model_type = "chatglm"

    def __init__(
        self,
        padded_vocab_size: int = 64,
        hidden_size: int = 32,
        ffn_hidden_size: int = 64,
        num_layers: int = 2,
        num_attention_heads: int = 4,
        seq_length: int = 256,
        position_encoding_2d: bool = False,
        **rest: Any,
    ) -> None:
        self.vocab_size = self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.num_hidden_layers = self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.seq_length = seq_length
        self.position_encoding_2d = position_encoding_2d
        super().__init__(**rest)
